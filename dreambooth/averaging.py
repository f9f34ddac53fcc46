"""A moving average of the trained weights, which wavers less than they do."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Average:
    """The exponential moving average of weights (Polyak & Juditsky 1992), in float32.

    Args:
        weights: by name, as they are before the first step.
        decay: of the old average at each step; early on (1 + step) / (10 + step) where that is less, so that the first
            values do not linger.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int) -> None:
        """Move towards the weights after step `step`, from 0; they are in the order of those before the first step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(weights), 1 - decay)  # one kernel for many weights

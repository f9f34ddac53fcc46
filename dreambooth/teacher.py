"""What the untouched base predicts, as the target of class rows: the prior without a single class image.

A subject's noisy latents under the class prompt must be seen as the base sees them: the learned subject stays with its
identifier. B rows, C latent channels, H height and W width of the latents.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from dreambooth import adapters, methods
from dreambooth.dataset import Batch
from dreambooth.families import condition, take
from dreambooth.models import Model, cast_module
from dreambooth.params import Train
from dreambooth.texts import TextSource


class Teacher:
    """The base of a training: its own UNet without the LoRA, or a frozen copy where all weights move.

    Args:
        model: before its first step.
        prompts: of the rows that will be taught; they are encoded now, by the encoders of the base.
        settings: of the training; where the weights of the UNet themselves will move, a copy stays, in the precision
            that the UNet computes in.
    """

    def __init__(self, model: Model, prompts: Sequence[str], settings: Train) -> None:
        self._model, self._text = model, TextSource(model, prompts, trained=False)
        self._copy: torch.nn.Module | None = None
        if settings.method == "full":
            self._copy = copy.deepcopy(model.unet).requires_grad_(False).eval()
            if (half := methods.HALF[settings.mixed_precision]) is not None:
                cast_module(self._copy, half)

    @torch.no_grad()
    def replace(self, target: Tensor, noisy_latents: Tensor, batch: Batch) -> Tensor:
        """Return the target with the base's prediction in the rows that are taught, (B, C, H, W)."""
        rows = batch.taught
        if not rows:
            return target
        text = self._text.encode([batch.prompts[row] for row in rows], ())
        how = condition(text, None if batch.sizes is None else take(batch.sizes, rows))
        predicted = self._predict(take(noisy_latents, rows), take(batch.timesteps, rows), how).float()
        return target.index_copy(0, torch.tensor(rows).to(target.device, non_blocking=True), predicted)

    def _predict(self, latents: Tensor, timesteps: Tensor, how: dict[str, object]) -> Tensor:
        if self._copy is not None:
            prediction: Tensor = self._copy(latents, timesteps, **how).sample
        else:
            with adapters.without_lora(self._model.unet):
                prediction = self._model.unet(latents, timesteps, **how).sample
        return prediction

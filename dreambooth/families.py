"""What differs between the families of models: the parts of their pipelines, and what their UNets are told of a row.

SD1.x and SD2.x are one family: one text encoder, whose last layer the UNet reads; what it predicts, noise or velocity,
stands in the scheduler's configuration. SDXL reads the layer before the last of two text encoders, a pooled embedding
of the second, and the sizes of the picture (Podell et al. 2023, sections 2.1 and 2.2).

B rows, L tokens, D text width, P width of the pooled embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sizes = tuple[int, int, int, int, int, int]
"""Original height and width, top and left of the crop, target height and width, in pixels."""


@dataclass(frozen=True)
class Family:
    """A kind of pipeline: its class in diffusers, and its text encoders with their tokenizers."""

    pipeline_class: str
    encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]

    @property
    def components(self) -> tuple[str, ...]:
        """Names of all parts, which are the names of their folders."""
        first, *others = zip(self.encoders, self.tokenizers, strict=True)
        return ("unet", "vae", *first, "scheduler", *(part for pair in others for part in pair))

    @property
    def weighted(self) -> tuple[str, ...]:
        """Names of the parts that have weights."""
        return ("unet", "vae", *self.encoders)


SD = Family("StableDiffusionPipeline", ("text_encoder",), ("tokenizer",))
SDXL = Family("StableDiffusionXLPipeline", ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2"))
FAMILIES = {family.pipeline_class: family for family in (SD, SDXL)}


@dataclass(frozen=True)
class Text:
    """What the UNet reads of B prompts.

    Attributes:
        embeds: (B, L, D).
        pooled: (B, P) for SDXL, else None.
    """

    embeds: Tensor
    pooled: Tensor | None = None

    def rows(self, numbers: Sequence[int]) -> "Text":
        """Take rows, in this order, some of them several times."""
        return Text(take(self.embeds, numbers), None if self.pooled is None else take(self.pooled, numbers))

    @classmethod
    def joined(cls, texts: "Sequence[Text]") -> "Text":
        """Put the rows of several behind each other."""
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return cls(torch.cat([text.embeds for text in texts]), torch.cat(pooled) if pooled else None)


def take(tensor: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return rows of a tensor, (B, ...), without waiting for its device as an index of numbers would."""
    return tensor[torch.tensor(numbers).to(tensor.device, non_blocking=True)]


def encode_text(family: Family, encoders: Sequence[torch.nn.Module], input_ids: Sequence[Tensor]) -> Text:
    """Encode B prompts.

    Args:
        family: of the model.
        encoders: its text encoders, in order.
        input_ids: (B, L) of each encoder's own tokenizer.
    """
    if family is SD:
        return Text(encoders[0](input_ids[0])[0])
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, input_ids, strict=True)]
    return Text(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1][0])


def condition(text: Text, sizes: Tensor | None) -> dict[str, Any]:
    """Return what a UNet is called with besides latents and timesteps.

    Args:
        text: of B rows.
        sizes: (B, 6) of each row, see `Sizes`; only SDXL reads them.
    """
    if text.pooled is None:
        return {"encoder_hidden_states": text.embeds}
    if sizes is None:
        raise ValueError("SDXL needs the sizes of each row")
    sizes = sizes.to(text.pooled.device, text.pooled.dtype, non_blocking=True)
    added = {"text_embeds": text.pooled, "time_ids": sizes}
    return {"encoder_hidden_states": text.embeds, "added_cond_kwargs": added}


def drawn_sizes(resolution: int) -> Sizes:
    """Return the sizes of a picture that is drawn whole, as the pipeline of diffusers states them."""
    return (resolution, resolution, 0, 0, resolution, resolution)

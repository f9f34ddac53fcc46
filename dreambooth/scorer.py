"""Say how well a picture fits a prompt: cosine of a picture and a bag of words in one space.

The picture goes through frozen EfficientNet-Lite0 features and a small head, the prompt through a list of phrases, each
of which stands for one token. Made by `base/scorer.py`; what its cosines mean stands in its model card.
N pictures, M prompts, T tokens, F features, H hidden width, D width of the space.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dreambooth.encoders import RESOLUTION, Lite0Pooled, lite0_pooled, load_lite0
from dreambooth.errors import EvaluationError, ModelError, UnknownWordError

VOCABULARY, WEIGHTS = "vocabulary.json", "scorer.safetensors"
TENSORS = ("mean", "scale", "hidden.weight", "hidden.bias", "out.weight", "out.bias", "tokens")
ARTICLES = {"a", "an", "the"}
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


class Vocabulary(NamedTuple):
    """What the scorer understands: phrases, and the token of each.

    A phrase is one word or several: "on a red background" and "red" are different tokens, since the one is about the
    background and the other about the subject. A phrase without a token carries nothing, as "photo of". Articles are
    dropped before phrases are looked for: "on the beach" is "on a beach".
    """

    tokens: tuple[str, ...]
    phrases: Mapping[tuple[str, ...], str | None]
    """The words of a phrase, and the name of its token."""

    def bag(self, prompt: str) -> frozenset[int]:
        """List the tokens of a prompt: at each word the longest phrase that begins there.

        Raises:
            UnknownWordError: words that belong to no phrase.
        """
        found, unknown = self.parse(prompt)
        if unknown:
            raise UnknownWordError(prompt, unknown)
        return frozenset(self.tokens.index(token) for token in found)

    def parse(self, prompt: str) -> tuple[list[str], list[str]]:
        """List the tokens and the unknown words of a prompt, in their order."""
        words = split(prompt)
        longest = max(map(len, self.phrases), default=0)
        found, unknown, start = [], [], 0
        while start < len(words):
            ends = range(min(len(words), start + longest), start, -1)
            end = next((end for end in ends if tuple(words[start:end]) in self.phrases), None)
            if end is None:
                unknown.append(words[start])
            elif (token := self.phrases[tuple(words[start:end])]) is not None:
                found.append(token)
            start = end or start + 1
        return found, unknown


class BundledScorer:
    """The image-text head of the bundled base model; on the CPU.

    Args:
        folder: holds vocabulary.json and scorer.safetensors.

    Raises:
        ModelError: the folder, one of its files, or the package of the Lite0 weights is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        vocabulary, weights = (_content(folder / name) for name in (VOCABULARY, WEIGHTS))
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
        self.transform = f"RGB, PIL bicubic resize to {RESOLUTION}x{RESOLUTION} (aspect not kept), (x - 0.5) / 0.5"

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


NEXT_STEP = "restore it from git, or make it again: dvc repro base/dvc.yaml:scorer"


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


def split(phrase: str) -> tuple[str, ...]:
    """Give the words of a phrase or a prompt: lower case, without punctuation and articles."""
    return tuple(word for word in WORD.findall(phrase.lower()) if word not in ARTICLES)


def read_vocabulary(content: bytes, path: Path) -> Vocabulary:
    """Read {"tokens": [name], "phrases": {phrase: name or null}}.

    Raises:
        ModelError: the file is something else.
    """
    try:
        data = json.loads(content)
        tokens = tuple(data["tokens"])
        phrases = {split(phrase): token for phrase, token in data["phrases"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read as a vocabulary ({error!r}); {NEXT_STEP}") from error
    if strangers := sorted({token for token in phrases.values() if token is not None} - set(tokens)):
        raise ModelError(f"{path}: phrases stand for {strangers}, which are no tokens; {NEXT_STEP}")
    return Vocabulary(tokens, phrases)


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


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} of the image-text scorer cannot be read ({error.strerror}); {NEXT_STEP}") from error

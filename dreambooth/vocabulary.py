"""What the bundled image-text scorer understands: phrases, and the token that each stands for. No torch here."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dreambooth.errors import DreamboothError, ModelError, UnknownWordError

SCORER, VOCABULARY = "data/base/scorer", "vocabulary.json"
NEXT_STEP = "restore it from git, or make it again: dvc repro base/dvc.yaml:scorer"
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


def find_vocabulary(root: Path) -> Vocabulary | None:
    """Read the words of a project's bundled scorer; None where they are missing or broken, as the evaluation says."""
    path = root / SCORER / VOCABULARY
    try:
        return read_vocabulary(read_file(path), path)
    except DreamboothError:
        return None


def read_file(path: Path) -> bytes:
    """Return the bytes of one of the scorer's files."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} of the image-text scorer cannot be read ({error.strerror}); {NEXT_STEP}") from error

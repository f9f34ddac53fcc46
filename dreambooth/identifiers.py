"""Say whether a word is fit to mean a subject: rare, and few tokens (Ruiz et al. 2022, section 3.2)."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth.bases import read_json
from dreambooth.errors import ModelError
from dreambooth.prompts import Reader
from dreambooth.vocabulary import find_vocabulary, split

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_PIECES = 3  # the paper's identifiers have 1 to 3 tokens
FREQUENT_SHARE = 0.25  # of the merges of a byte-level vocabulary, which stand in the order of their frequency
FIRST_MERGE = 512  # 256 bytes, and the same ones at the end of a word
SHORTEST_WORD = 3  # letters; shorter pieces are parts of anything, "x" or "re"
START_AND_END = 2  # tokens around every text
END_OF_WORD = "</w>"  # CLIP's mark of a piece that ends a word: "dog</w>" of "mydog" is the token of the word "dog"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # Radford et al. 2021, simple_tokenizer.py
# Words that prompts are made of: as an identifier each would change every prompt, "a photo of photo dog".
COMMON = frozenset({"a", "an", "and", "as", "at", "background", "by", "drawing", "for", "from", "front", "her"}) | {
    "his", "image", "in", "is", "it", "its", "near", "next", "of", "on", "or", "painting", "photo", "photograph",
    "picture", "rendering", "sketch", "that", "the", "their", "this", "to", "top", "under", "with",
}  # fmt: skip


def identifier_fault(identifier: str, class_noun: str) -> str | None:
    """Return why a word can mean no subject of a class, None if it can."""
    word = identifier.casefold()
    if word.startswith(("=", "+", "-", "@")):
        return f"{identifier!r} begins with = + - or @, which spreadsheets and commands run; choose a word such as sks"
    if word in class_noun.casefold().split():
        return f"{identifier!r} is the class noun itself; choose a rare word such as sks"
    if word in COMMON:
        return f"{identifier!r} is a word that prompts are made of; choose a rare word such as sks"
    return None


def known_words(root: Path, class_nouns: Iterable[str]) -> frozenset[str]:
    """Return the words whose meaning an identifier should not carry: of prompts, classes and the bundled scorer."""
    vocabulary = find_vocabulary(root)
    return COMMON.union(*map(split, class_nouns), *(vocabulary.phrases if vocabulary else ()))


def identifier_remarks(
    identifier: str, ids: Sequence[int], pieces: Sequence[str], vocabulary: int, words: Collection[str]
) -> Iterator[str]:
    """Yield what is questionable about an identifier, in the words of a warning.

    Args:
        identifier: the word.
        ids: of its tokens, without start and end.
        pieces: the same tokens in letters.
        vocabulary: how many tokens there are; those after the bytes are merges, the frequent ones first.
        words: as of `known_words`, in lower case.
    """
    letters = [piece.removesuffix(END_OF_WORD) for piece in pieces]
    if len(ids) > MAX_PIECES:
        yield (
            f"identifier {identifier!r} is {len(ids)} pieces to the tokenizer ({' '.join(letters)}), more than "
            f"{MAX_PIECES}: it is harder to learn; rare words are zwx and ohwx"
        )
    frequent = [_is_frequent(one, vocabulary) for one in ids]
    if len(ids) == 1:
        if frequent[0]:
            yield (
                f"identifier {identifier!r} is a frequent word to the base model (token {ids[0]} of {vocabulary}): "
                "what it means already will be in the pictures; rare words are zwx and ohwx"
            )
        return
    ends = [piece.removesuffix(END_OF_WORD) for piece in pieces if piece.endswith(END_OF_WORD)]
    told = [word for word in ends if len(word) >= SHORTEST_WORD and word.casefold() in words]
    if all(frequent) and all(len(word) >= SHORTEST_WORD for word in letters):
        told = letters
    if told:
        yield (
            f"identifier {identifier!r} holds what the base model knows as {', '.join(map(repr, told))}: what that "
            "means will be in the pictures; rare words are zwx and ohwx"
        )


def remarks_by_tokenizer(identifiers: Iterable[str], folder: Path | None, words: Collection[str]) -> list[str]:
    """Return the remarks of a tokenizer; none where it is not at hand (the training asks its own).

    Args:
        identifiers: the words to look at.
        folder: with tokenizer.json, or vocab.json and merges.txt as CLIP's; None where there is none.
        words: as of `identifier_remarks`.
    """
    tokenizer = _read(folder) if folder else None
    if tokenizer is None:
        return []
    remarks: list[str] = []
    for identifier in identifiers:
        found = tokenizer.encode(identifier, add_special_tokens=False)
        remarks += identifier_remarks(identifier, found.ids, found.tokens, tokenizer.get_vocab_size(), words)
    return remarks


def reader_at(folder: Path | None) -> Reader | None:
    """Return how much of a text is read, by the files of a tokenizer; None where they are not at hand.

    Args:
        folder: as of `remarks_by_tokenizer`, with tokenizer_config.json.
    """
    about = folder / "tokenizer_config.json" if folder else None
    tokenizer = _read(folder) if folder else None
    if tokenizer is None or about is None or not about.is_file():
        return None
    room = read_json(about).get("model_max_length")
    if not isinstance(room, int):
        return None
    return Reader(lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), room - START_AND_END)


def _is_frequent(token: int, vocabulary: int) -> bool:
    rank = (token - FIRST_MERGE) / max(vocabulary - FIRST_MERGE, 1)
    return 0 <= rank < FREQUENT_SHARE


def _read(folder: Path) -> "Tokenizer | None":
    """Read a tokenizer without transformers, whose import takes seconds."""
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return _whole(whole)
        return _clip(vocabulary, merges) if vocabulary.is_file() and merges.is_file() else None
    except Exception as error:  # tokenizers has no other
        raise ModelError(f"{folder} holds no tokenizer ({error}); fetch the model again") from None


def _whole(file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _clip(vocabulary: Path, merges: Path) -> "Tokenizer":
    """Make CLIP's tokenizer of its two files: SD1.5 and SDXL on the hub have no tokenizer.json."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    model = models.BPE.from_file(
        str(vocabulary), str(merges), continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer

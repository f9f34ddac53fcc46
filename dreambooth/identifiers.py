"""Say whether a word is fit to mean a subject: rare, and few tokens (Ruiz et al. 2022, section 3.2)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

MAX_PIECES = 3  # the paper's identifiers have 1 to 3 tokens
FREQUENT_SHARE = 0.25  # of the merges of a byte-level vocabulary, which stand in the order of their frequency
FIRST_MERGE = 512  # 256 bytes, and the same ones at the end of a word
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


def identifier_remarks(identifier: str, ids: Sequence[int], pieces: Sequence[str], vocabulary: int) -> Iterator[str]:
    """Yield what is questionable about an identifier, in the words of a warning.

    Args:
        identifier: the word.
        ids: of its tokens, without start and end.
        pieces: the same tokens in letters.
        vocabulary: how many tokens there are; those after the bytes are merges, the frequent ones first.
    """
    if len(ids) > MAX_PIECES:
        told = " ".join(piece.replace("</w>", "") for piece in pieces)
        yield (
            f"identifier {identifier!r} is {len(ids)} pieces to the tokenizer ({told}), more than {MAX_PIECES}: it is "
            "harder to learn; a rare word of one piece is sks"
        )
    rank = (ids[0] - FIRST_MERGE) / max(vocabulary - FIRST_MERGE, 1) if len(ids) == 1 else 1.0
    if 0 <= rank < FREQUENT_SHARE:
        yield (
            f"identifier {identifier!r} is a frequent word to the base model (token {ids[0]} of {vocabulary}): what it "
            "means already will be in the pictures; a rare word is sks"
        )


def remarks_by_tokenizer(identifiers: Iterable[str], tokenizer: Path) -> list[str]:
    """Return the remarks of a tokenizer.json; none without such a file (the training asks its own tokenizer)."""
    if not tokenizer.is_file():
        return []
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(tokenizer))
    words.no_padding()
    remarks: list[str] = []
    for identifier in identifiers:
        found = words.encode(identifier, add_special_tokens=False)
        remarks += identifier_remarks(identifier, found.ids, found.tokens, words.get_vocab_size())
    return remarks

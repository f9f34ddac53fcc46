"""The sentences a model is trained and tested with, made from an identifier and a class noun."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dreambooth.errors import EvaluationError, ParamsError, PhotosError, shown
from dreambooth.folders import hidden_by_link, read_text

PLACEHOLDER = "{}"
INSTANCE_TEMPLATE = "a photo of {}"
MAX_CAPTION = 1000  # characters; how many tokens are read depends on the base: `cuts`
ARTICLE = re.compile(r"\b(?:an?|the) ", re.IGNORECASE)
# After these a new noun phrase begins; not in "a see-through {}". Those that are adjectives too are left out.
BREAK = re.compile(
    r"(?<![\w-])(?:about|above|across|after|against|along|alongside|amid|among|and|are|around|as|at|atop|before|behind"
    r"|below|beneath|beside|besides|between|beyond|but|by|during|except|for|from|had|has|have|in|inside|into|is|like"
    r"|near|of|on|onto|or|outside|over|past|per|than|that|through|to|toward|towards|under|underneath|until|upon|versus"
    r"|via|was|were|which|while|who|whose|with|within|without) ",
    re.IGNORECASE,
)
# What ends a noun phrase right before the {}: a comma, or a verb in -ing ("a child gently holding {}"), which is an
# adjective where nothing but adverbs stands before it ("a brightly glowing {}", "a red, glowing {}").
END = re.compile(r",\s*$|(?:^|,)\s*(?:\w+ly )*+[^\s,]+ [^,]*?[aeiouy]\w*ing\s*$", re.IGNORECASE)
# Beginnings whose first letter misleads: the h of hour is silent, an x-ray begins as an egg does ...
VOWEL_SOUND = re.compile(r"hour|heir|honest|honou?r|x-?ray", re.IGNORECASE)
# ... a unicorn (not an unidentified bird), a user (not an usher), a euphonium as a yacht does, and a onesie as a wand.
CONSONANT_SOUND = re.compile(
    r"uni(?!d|m|n)|us(?:e|ua|ur)|ut(?:e|i|o)|uk|ub|ur(?:al|an|ea|in)|u(?:fo|sb)\b|eu|ewe|one(?:s|\b)|once|oui",
    re.IGNORECASE,
)
KINDS = ("recontextualisation", "property", "accessory")


class Template(NamedTuple):
    """An evaluation prompt with a {} for the subject, and what it tests."""

    kind: str
    prompt: str


class Reader(NamedTuple):
    """How much of a text the text encoders of a base read."""

    count: Callable[[str], int]
    """Of the tokens of a text, without start and end."""
    room: int
    """How many of them are read: 75 by CLIP's 77."""


def reader_of(tokenizers: Sequence[Any]) -> Reader:
    """Return how much of a text is read through all tokenizers of a base."""

    def count(text: str) -> int:
        found = [one(text, add_special_tokens=False, verbose=False)["input_ids"] for one in tokenizers]
        return max(map(len, found))

    return Reader(count, min(one.model_max_length - one.num_special_tokens_to_add() for one in tokenizers))


class Cut(NamedTuple):
    """A prompt whose end is not read."""

    text: str
    """For people."""
    loses_subject: bool
    """Whether the words for the subject, or the class, stand in what is not read."""


def cuts(templates: Iterable[tuple[str, str]], words: str, reader: Reader) -> Iterator[Cut]:
    """Yield the prompts that are longer than what is read of them.

    Args:
        templates: where each stands, and its text with a {}.
        words: for the subject or the class.
        reader: of the base.
    """
    for where, template in templates:
        number = reader.count(fill(template, words))
        if number <= reader.room:
            continue
        head = reader.count(fill(template.partition(PLACEHOLDER)[0] + PLACEHOLDER, words))
        lost = head > reader.room
        if lost:
            what = f"{words!r} ends at token {head}, and the base reads {reader.room}; put {{}} near the beginning"
        else:
            what = f"has {number} tokens, and the base reads {reader.room}: the end has no effect; shorten it"
        yield Cut(f"{where}: {what}: {shown(template[:60])!r}", lost)


def require_read(found: Iterable[Cut], error: type[ParamsError] | type[PhotosError]) -> list[str]:
    """Refuse prompts that do not say whom they mean; return what is to be said of those that lose only their end.

    Raises:
        ParamsError, PhotosError: as `error` says, with each prompt whose words for the subject are not read.
    """
    found = list(found)
    if lost := [cut.text for cut in found if cut.loses_subject]:
        raise error(lost)
    return [cut.text for cut in found]


def instance_prompt(identifier: str, class_noun: str, caption: str | None = None) -> str:
    """Name the subject: "a photo of sks dog" (Ruiz et al. 2022, section 3.2).

    A photo with a caption of its own, "a photo of {} in a park", says with it what is not the subject.
    """
    return fill(caption or INSTANCE_TEMPLATE, f"{identifier} {class_noun}")


def read_caption(path: Path) -> str:
    """Read the caption of a photo: one line of text with one {} where the words for the subject go.

    Raises:
        PhotosError: no text, too much of it, no file, or not one {}.
    """
    try:
        caption = " ".join(read_text(path).split())
    except (OSError, UnicodeDecodeError) as error:
        raise PhotosError([f"{path}: the caption cannot be read ({error}); write one line in UTF-8"]) from None
    if caption.count(PLACEHOLDER) != 1 or len(caption) > MAX_CAPTION:
        raise PhotosError(
            [
                f"{path}: the caption {caption[:60]!r} should have one {{}} for the subject and at most {MAX_CAPTION} "
                "characters; for example: a photo of {} in a park"
            ]
        )
    return caption


def class_prompt(class_noun: str) -> str:
    """Name the class: "a photo of a dog"."""
    return fill(INSTANCE_TEMPLATE, with_article(class_noun))


def class_prompts(class_noun: str, templates: Sequence[str]) -> list[str]:
    """Name the class in each template: "a photo of a dog in a park"."""
    return [fill(template, with_article(class_noun)) for template in templates]


def with_article(noun: str) -> str:
    """Put a or an before a noun by its first sound: the first letter tells it, but for a short list of beginnings."""
    has_vowel = noun[:1].lower() in "aeiou" and not CONSONANT_SOUND.match(noun)
    return f"{'an' if has_vowel or VOWEL_SOUND.match(noun) else 'a'} {noun}"


def fill(template: str, words: str) -> str:
    """Put the words for a subject or a class where a template has {}.

    "a photo of {} in space" with "sks dog" is the prompt of the subject, with "a dog" that of the base model. Where the
    template has an article for them, the words lose theirs: "a photo of a red {}" becomes "a photo of a red dog".
    """
    if _awaits_noun(template.partition(PLACEHOLDER)[0]):
        words = re.sub(r"^(?:an?|the) ", "", words, flags=re.IGNORECASE)
    return template.replace(PLACEHOLDER, words)


def _awaits_noun(text: str) -> bool:
    """Tell whether a text ends in a noun phrase that has no noun yet: an article, and maybe adjectives."""
    *before, adjectives = ARTICLE.split(BREAK.split(text)[-1])
    return bool(before) and not END.search(adjectives)


def templates_of(root: Path, file: str) -> list[Template]:
    """Read evaluation prompts of a project, in data/prompts, as `load_templates` does.

    Raises:
        EvaluationError: as it does; or DVC would not see it if they were changed.
    """
    if hidden := hidden_by_link(root / "data/prompts", (root / file).parent):
        raise EvaluationError(f"evaluate.prompts: {hidden}")
    return load_templates(root / file)


def load_templates(path: Path) -> list[Template]:
    """Read evaluation prompts: a CSV with the columns kind and prompt, each prompt with one {}.

    Raises:
        EvaluationError: a missing file or column, an unknown kind, a prompt without {} or that stands twice.
    """
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist; write a CSV with the columns kind and prompt")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: {error}; write a CSV in UTF-8") from None
    faults = [fault for row in rows for fault in _faults(row)]
    texts = [row.get("prompt") for row in rows]
    faults += [f"the prompt {text!r} stands twice" for text in dict.fromkeys(texts) if texts.count(text) > 1]
    if faults or not rows:
        raise EvaluationError(f"{path}: {'; '.join(faults) or 'has no prompts under a first line kind,prompt'}")
    return [Template(row["kind"], row["prompt"]) for row in rows]


def choose(templates: Sequence[Template], count: int | None) -> list[Template]:
    """Take `count` prompts, each kind in its share (largest remainder), the first of each, in their order.

    Equal remainders go to the kind that comes first. None, or more than there are, takes all.
    """
    if count is None or count >= len(templates):
        return list(templates)
    kinds = Counter(template.kind for template in templates)
    shares = {kind: count * number / len(templates) for kind, number in kinds.items()}
    room = {kind: int(share) for kind, share in shares.items()}
    by_remainder = sorted(shares, key=lambda kind: room[kind] - shares[kind])
    for kind in by_remainder[: count - sum(room.values())]:
        room[kind] += 1
    chosen = []
    for template in templates:
        if room[template.kind] > 0:
            room[template.kind] -= 1
            chosen.append(template)
    return chosen


def _faults(row: dict[str | Any, Any]) -> Iterator[str]:
    if set(row) != {"kind", "prompt"}:
        yield f"{list(row.values())} is not kind,prompt (quotes around a prompt with a comma)"
        return
    if row["kind"] not in KINDS:
        yield f"kind {row['kind']!r} is none of {', '.join(KINDS)}"
    if (row["prompt"] or "").lstrip().startswith(("=", "+", "-", "@")):
        yield f"the prompt {row['prompt']!r} begins with = + - or @, which spreadsheets run"
    if (row["prompt"] or "").count(PLACEHOLDER) != 1:
        yield f"the prompt {row['prompt']!r} should have one {{}}"
    elif re.search(r"\ban? \{\}", row["prompt"], re.IGNORECASE):
        yield f"the prompt {row['prompt']!r} should have {{}} without a or an: a class noun brings its own"

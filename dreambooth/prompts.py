"""The sentences a model is trained and tested with, made from an identifier and a class noun."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from dreambooth.errors import EvaluationError

PLACEHOLDER = "{}"
KINDS = ("recontextualisation", "property", "accessory")


class Template(NamedTuple):
    """An evaluation prompt with a {} for the subject, and what it tests."""

    kind: str
    prompt: str


def instance_prompt(identifier: str, class_noun: str) -> str:
    """Name the subject: "a photo of sks dog" (Ruiz et al. 2022, section 3.2)."""
    return f"a photo of {identifier} {class_noun}"


def class_prompt(class_noun: str) -> str:
    """Name the class: "a photo of a dog"."""
    return f"a photo of {with_article(class_noun)}"


def with_article(noun: str) -> str:
    """Put a or an before a noun, by its first letter."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def fill(template: str, words: str) -> str:
    """Put the words for a subject or a class where a template has {}.

    "a photo of {} in space" with "sks dog" is the prompt of the subject, with "a dog" that of the base model.
    """
    return template.replace(PLACEHOLDER, words)


def load_templates(path: Path) -> list[Template]:
    """Read evaluation prompts: a CSV with the columns kind and prompt, each prompt with one {}.

    Raises:
        EvaluationError: a missing file or column, an unknown kind, a prompt without {} or that stands twice.
    """
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist; write a CSV with the columns kind and prompt")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    missing = {"kind", "prompt"} - set(table.columns)
    if missing:
        raise EvaluationError(f"{path}: no column {', '.join(sorted(missing))}; the first line should be kind,prompt")
    faults = [f"kind {kind!r} is none of {', '.join(KINDS)}" for kind in table["kind"] if kind not in KINDS]
    faults += [f"the prompt {text!r} should have one {{}}" for text in table["prompt"] if text.count(PLACEHOLDER) != 1]
    faults += [f"the prompt {text!r} stands twice" for text in table["prompt"][table["prompt"].duplicated()]]
    if faults or table.empty:
        raise EvaluationError(f"{path}: {'; '.join(faults) or 'has no prompts'}")
    return [Template(kind, prompt) for kind, prompt in zip(table["kind"], table["prompt"], strict=True)]

"""The evaluation prompts: their grammar, and the lists in data/prompts."""

import re
from collections import Counter
from pathlib import Path

import pytest
from tiny_project import REPOSITORY

from dreambooth.errors import EvaluationError
from dreambooth.prompts import fill, load_templates

PROMPTS = REPOSITORY / "data/prompts"
COUNTS = {
    "live": {"recontextualisation": 10, "accessory": 10, "property": 5},
    "object": {"recontextualisation": 20, "property": 5},
}
LISTS = [(scale, kind) for scale in ("bundled", "photo") for kind in COUNTS]


@pytest.mark.parametrize(
    ("template", "subject", "base"),
    [
        ("a photo of {} in space", "a photo of sks dog in space", "a photo of a dog in space"),
        ("a photo of a red {}", "a photo of a red sks dog", "a photo of a red dog"),
        ("A photo of a Bright red {}", "A photo of a Bright red sks dog", "A photo of a Bright red dog"),
        ("the {} on a beach", "the sks dog on a beach", "the dog on a beach"),
        ("a red ball next to {}", "a red ball next to sks dog", "a red ball next to a dog"),
        ("{}", "sks dog", "a dog"),
    ],
)
def test_subject_has_one_article_or_none(template: str, subject: str, base: str) -> None:
    assert fill(template, "sks dog") == subject
    assert fill(template, "a dog") == base


def test_article_of_a_class_noun_goes_whatever_it_is() -> None:
    assert fill("a photo of a red {}", "an owl") == "a photo of a red owl"
    assert fill("a photo of {}", "an owl") == "a photo of an owl"
    assert fill("a photo of a red {}", "anteater") == "a photo of a red anteater"


def test_article_right_before_the_subject_is_refused(tmp_path: Path) -> None:
    (tmp_path / "live.csv").write_text("kind,prompt\nproperty,a photo of a {} in space\n")
    with pytest.raises(EvaluationError, match=r"without a or an"):
        load_templates(tmp_path / "live.csv")


@pytest.mark.parametrize(("scale", "kind"), LISTS)
def test_list_has_the_counts_of_the_paper_and_no_doubles(scale: str, kind: str) -> None:
    templates = load_templates(PROMPTS / scale / f"{kind}.csv")
    assert Counter(template.kind for template in templates) == COUNTS[kind]
    assert len({template.prompt for template in templates}) == 25


@pytest.mark.parametrize(("scale", "kind"), LISTS)
def test_property_changes_the_subject_and_nothing_else(scale: str, kind: str) -> None:
    for template in load_templates(PROMPTS / scale / f"{kind}.csv"):
        is_property = re.fullmatch(r"a photo of an? [a-z -]+ \{\}", template.prompt) is not None
        assert is_property == (template.kind == "property"), template.prompt
        assert ("wearing" in template.prompt) == (template.kind == "accessory"), template.prompt

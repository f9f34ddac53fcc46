"""The evaluation prompts: their grammar, and the lists in data/prompts."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from tiny_project import REPOSITORY

from dreambooth.errors import EvaluationError, ModelError, PhotosError
from dreambooth.identifiers import reader_at
from dreambooth.prompts import (
    Reader,
    cuts,
    fill,
    load_templates,
    read_caption,
    require_read,
    templates_of,
    with_article,
)
from dreambooth.vocabulary import VOCABULARY, read_vocabulary

PROMPTS = REPOSITORY / "data/prompts"
COUNTS = {
    "live": {"recontextualisation": 10, "accessory": 10, "property": 5},
    "object": {"recontextualisation": 20, "property": 5},
}
LISTS = [(scale, kind) for scale in ("bundled", "photo") for kind in COUNTS]


def test_a_prompt_that_is_cut_before_its_subject_is_refused_and_one_that_is_cut_after_it_is_told() -> None:
    reader = Reader(lambda text: len(text.split()), room=6)
    whole, end, lost = "a photo of {} in snow", "a photo of {} in the deep snow", "in the deep white snow sits {}"
    assert list(cuts([("a.txt", whole)], "sks dog", reader)) == [
        (
            "a.txt: has 7 tokens, and the base reads 6: the end has no effect; shorten it: 'a photo of {} in snow'",
            False,
        )
    ]
    assert list(cuts([("a.txt", whole)], "dog", reader)) == []
    found = list(cuts([("a.txt", end), ("b.txt", lost)], "sks dog", reader))
    assert [cut.loses_subject for cut in found] == [False, True]
    with pytest.raises(PhotosError) as refused:
        require_read(found, PhotosError)
    assert refused.value.problems == (
        "b.txt: 'sks dog' ends at token 8, and the base reads 6; put {} near the beginning: "
        "'in the deep white snow sits {}'",
    )
    assert require_read(found[:1], PhotosError) == [found[0].text]


def test_the_files_of_a_tokenizer_say_how_much_it_reads() -> None:
    reader = reader_at(REPOSITORY / "data/base/emoji64/tokenizer")
    assert reader is not None
    assert (reader.room, reader.count("a dog " * 100)) == (30, 200)
    assert reader_at(REPOSITORY) is reader_at(None) is None


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


@pytest.mark.parametrize(
    "template",
    [
        *("a photo of a child holding {}", "a child gently holding {}", "an oil painting showing {}"),
        *("a bird flying above {}", "a cat between {} and a tree", "a view through {}", "a child who has {}"),
        *("a close-up, {}", "a close-up, in color, {}", "an elephant and {}", "wearing the hat of {}"),
    ],
)  # fmt: skip
def test_a_noun_phrase_that_has_its_noun_takes_no_article_from_the_subject(template: str) -> None:
    assert fill(template, "a dog") == template.replace("{}", "a dog")


@pytest.mark.parametrize(
    "template",
    [
        *("a see-through {}", "a photo of a round {}", "a big, red {}", "a shiny golden {}", "a soaking-wet {}"),
        *("a sleeping {}", "a brightly glowing {}", "a red, glowing {}", "a glowing red {}", "a red string {}"),
    ],
)  # fmt: skip
def test_a_noun_phrase_of_adjectives_alone_has_the_article_of_the_subject_already(template: str) -> None:
    assert fill(template, "a dog") == template.replace("{}", "dog")


@pytest.mark.parametrize(("scale", "kind"), LISTS)
def test_of_the_lists_those_of_a_property_alone_have_an_article_for_the_subject(scale: str, kind: str) -> None:
    """Class images are kept by their prompts: other words for the same template would draw them again."""
    for template in load_templates(PROMPTS / scale / f"{kind}.csv"):
        noun = "dog" if template.kind == "property" else "a dog"
        assert fill(template.prompt, "a dog") == template.prompt.replace("{}", noun)


def test_article_of_a_class_noun_goes_whatever_it_is() -> None:
    assert fill("a photo of a red {}", "an owl") == "a photo of a red owl"
    assert fill("a photo of {}", "an owl") == "a photo of an owl"
    assert fill("a photo of a red {}", "anteater") == "a photo of a red anteater"


@pytest.mark.parametrize(
    "phrase",
    [
        *("an hourglass", "an heirloom", "an honest face", "an honour", "an X-ray", "an x-ray machine"),
        *("a unicorn", "a Uniform", "a used car", "a usual chair", "a utensil", "a utopia", "a ukulele", "a uranium"),
        *("a UFO", "a USB stick", "a euphonium", "a European bison", "a ewe", "a one-eyed cat", "a onesie", "a ouija"),
        *("an unidentified bird", "an unmade bed", "an uninvited guest", "an umbrella", "an usher", "an urn"),
        *("an onion", "an onerous dog", "an udder", "an urchin", "a horse", "a house", "a herd", "a hoodie"),
    ],
)  # fmt: skip
def test_the_article_of_a_noun_is_that_of_its_sound(phrase: str) -> None:
    assert with_article(phrase.partition(" ")[2]) == phrase


def test_words_of_the_bundled_model_that_had_the_right_article_keep_it() -> None:
    """Class images are kept by their prompts: all others are not drawn again."""
    path = REPOSITORY / "data/base/scorer" / VOCABULARY
    content = json.loads(path.read_text())
    by_letter = {word: f"{'an' if word[0] in 'aeiou' else 'a'} {word}" for word in content["phrases"]}
    changed = {word for word, phrase in by_letter.items() if with_article(word) != phrase}
    assert changed == {"unicorn", "ewe", "hourglass done"}


def test_the_mark_that_editors_of_windows_write_first_is_no_part_of_captions_and_prompts(tmp_path: Path) -> None:
    (tmp_path / "00.txt").write_text("a photo of {} in a park", encoding="utf-8-sig")
    assert read_caption(tmp_path / "00.txt") == "a photo of {} in a park"
    (tmp_path / "live.csv").write_text("kind,prompt\nproperty,a red {}\n", encoding="utf-8-sig")
    assert load_templates(tmp_path / "live.csv") == [("property", "a red {}")]


def test_article_right_before_the_subject_is_refused(tmp_path: Path) -> None:
    (tmp_path / "live.csv").write_text("kind,prompt\nproperty,a photo of a {} in space\n")
    with pytest.raises(EvaluationError, match=r"without a or an"):
        load_templates(tmp_path / "live.csv")


def test_prompts_behind_a_link_are_refused_for_dvc_sees_no_change_of_them(tmp_path: Path) -> None:
    (tmp_path / "data/prompts").mkdir(parents=True)
    (tmp_path / "data/prompts/mine").symlink_to(PROMPTS / "bundled")
    with pytest.raises(
        EvaluationError, match=r"^evaluate\.prompts: .*/prompts/mine is a link to a folder.*copy it there"
    ):
        templates_of(tmp_path, "data/prompts/mine/live.csv")


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


@pytest.mark.parametrize(("kind", "noun"), [("live", "dog"), ("live", "cat"), ("object", "backpack")])
def test_bundled_prompts_are_within_the_vocabulary_of_the_bundled_scorer(kind: str, noun: str) -> None:
    path = REPOSITORY / "data/base/scorer" / VOCABULARY
    vocabulary = read_vocabulary(path.read_bytes(), path)
    for template in load_templates(PROMPTS / "bundled" / f"{kind}.csv"):
        bag = vocabulary.bag(fill(template.prompt, with_article(noun)))
        assert len(bag) >= 2, template.prompt


def test_photo_prompts_are_not_those_of_the_bundled_model() -> None:
    for kind in COUNTS:
        bundled, photo = (
            {t.prompt for t in load_templates(PROMPTS / scale / f"{kind}.csv")} for scale in ("bundled", "photo")
        )
        assert not bundled & photo


@pytest.mark.threat(1, 9)
def test_a_caption_that_never_ends_or_is_a_whole_disk_is_refused_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "large.txt").touch()
    os.truncate(tmp_path / "large.txt", 10**12)
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    for name, said in (("large.txt", "has more than 1048576 bytes"), ("endless.txt", "is no file")):
        with pytest.raises(
            PhotosError, match=rf"{name}: the caption cannot be read .*{said}.*; write one line in UTF-8"
        ):
            read_caption(tmp_path / name)


@pytest.mark.fault(27)
@pytest.mark.parametrize("torn", ["tokenizer.json", "vocab.json"])
def test_a_torn_tokenizer_is_told_with_its_folder(tmp_path: Path, torn: str) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", torn):
        (tmp_path / name).write_text("{")
    with pytest.raises(ModelError, match=f"{tmp_path} holds no tokenizer .*; fetch the model again"):
        reader_at(tmp_path)

"""The training of the image-text scorer: losses in closed form, its words, and a toy run from pictures to a card."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from base import autoencoder, hands, recipe, scorer
from base.recipe import Recipe
from base.sprites import Sprites
from dreambooth.scorer import text_rows
from dreambooth.vocabulary import Vocabulary, read_vocabulary

NEVER = torch.zeros(2, 2, dtype=torch.bool)


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    wide = hands.more_nouns(recipe.load(), 1.0)
    return read_vocabulary(scorer.as_bytes(scorer.vocabulary(wide)), Path("vocabulary.json"))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_info_nce_of_equal_cosines_is_the_logarithm_of_the_batch(count: int) -> None:
    never = torch.zeros(count, count, dtype=torch.bool)
    assert scorer.info_nce(torch.zeros(count, count), 0.1, never).item() == pytest.approx(math.log(count))


def test_info_nce_by_hand() -> None:
    # rows: log(1 + e^-2), log(1 + e^-1); columns: log(1 + e^-1), log(1 + e^-2), at temperature 1/2
    cosines = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    assert scorer.info_nce(cosines, 0.5, NEVER).item() == pytest.approx(expected)


def test_info_nce_leaves_out_what_is_ignored() -> None:
    ignored = torch.tensor([[False, True], [True, False]])
    assert scorer.info_nce(torch.tensor([[0.1, 0.9], [0.9, 0.1]]), 0.1, ignored).item() == pytest.approx(0)


def test_text_that_says_less_of_the_same_is_no_wrong_answer() -> None:
    bags = torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 0, 1]])
    # text 1 is in texts 0 and 2; nothing else is contained; a text is its own right answer
    expected = torch.tensor([[False, True, False], [False, False, False], [False, True, False]])
    assert torch.equal(scorer.also_true(bags), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_swapped_is_the_cosine_of_the_changed_text(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(count, 4, generator=generator), dim=1)
    rest, candidates = torch.randn(count, 4, generator=generator), torch.randn(5, 4, generator=generator)
    expected = F.cosine_similarity(images[:, None], rest[:, None] + candidates[None], dim=2)
    torch.testing.assert_close(scorer.swapped(images, rest, candidates), expected)


def test_hard_negatives_by_hand() -> None:
    tokens = torch.eye(2)
    # the picture lies on token 0: cosines 1 and 0, cross entropy log(1 + e^-1) at temperature 1
    got = scorer.hard_negatives(tokens[:1], torch.tensor([[1.0, 0.0]]), tokens, [0, 1], 1.0, 0.0)
    assert got.item() == pytest.approx(math.log1p(math.exp(-1)))


def test_hard_negatives_of_a_group_that_no_text_names_are_zero() -> None:
    assert scorer.hard_negatives(torch.eye(2), torch.zeros(2, 2), torch.eye(2), [0, 1], 1.0, 0.0).item() == 0


def test_every_caption_of_the_recipe_is_understood(words: Vocabulary) -> None:
    values = recipe.load()
    for colour in values.colours:
        for phrase in ("on a {} background", "in front of a {} wall"):
            assert words.parse(f"a photo of a dog {phrase.format(colour)}") == (
                ["noun: dog", f"background: {colour}"],
                [],
            )
    for text, token in (
        ("a dog in space", "scene: in space"),
        ("a blue dog", "colour: blue"),
        ("an orange cat", "colour: orange"),
        ("a large dog", "size: large"),
        ("a 3d dog", "style: 3d"),
        ("a dog wearing a top hat", "wearing: a top hat"),
        ("a dog next to an apple", "next to: an apple"),
        ("a drawing of a teddy bear", "noun: teddy bear"),
    ):
        found, unknown = words.parse(text)
        assert token in found, text
        assert unknown == [], text


def test_sunglasses_that_are_worn_are_not_those_that_are_shown(words: Vocabulary) -> None:
    assert words.parse("sunglasses on a beach")[0] == ["noun: sunglasses", "scene: on a beach"]
    assert words.parse("a dog wearing sunglasses")[0] == ["noun: dog", "wearing: sunglasses"]


def test_groups_part_all_tokens(words: Vocabulary) -> None:
    numbers = [number for group in scorer.groups(words) for number in group]
    assert sorted(numbers) == list(range(len(words.tokens)))
    assert all(len(group) > 1 for group in scorer.groups(words))


def test_right_among_counts_wins_over_the_drawn_ones() -> None:
    cosines = torch.tensor([[0.9, 0.1, 0.2], [0.9, 0.1, 0.2], [0.1, 0.3, 0.2]])
    assert scorer.right_among(cosines, torch.tensor([0, 1, 1]), 3, 0) == pytest.approx(2 / 3)


def test_held_out_hand_is_never_drawn_in_training(by_three_hands: tuple[Recipe, Sprites]) -> None:
    values, drawn = by_three_hands
    wide, theirs = scorer.training_hands(values, drawn)
    assert {sprite.package for sprite in theirs.table} == {"alpha", "beta"}
    assert "giraffe" in wide.nouns
    measured, todo = scorer.held_out(values, drawn)
    assert {sprite.package for sprite in measured.table} == {"gamma"}
    assert len(todo) == values.scorer.held_out_rows


def test_features_are_read_where_the_same_pictures_were_seen(tmp_path: Path) -> None:
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    first = scorer.features(iter(images), 2, tmp_path)
    (file,) = tmp_path.iterdir()
    changed = file.stat().st_mtime_ns
    assert torch.equal(scorer.features(iter(images), 2, tmp_path), first)
    assert file.stat().st_mtime_ns == changed
    scorer.features(iter(images[::-1]), 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_training_puts_pictures_near_their_words_and_is_reproducible(words: Vocabulary) -> None:
    section = recipe.load().scorer.model_copy(
        update={"learning_rate": 1e-2, "dropout": 0.0, "steps": 80, "batch_size": 32, "hidden_size": 32, "width": 16}
    )
    bags = torch.zeros(64, len(words.tokens))
    nouns = torch.arange(64) % 4
    bags[torch.arange(64), nouns] = 1
    rows = F.one_hot(nouns, 4).float() + 0.1 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    first, second = (scorer.train(rows, bags, words, section) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    cosines = scorer.image_rows(rows, first) @ text_rows(torch.eye(len(words.tokens)), first["tokens"])[:4].T
    assert (cosines.argmax(1) == nouns).float().mean() == 1


def test_toy_run_writes_a_scorer_that_loads_and_its_card(
    by_three_hands: tuple[Recipe, Sprites], tmp_path: Path
) -> None:
    values, drawn = by_three_hands
    model = tmp_path / "model"
    autoencoder.build(values.autoencoder, values.resolution).save_pretrained(model / "vae")
    made = scorer.make(values, drawn, model, tmp_path / "scorer", tmp_path / "cache")
    made |= scorer.measured_on_held_out(values, drawn, tmp_path / "scorer", tmp_path / "cache")
    (tmp_path / "scorer" / scorer.MEASURED).write_text(json.dumps(made))
    text = scorer.card(values, tmp_path / "scorer")
    for name, package in values.packages.items():
        assert name in text
        assert package.attribution in text
    for noun in values.nouns:
        assert noun in text
    assert made["sharp"]["pictures"] == values.scorer.held_out_rows
    assert -1 <= made["soft"]["cosine_all_wrong"] <= 1
    assert made["sharp"]["noun_right"] != made["sharp"]["cosine_right"]


def test_a_share_of_the_pictures_went_through_the_autoencoder(by_three_hands: tuple[Recipe, Sprites]) -> None:
    values, drawn = by_three_hands
    values = values.model_copy(update={"scorer": values.scorer.model_copy(update={"decoded_share": 0.5})})
    vae = autoencoder.build(values.autoencoder, values.resolution).eval()
    todo = scorer.plans(values, drawn, 80)
    soft = list(scorer.painted(drawn, todo, values.resolution, values.scorer.seed))
    made = list(scorer.spoiled(drawn, todo, vae, values))
    changed = [one.tobytes() != other.tobytes() for one, other in zip(soft, made, strict=True)]
    assert 20 <= sum(changed) <= 60

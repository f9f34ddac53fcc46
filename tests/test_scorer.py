"""The image-text scorer: what its parser understands, what it refuses, and rows that depend on the input alone."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_project import REPOSITORY

from dreambooth import scorer
from dreambooth.encoders import Lite0Encoder, lite0_pooled
from dreambooth.errors import EvaluationError, ModelError, UnknownWordError
from dreambooth.scorer import BundledScorer, image_rows, one_hot, text_rows
from dreambooth.vocabulary import VOCABULARY, Vocabulary, read_vocabulary

FEATURES, HIDDEN, WIDTH = 1280 + 3136, 8, 6
WORDS = {
    "tokens": ["dog", "teddy bear", "bear", "red", "on red", "on a beach", "wearing a top hat", "small"],
    "phrases": {
        "photo": None,
        "of": None,
        "dog": "dog",
        "bear": "bear",
        "teddy bear": "teddy bear",
        "red": "red",
        "small": "small",
        "on a red background": "on red",
        "in front of a red wall": "on red",
        "on a beach": "on a beach",
        "wearing a top hat": "wearing a top hat",
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scorer with random weights."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    (tmp_path / VOCABULARY).write_text(json.dumps(WORDS))
    tensors = {
        "mean": rows(FEATURES), "scale": rows(FEATURES).abs(), "hidden.weight": rows(HIDDEN, FEATURES),
        "hidden.bias": rows(HIDDEN), "out.weight": rows(WIDTH, HIDDEN), "out.bias": rows(WIDTH),
        "tokens": rows(len(WORDS["tokens"]), WIDTH),
    }  # fmt: skip
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / scorer.WEIGHTS)
    return tmp_path


@pytest.fixture
def vocabulary() -> Vocabulary:
    return read_vocabulary(json.dumps(WORDS).encode(), Path("vocabulary.json"))


def names(vocabulary: Vocabulary, prompt: str) -> set[str]:
    return {vocabulary.tokens[number] for number in vocabulary.bag(prompt)}


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (64, 48), colour) for colour in ("red", "white", "navy")]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a photo of a dog", {"dog"}),
        ("A photo of the dog, on the beach.", {"dog", "on a beach"}),
        ("a teddy bear", {"teddy bear"}),
        ("a bear", {"bear"}),
        ("a small red dog in front of a red wall", {"small", "red", "dog", "on red"}),
        ("a dog wearing a top hat on a red background", {"dog", "wearing a top hat", "on red"}),
    ],
)
def test_longest_phrase_wins_and_articles_carry_nothing(vocabulary: Vocabulary, prompt: str, found: set[str]) -> None:
    assert names(vocabulary, prompt) == found


def test_colour_of_the_subject_is_another_token_than_that_of_the_background(vocabulary: Vocabulary) -> None:
    assert names(vocabulary, "a red dog") == {"red", "dog"}
    assert names(vocabulary, "a dog on a red background") == {"on red", "dog"}


def test_unknown_words_are_all_named_in_a_refusal_to_score(vocabulary: Vocabulary) -> None:
    with pytest.raises(UnknownWordError, match="'purple', 'giraffe' in 'a purple giraffe on a beach'") as refused:
        vocabulary.bag("a purple giraffe on a beach")
    assert isinstance(refused.value, EvaluationError)


def test_half_a_phrase_is_unknown(vocabulary: Vocabulary) -> None:
    assert vocabulary.parse("a dog on a red boat") == (["dog", "red"], ["on", "boat"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_unit_row_a_picture_and_a_prompt_in_order(folder: Path, count: int) -> None:
    judge = BundledScorer(folder)
    images, prompts = pictures()[:count], ["a dog", "a red dog", "a bear on a beach"][:count]
    rows, texts = judge.embed_images(images, batch_size=2), judge.embed_texts(prompts)
    assert rows.shape == texts.shape == (count, WIDTH)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(count))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(count))
    for k in range(count):
        torch.testing.assert_close(judge.embed_images([images[k]])[0], rows[k], atol=1e-5, rtol=0)
        torch.testing.assert_close(judge.embed_texts([prompts[k]])[0], texts[k])


def test_same_weights_same_rows_and_the_order_of_words_does_not_matter(folder: Path) -> None:
    first, second = BundledScorer(folder), BundledScorer(folder)
    assert torch.equal(first.embed_images(pictures()), second.embed_images(pictures()))
    assert torch.equal(first.embed_texts(["a dog on a beach"]), second.embed_texts(["on a beach, a dog"]))
    assert first.revision == second.revision


def test_one_lite0_pass_serves_the_scorer_and_the_identity(folder: Path) -> None:
    judge, encoder, features = BundledScorer(folder), Lite0Encoder(), lite0_pooled(pictures())
    assert torch.equal(judge.embed_features(features), judge.embed_images(pictures()))
    assert torch.equal(encoder.embed_features(features), encoder.embed(pictures()))


def test_other_weights_or_another_vocabulary_are_another_revision(folder: Path) -> None:
    before = BundledScorer(folder).revision
    tensors = load_file(folder / scorer.WEIGHTS)
    save_file(tensors | {"tokens": tensors["tokens"] * 2}, folder / scorer.WEIGHTS)
    assert (changed := BundledScorer(folder).revision) != before
    words = json.loads((folder / VOCABULARY).read_text())
    words["phrases"]["drawing"] = None
    (folder / VOCABULARY).write_text(json.dumps(words))
    assert BundledScorer(folder).revision not in {before, changed}


def test_prompt_that_says_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(EvaluationError, match="says nothing"):
        BundledScorer(folder).embed_texts(["a dog", "a photo of a"])


def test_no_pictures_and_pictures_that_are_not_rgb_are_refused(folder: Path) -> None:
    judge = BundledScorer(folder)
    with pytest.raises(ValueError, match="no pictures"):
        judge.embed_images([])
    with pytest.raises(ValueError, match="mode L"):
        judge.embed_images([Image.new("L", (8, 8))])


def test_missing_files_are_named_with_the_next_step(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"vocabulary\.json .*No such file.*dvc repro base/dvc\.yaml:scorer"):
        BundledScorer(tmp_path / "nowhere")
    (folder / scorer.WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"scorer\.safetensors .*No such file"):
        BundledScorer(folder)


@pytest.mark.parametrize("kept", [0, 5, 200])
def test_torn_weights_are_refused(folder: Path, kept: int) -> None:
    path = folder / scorer.WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=rf"\({kept} bytes\) cannot be read as weights"):
        BundledScorer(folder)


def test_missing_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / scorer.WEIGHTS)
    del tensors["out.bias"]
    save_file(tensors, folder / scorer.WEIGHTS)
    with pytest.raises(ModelError, match=r"lacks \['out\.bias'\]"):
        BundledScorer(folder)


def test_tokens_without_a_row_are_refused(folder: Path) -> None:
    tensors = load_file(folder / scorer.WEIGHTS)
    save_file(tensors | {"tokens": tensors["tokens"][:-1].clone()}, folder / scorer.WEIGHTS)
    with pytest.raises(ModelError, match=r"7 rows in scorer\.safetensors for 8 tokens"):
        BundledScorer(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tokens": ["a"], "phrases": ["a"]}', "\xff"])
def test_damaged_vocabulary_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match=r"vocabulary\.json cannot be read as a vocabulary"):
        read_vocabulary(text.encode("latin-1"), Path("vocabulary.json"))


def test_phrase_for_a_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match=r"stand for \['cat'\]"):
        read_vocabulary(b'{"tokens": ["dog"], "phrases": {"cat": "cat"}}', Path("vocabulary.json"))


def test_text_rows_by_hand() -> None:
    tokens = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, -2.0]])
    bags = one_hot([frozenset({0, 1}), frozenset({1, 2})], 3)
    torch.testing.assert_close(text_rows(bags, tokens), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_image_rows_by_hand() -> None:
    weights = {
        "mean": torch.tensor([1.0, 0.0]), "scale": torch.tensor([2.0, 1.0]),
        "hidden.weight": torch.eye(2), "hidden.bias": torch.tensor([0.0, 1.0]),
        "out.weight": torch.tensor([[1.0, 0.0], [0.0, 4.0]]), "out.bias": torch.zeros(2),
    }  # fmt: skip
    # (2.5, 0): standardised (3, 0), hidden (3, 1), out (3, 4); (0, -5): standardised (-2, -5), hidden (0, 0)
    rows = image_rows(torch.tensor([[2.5, 0.0], [0.0, -5.0]]), weights)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


# --- the scorer in git

CONTEXTS = {
    "biscuit": ("dog", ["on a blue background", "in a park", "on a beach", "on a yellow background", "in a city"]),
    "chime": (
        "clock",
        ["on a green background", "in space", "on a white background", "on a snowy mountain", "on a purple background"],
    ),
}
"""What is on the pictures of the demo subjects, drawings that the scorer never saw (base/params.yaml)."""


@pytest.mark.parametrize("subject", CONTEXTS)
def test_bundled_scorer_prefers_what_is_on_the_demo_pictures(subject: str) -> None:
    noun, contexts = CONTEXTS[subject]
    images = [
        Image.open(path).convert("RGB") for path in sorted((REPOSITORY / "data/subjects" / subject).glob("*.png"))
    ]
    bundled = BundledScorer(REPOSITORY / "data/base/scorer")
    rows = bundled.embed_images(images)
    right = bundled.embed_texts([f"a photo of a {noun} {context}" for context in contexts])
    wrong_noun = bundled.embed_texts([f"a photo of a banana {context}" for context in contexts])
    wrong_context = bundled.embed_texts([f"a photo of a {noun} on a bridge at night"] * len(contexts))
    cosines = (rows * right).sum(1)
    assert (cosines > (rows * wrong_noun).sum(1)).all()
    assert (cosines > (rows * wrong_context).sum(1)).all()


def test_bundled_scorer_is_small_enough_for_git() -> None:
    assert (REPOSITORY / "data/base/scorer" / scorer.WEIGHTS).stat().st_size < 4_000_000

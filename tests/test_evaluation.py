"""The comparison: the same prompts and noise for both models, averaged over seeds, then over prompts."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from dreambooth import evaluation
from dreambooth.errors import EvaluationError, PhotosError
from dreambooth.evaluation import cases, comparison_grid, score, summarise, verdict
from dreambooth.prompts import Template, class_prompt, instance_prompt, load_templates, read_caption, with_article

TEMPLATES = [Template("recontextualisation", "a photo of {} in space"), Template("property", "a red {}")]
PLACES = [Template("recontextualisation", f"a photo of {{}} in place {i}") for i in range(3)]


class ColourEncoder:
    """Embeds a picture as its mean colour: cosines that can be told by hand."""

    name, revision, transform = "colour", "1", "mean"

    def embed(self, images: Sequence[Image.Image], batch_size: int = 16) -> torch.Tensor:
        pixels = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
        return torch.nn.functional.normalize(torch.tensor(pixels, dtype=torch.float32), dim=1)


def plain(*colours: tuple[int, int, int]) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), colour) for colour in colours]


def test_both_models_get_the_same_noise_and_their_own_words() -> None:
    found = cases([*PLACES], "sks", "teddy bear", [3, 4])
    assert len(found) == 6
    assert found[0].base_prompt == "a photo of a teddy bear in place 0"
    assert found[0].personalised_prompt == "a photo of sks teddy bear in place 0"
    assert len({case.noise_seed for case in found}) == 6


def test_too_few_prompts_are_refused_before_anything_is_drawn() -> None:
    with pytest.raises(EvaluationError, match="1 prompts count"):
        cases(TEMPLATES, "sks", "dog", [1])


def test_identity_is_averaged_over_seeds_then_prompts_and_property_prompts_stay_out() -> None:
    todo = cases([*PLACES[:2], TEMPLATES[1]], "sks", "dog", [1, 2])
    red, green = (255, 0, 0), (0, 255, 0)
    photos = plain(red, red)
    base = plain(*[green] * 6)
    personalised = plain(red, green, red, red, green, green)
    scores = score(todo, base, personalised, photos, ColourEncoder())
    metrics = summarise(scores, photos, ColourEncoder(), 0.95)
    assert metrics["identity"]["base"] == pytest.approx(0)
    assert metrics["identity"]["personalised"] == pytest.approx((0.5 + 1) / 2)
    assert metrics["identity"]["gain"] == pytest.approx(0.75)
    assert metrics["identity"]["ceiling"] == pytest.approx(1)
    assert metrics["prompts"] == 2


@pytest.mark.parametrize(
    ("low", "high", "prompts", "said"),
    [
        (0.1, 0.2, 8, "nearer to the subject"),
        (-0.2, -0.1, 8, "farther from the subject"),
        (-0.1, 0.1, 8, "not told apart"),
        (0.1, 0.2, 3, "too few prompts"),
    ],
)
def test_the_verdict_says_what_the_interval_says(low: float, high: float, prompts: int, said: str) -> None:
    identity = {"gain": (low + high) / 2, "low": low, "high": high}
    assert said in verdict({"identity": identity, "prompts": prompts})


def test_the_grid_has_a_row_a_prompt_below_the_photos() -> None:
    todo = cases(PLACES, "sks", "dog", [1, 2])
    pictures = plain(*[(10 * i, 0, 0) for i in range(6)])
    scores = pd.DataFrame({"identity_base": [0.1] * 6, "identity": [0.2] * 6})
    short = comparison_grid(todo[:4], pictures[:4], pictures[:4], pictures[:3], scores)
    tall = comparison_grid(todo, pictures, pictures, pictures[:3], scores)
    assert tall.width == short.width
    assert tall.height > short.height + evaluation.GRID_TILE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind,prompt\nrecontextualisation,a dog", r"should have one {}"),
        ("kind,prompt\nplace,a {}", "kind 'place' is none of"),
        ("kind,prompt\nproperty,a {}\nproperty,a {}", "stands twice"),
        ("kind,prompt\n", "has no prompts"),
        ("prompt\na {}", "is not kind,prompt"),
        ("kind,prompt\nproperty,a {}, red", "quotes around a prompt with a comma"),
        ("", "has no prompts"),
    ],
)
def test_a_faulty_prompt_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "live.csv").write_text(text)
    with pytest.raises(EvaluationError, match=said):
        load_templates(tmp_path / "live.csv")


def test_prompts_are_the_sentences_of_the_paper() -> None:
    assert instance_prompt("sks", "teddy bear") == "a photo of sks teddy bear"
    assert instance_prompt("sks", "dog", "a drawing of {} in space") == "a drawing of sks dog in space"
    assert class_prompt("dog") == "a photo of a dog"
    assert class_prompt("elephant") == "a photo of an elephant"
    assert with_article("apple") == "an apple"


@pytest.mark.parametrize("text", [b"a photo in a park", b"{} beside {}", b"{} \xff", b"{}" + b"a" * 1000])
def test_a_faulty_caption_is_refused_with_its_file(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "00.txt").write_bytes(text)
    with pytest.raises(PhotosError, match=r"00\.txt: the caption"):
        read_caption(tmp_path / "00.txt")


def test_a_caption_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "00.txt").write_text("a photo of {}\n  in a park\n")
    assert read_caption(tmp_path / "00.txt") == "a photo of {} in a park"

"""The comparison: the same prompts and noise for all models, averaged over seeds, then over prompts."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from tiny_project import REPOSITORY, make_photo

from dreambooth.encoders import ImageTextEncoder, Lite0Encoder
from dreambooth.errors import EvaluationError, PhotosError
from dreambooth.evaluation import (
    Case,
    Encoders,
    Scores,
    cases,
    choose_step,
    class_seeds,
    compare,
    headline,
    nearest_photos,
    reference,
    score,
    score_checkpoints,
    summarise,
)
from dreambooth.prompts import (
    Template,
    choose,
    class_prompt,
    instance_prompt,
    load_templates,
    read_caption,
    with_article,
)
from dreambooth.rng import derive_seed

TEMPLATES = [Template("recontextualisation", "a photo of {} in space"), Template("property", "a red {}")]
PLACES = [Template("recontextualisation", f"a photo of {{}} in place {i}") for i in range(3)]
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


class ColourEncoder:
    """Embeds a picture as its mean colour, and a text as the colour that it names: cosines that can be told by hand."""

    name, revision, transform = "colour", "1", "mean"

    def __init__(self, copy_cosine: float | None = 2.0) -> None:
        self.copy_cosine = copy_cosine

    def embed(self, images: Sequence[Image.Image], batch_size: int = 16) -> torch.Tensor:
        pixels = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
        return torch.nn.functional.normalize(torch.tensor(pixels, dtype=torch.float32), dim=1)

    embed_images = embed

    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.stack(
            [torch.tensor([float(word in text) for word in ("red", "green", "blue")]) for text in prompts]
        )


def plain(*colours: tuple[int, int, int]) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), colour) for colour in colours]


def scored(
    todo: Sequence[Case],
    pictures: Sequence[tuple[int, int, int]],
    class_pictures: Sequence[tuple[int, int, int]] = (),
    photos: Sequence[tuple[int, int, int]] = (RED, RED),
    text: ImageTextEncoder | None = None,
) -> Scores:
    encoders = Encoders(ColourEncoder(), text)
    texts = text.embed_texts(list(dict.fromkeys(case.base_prompt for case in todo))) if text else None
    seen = reference(plain(*photos), encoders)
    return score(todo, plain(*pictures), plain(*class_pictures), seen, encoders, texts)


def test_both_models_get_the_same_noise_and_their_own_words() -> None:
    found = cases([*PLACES], "teddy bear", [3, 4])
    assert len(found) == 6
    assert found[0].base_prompt == "a photo of a teddy bear in place 0"
    assert len({case.noise_seed for case in found}) == 6


def test_too_few_prompts_are_refused_before_anything_is_drawn() -> None:
    with pytest.raises(EvaluationError, match="1 prompts count"):
        cases(TEMPLATES, "dog", [1])


def test_class_images_are_none_of_the_training() -> None:
    assert len(set(class_seeds(24, 0)) | {derive_seed(0, "class-image", i, 0) for i in range(24)}) == 48


def test_identity_is_averaged_over_seeds_then_prompts_and_property_prompts_stay_out() -> None:
    todo = cases([*PLACES[:2], TEMPLATES[1]], "dog", [1, 2])
    base, personalised = scored(todo, [GREEN] * 6), scored(todo, [RED, GREEN, RED, RED, GREEN, GREEN])
    metrics = summarise(base, personalised, reference(plain(RED, RED), Encoders(ColourEncoder(), None)), 0.95)
    assert metrics["identity"]["base"] == pytest.approx(0)
    assert metrics["identity"]["personalised"] == pytest.approx((0.5 + 1) / 2)
    assert metrics["identity"]["gain"] == pytest.approx(0.75)
    assert metrics["identity"]["ceiling"] == pytest.approx(1)
    assert metrics["identity"]["calibrated"] == pytest.approx(0.75)
    assert metrics["identity"]["by_kind"]["property"] == {"base": 0.0, "personalised": 0.0, "prompts": 1}
    assert metrics["prompts"] == 2


def test_prompt_fidelity_asks_for_the_prompt_without_the_identifier() -> None:
    todo = cases([Template("property", "a green {}"), *PLACES[:2]], "red dog", [1, 2])
    found = scored(todo, [GREEN, BLUE, RED, RED, RED, GREEN], text=ColourEncoder())
    assert found.cases["prompt"][0] == "a green red dog"
    half = 0.5**0.5
    assert found.cases["prompt_fidelity"].tolist() == pytest.approx([half, 0, 1, 1, 1, 0])
    assert found.prompts["prompt_fidelity"].tolist() == pytest.approx([half / 2, 1, 0.5])


def test_an_image_text_encoder_that_tells_subjects_gives_a_second_opinion_without_another_pass() -> None:
    todo = cases([Template("accessory", f"{{}} in {colour}") for colour in ("red", "green", "blue")], "dog", [1])
    base, personalised = (scored(todo, [colour] * 3, text=ColourEncoder()) for colour in (GREEN, RED))
    photos = reference(plain(RED, RED), Encoders(ColourEncoder(), ColourEncoder()))
    second = summarise(base, personalised, photos, 0.95)["identity_second"]
    assert (second["base"], second["personalised"], second["ceiling"]) == pytest.approx((0, 1, 1))


def test_diversity_is_a_difference_to_the_base_at_the_same_prompts() -> None:
    todo = cases(PLACES, "dog", [1, 2])
    varied, alike = scored(todo, [RED, GREEN] * 3), scored(todo, [RED, RED, GREEN, GREEN, BLUE, BLUE])
    assert varied.prompts["diversity"].tolist() == pytest.approx([1, 1, 1])
    assert compare(alike, varied, 0.95)["diversity"]["mean"] == pytest.approx(-1)


def test_prior_drift_is_the_rise_of_the_class_images_at_paired_seeds() -> None:
    todo = cases(PLACES, "dog", [1, 2])
    base = scored(todo, [GREEN] * 6, class_pictures=[GREEN, BLUE, GREEN, BLUE])
    leaked = scored(todo, [RED] * 6, class_pictures=[RED, BLUE, RED, BLUE])
    metrics = summarise(base, leaked, reference(plain(RED, RED), Encoders(ColourEncoder(), None)), 0.95)
    assert metrics["prior"]["rise"] == pytest.approx(0.5)
    assert metrics["prior"]["images"] == 4
    assert metrics["prior"]["mmd2"] > 0
    assert compare(base, base, 0.95)["pres_rise"]["mean"] == 0
    same = summarise(base, base, reference(plain(RED, GREEN), Encoders(ColourEncoder(), None)), 0.95)["prior"]
    assert (same["mmd2"], same["p_value"]) == (0, 1)


def test_an_image_text_encoder_gives_a_second_opinion_on_the_identity_with_an_interval_of_its_own() -> None:
    todo = cases([*PLACES[:2], TEMPLATES[1]], "red dog", [1])
    text = ColourEncoder()
    base, personalised = (scored(todo, colours, text=text) for colours in ([GREEN] * 3, [RED, GREEN, RED]))
    metrics = summarise(base, personalised, reference(plain(RED, RED), Encoders(ColourEncoder(), text)), 0.95)
    second = metrics["identity_second"]
    assert second == {name: metrics["identity"][name] for name in second}  # the two encoders are alike here
    assert (second["gain"], second["ceiling"]) == (pytest.approx(0.5), pytest.approx(1))
    assert second["high"] - second["low"] == pytest.approx(2 * 12.7062 * 0.5, rel=1e-4)


def test_what_was_not_measured_is_missing_and_not_zero() -> None:
    todo = cases(PLACES, "dog", [1])
    base, personalised = scored(todo, [GREEN] * 3), scored(todo, [RED] * 3)
    metrics = summarise(base, personalised, reference(plain(RED, RED), Encoders(ColourEncoder(), None)), 0.95)
    assert not {"prompt", "diversity", "prior"} & set(metrics)
    assert metrics["safety"] == "not checked"


def test_an_identity_that_is_no_number_is_refused() -> None:
    todo = cases(PLACES, "dog", [1])
    base, broken = scored(todo, [GREEN] * 3), scored(todo, [RED] * 3)
    broken.prompts.loc[1, "identity"] = np.nan
    with pytest.raises(EvaluationError, match="2 of 3 prompts"):
        compare(broken, base, 0.95)


def test_models_with_other_prompts_are_not_compared() -> None:
    one, other = (scored(cases(part, "dog", [1]), [RED] * 2) for part in (PLACES[:2], PLACES[1:]))
    with pytest.raises(EvaluationError, match="other prompts"):
        compare(one, other, 0.95)


@pytest.mark.threat(22)
def test_a_picture_that_is_a_photo_or_its_mirror_image_is_a_copy_and_named() -> None:
    photos = [make_photo(number) for number in range(4)]
    pictures = [photos[2], photos[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT), make_photo(9)]
    todo = cases(PLACES, "dog", [1])
    encoders = Encoders(ColourEncoder(), None)
    found = score(todo, pictures, [], reference(photos, encoders), encoders, None).cases
    assert found["copy"].tolist() == [True, True, False]  # by perceptual hash: no colour is nearer than 2
    assert found["nearest_distance"].tolist()[:2] == [0, 0]
    assert found["nearest_photo"][0] == 2


def test_without_a_measured_threshold_the_nearest_pair_of_photos_sets_it() -> None:
    assert reference(plain(RED, GREEN, BLUE), Encoders(ColourEncoder(None), None)).copy_cosine == pytest.approx(0.6)
    assert reference(plain(RED, RED), Encoders(ColourEncoder(None), None)).copy_cosine == 1


def test_a_subset_of_the_prompts_keeps_the_share_of_each_kind() -> None:
    counts = {"recontextualisation": 10, "accessory": 10, "property": 5}
    live = [Template(kind, f"{kind} {{}} {i}") for kind, count in counts.items() for i in range(count)]
    kinds = [template.kind for template in choose(live, 12)]
    assert [kinds.count(kind) for kind in counts] == [5, 5, 2]
    assert choose(live, 12)[5] == Template("accessory", "accessory {} 0")
    assert choose(live, None) == choose(live, 99) == live
    assert len(choose(live, 2)) == 2


@pytest.mark.parametrize(
    ("low", "high", "prompts", "said"),
    [
        (0.1, 0.2, 8, "nearer to the subject"),
        (-0.2, -0.1, 8, "farther from the subject"),
        (-0.1, 0.1, 8, "not told apart"),
        (0.1, 0.2, 3, "too few prompts to tell, under 6 an interval says little"),
    ],
)
def test_the_headline_says_what_the_interval_says(low: float, high: float, prompts: int, said: str) -> None:
    identity = {"gain": (low + high) / 2, "low": low, "high": high}
    line = headline({"identity": identity, "prompts": prompts})
    assert said in line
    assert ("[" in line) == (prompts >= 6)


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


def test_previews_are_scored_by_step_over_their_prompts() -> None:
    encoders = Encoders(ColourEncoder(), ColourEncoder())
    texts = ColourEncoder().embed_texts(["a red dog", "a green dog"])
    previews = {100: plain(RED, RED), 50: plain(GREEN, GREEN)}
    points = score_checkpoints(previews, reference(plain(RED, RED), encoders), encoders, texts, 0.95)
    assert points["step"].tolist() == [50, 100]
    assert points["identity"].tolist() == pytest.approx([0, 1])
    assert points["identity_error"].tolist() == pytest.approx([0, 0])
    assert points["prompt"].tolist() == pytest.approx([0.5, 0.5])
    assert points["prompts"].tolist() == [2, 2]


def test_the_error_of_a_step_is_that_of_its_difference_from_the_last_one_at_the_same_prompts() -> None:
    encoders = Encoders(ColourEncoder(), ColourEncoder())
    texts = ColourEncoder().embed_texts(["a red dog", "a green dog"])
    # Prompt fidelity by prompt: 1, 0 at step 100; the same at step 50, though the prompts differ; 0, 1 at step 20.
    previews = {100: plain(RED, RED), 50: plain(RED, RED), 20: plain(GREEN, GREEN)}
    points = score_checkpoints(previews, reference(plain(RED, RED), encoders), encoders, texts, 0.95)
    assert points["prompt_error"].tolist() == pytest.approx([12.7062, 0, 0], rel=1e-4)
    alone = score_checkpoints({100: plain(RED)}, reference(plain(RED, RED), encoders), encoders, texts[:1], 0.95)
    assert np.isnan(alone["prompt_error"][0])  # one prompt has no spread


def test_the_step_is_the_one_with_most_identity_while_the_prompt_holds() -> None:
    points = pd.DataFrame({"step": [50, 100, 150], "identity": [0.3, 0.5, 0.6], "prompt": [0.40, 0.38, 0.30]})
    assert choose_step(points, 0.03) == 100
    assert choose_step(points, 0.2) == 150
    assert choose_step(points, 0) == 50
    assert choose_step(points.assign(prompt=np.nan), 0.03) is None


def saved_again(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize(
    "change",
    [saved_again, ImageOps.mirror, lambda picture: picture.filter(ImageFilter.GaussianBlur(1))],
    ids=["saved again", "mirrored", "blurred"],
)
def test_altered_copies_of_photos_are_found_and_pictures_of_another_subject_are_none(
    change: Callable[[Image.Image], Image.Image],
) -> None:
    ours, others = (
        [Image.open(path).convert("RGB") for path in sorted((REPOSITORY / "data/subjects" / name).glob("*.png"))]
        for name in ("biscuit", "chime")
    )
    encoders = Encoders(Lite0Encoder(), None)
    photos, altered = reference(ours, encoders), [change(photo) for photo in ours]
    found = nearest_photos(altered, encoders.image.embed(altered), photos)
    assert found["copy"].all()
    assert found["nearest_photo"].tolist() == list(range(len(ours)))
    assert not nearest_photos(others, encoders.image.embed(others), photos)["copy"].any()

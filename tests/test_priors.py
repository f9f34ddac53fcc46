"""Class images: drawn once, shared, continued by index, and never stale."""

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import FORKED, kill_this_process_in
from tiny_project import REPOSITORY

from dreambooth import drawings
from dreambooth.drawings import DrawingReport, is_flat
from dreambooth.errors import PriorError
from dreambooth.models import Model, load_model
from dreambooth.params import Prior, load_params
from dreambooth.priors import ensure_class_images, prior_key, read_class_images
from dreambooth.sampling import Drawing, SamplerSettings

PROMPT = "a photo of a dog"


@pytest.fixture
def model(tiny_model_folder: Path) -> Model:
    return load_model(tiny_model_folder, device="cpu")


def settings(count: int, **changes: object) -> Prior:
    values = load_params(REPOSITORY / "params.yaml").prior.model_dump()
    return Prior(**values | {"num_class_images": count, "num_inference_steps": 2, "batch_size": 4} | changes)


def ensure(store: Path, model: Model | None, count: int) -> DrawingReport:
    def load() -> Model:
        assert model is not None, "a model was loaded though nothing was missing"
        return model

    return ensure_class_images(store, [PROMPT], load, settings(count), 32)


def test_the_second_subject_of_a_class_draws_nothing_and_loads_no_model(model: Model, tmp_path: Path) -> None:
    assert str(ensure(tmp_path, model, 6)) == "0 reused, 6 generated"
    assert str(ensure(tmp_path, None, 6)) == "6 reused, 0 generated"


@pytest.mark.fault(26)
def test_more_images_later_are_the_same_as_at_once(model: Model, tmp_path: Path) -> None:
    ensure(tmp_path / "at-once", model, 10)
    ensure(tmp_path / "later", model, 3)
    assert str(ensure(tmp_path / "later", model, 10)) == "3 reused, 7 generated"
    assert read_class_images(tmp_path / "at-once", 10)[0] == read_class_images(tmp_path / "later", 10)[0]


def test_fewer_images_than_there_are_draw_nothing(model: Model, tmp_path: Path) -> None:
    ensure(tmp_path, model, 6)
    assert str(ensure(tmp_path, None, 4)) == "4 reused, 0 generated"


@pytest.mark.parametrize("name", ["00003.png", "00003.safetensors"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x")])
@pytest.mark.fault(26)
def test_a_damaged_image_is_made_again_as_it_was(model: Model, tmp_path: Path, name: str, damage: object) -> None:
    ensure(tmp_path, model, 6)
    before = (tmp_path / name).read_bytes()
    damage(tmp_path / name)  # type: ignore[operator]
    assert str(ensure(tmp_path, model, 6)) == "5 reused, 1 generated"
    assert (tmp_path / name).read_bytes() == before


def test_all_images_differ(model: Model, tmp_path: Path) -> None:
    ensure(tmp_path, model, 8)
    assert len(set(read_class_images(tmp_path, 8)[0])) == 8


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def draw_and_die(store: Path, base: Path, count: int, write: int) -> None:
    kill_this_process_in(drawings, "write_file", write)
    ensure(store, load_model(base, device="cpu"), count)


@pytest.fixture(scope="module")
def hundred(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("hundred")
    ensure(store, load_model(tiny_model_folder, device="cpu"), 100)
    return store


@pytest.mark.slow
# the 75th write is the picture after the 37th; the 76th its latents, so that a picture stands there without a line
@pytest.mark.parametrize("write", [74, 75])
@pytest.mark.fault(26)
def test_of_a_hundred_images_killed_after_37_the_other_63_are_drawn(
    tiny_model_folder: Path, tmp_path: Path, model: Model, hundred: Path, write: int
) -> None:
    process = FORKED.Process(target=draw_and_die, args=(tmp_path, tiny_model_folder, 100, write))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert str(ensure(tmp_path, model, 100)) == "37 reused, 63 generated"
    assert read_class_images(tmp_path, 100)[0] == read_class_images(hundred, 100)[0]
    assert kept(tmp_path) == kept(hundred)


def test_a_torn_index_line_costs_its_image_alone(model: Model, tmp_path: Path) -> None:
    ensure(tmp_path, model, 6)
    index = tmp_path / drawings.INDEX
    index.write_bytes(index.read_bytes()[:-30])
    assert str(ensure(tmp_path, model, 6)) == "5 reused, 1 generated"
    assert str(ensure(tmp_path, None, 6)) == "6 reused, 0 generated"


@pytest.mark.fault(22)
def test_a_black_image_is_drawn_again_from_the_next_seed_and_counted(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch, seen = drawings.draw_batch, []

    def black_at_first(*arguments: object, wanted: list[int]) -> Iterator[Drawing]:
        seen.append((arguments[2], wanted))
        for number, drawing in enumerate(draw_batch(*arguments, wanted=wanted)):  # type: ignore[arg-type]
            black = len(seen) == 1 and number == 0
            yield Drawing(Image.new("RGB", (32, 32)), drawing.latents) if black else drawing

    monkeypatch.setattr(drawings, "draw_batch", black_at_first)
    assert str(ensure(tmp_path, model, 4)) == "0 reused, 4 generated, 1 rejected on the way"
    assert ensure(tmp_path, None, 4).rejected == 1  # whoever looks later finds the same number
    assert [wanted for _, wanted in seen] == [[0, 1, 2, 3], [0]]
    assert seen[0][0] != seen[1][0]


def test_a_model_that_draws_nothing_is_given_up_with_the_reason(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch = drawings.draw_batch

    def black(*arguments: object, wanted: list[int]) -> Iterator[Drawing]:
        for drawing in draw_batch(*arguments, wanted=wanted):  # type: ignore[arg-type]
            yield Drawing(Image.new("RGB", (32, 32)), drawing.latents)

    monkeypatch.setattr(drawings, "draw_batch", black)
    with pytest.raises(PriorError, match=r"0, 1 of 'a photo of a dog' stay black or flat after 5 seeds"):
        ensure(tmp_path, model, 2)


def test_flat_pictures_are_told_from_drawn_ones() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert is_flat(Image.new("RGB", (32, 32)))
    assert is_flat(Image.new("RGB", (32, 32), (200, 10, 10)))
    assert not is_flat(Image.fromarray(noise))
    red_on_green = Image.new("RGB", (32, 32), (0, 102, 0))
    red_on_green.paste((200, 0, 0), (8, 8, 24, 24))
    assert np.asarray(red_on_green.convert("L")).std() < 1
    assert not is_flat(red_on_green)


@pytest.mark.fault(26)
def test_everything_an_image_depends_on_is_in_the_key_and_the_count_is_not() -> None:
    def key(**changes: object) -> str:
        values = {
            "base_hash": "a", "prompts": [PROMPT], "settings": settings(4), "resolution": 64, "dtype": "float32",
            "device": "cpu",
        }  # fmt: skip
        return prior_key(**values | changes)  # type: ignore[arg-type]

    changed = [
        {"base_hash": "b"}, {"prompts": ["a photo of a cat"]}, {"prompts": [PROMPT, PROMPT]},
        {"resolution": 32}, {"dtype": "float16"},
        {"device": "cuda"}, {"settings": settings(4, scheduler="ddim")}, {"settings": settings(4, seed=1)},
        {"settings": settings(4, num_inference_steps=3)}, {"settings": settings(4, guidance_scale=2.0)},
        {"settings": settings(4, negative_prompt="blurred")}, {"settings": settings(4, batch_size=2)},
    ]  # fmt: skip
    assert len({key(), *(key(**change) for change in changed)}) == len(changed) + 1
    assert key(settings=settings(200)) == key()


def test_other_drawing_code_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = drawings.drawing_key({"base": "a"})
    monkeypatch.setattr(drawings, "code_hash", lambda modules: f"new {modules}")
    assert drawings.drawing_key({"base": "a"}) != before


def test_pictures_of_another_prompt_or_seed_are_not_used_again(model: Model, tmp_path: Path) -> None:
    def report(*pictures: tuple[str, int]) -> str:
        wanted = [drawings.Picture(prompt, (seed,)) for prompt, seed in pictures]
        return str(drawings.ensure_drawings(tmp_path, wanted, lambda: model, SAMPLER, "pictures"))

    SAMPLER = SamplerSettings("ddim", 2, 4.0, 32, batch_size=4)
    assert report(("a dog", 1), ("a dog", 2)) == "0 reused, 2 generated"
    assert report(("a dog", 1), ("a cat", 2)) == "1 reused, 1 generated"
    assert report(("a dog", 3), ("a cat", 2)) == "1 reused, 1 generated"
    assert report(("a dog", 3), ("a cat", 2)) == "2 reused, 0 generated"


def draw_in_process(store: Path, base: Path, answers: Path) -> None:
    answers.write_text(str(ensure(store, load_model(base, device="cpu"), 30)))


@pytest.mark.slow
@pytest.mark.fault(26)
def test_of_two_processes_one_draws_and_the_other_waits(tiny_model_folder: Path, tmp_path: Path) -> None:
    answers = [tmp_path / "first", tmp_path / "second"]
    processes = [
        FORKED.Process(target=draw_in_process, args=(tmp_path / "store", tiny_model_folder, answer))
        for answer in answers
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(answer.read_text() for answer in answers) == ["0 reused, 30 generated", "30 reused, 0 generated"]


def test_class_images_show_the_prompts_in_turn(model: Model, tmp_path: Path) -> None:
    texts = [PROMPT, "a photo of a dog in a park", "a photo of a red dog"]
    ensure_class_images(tmp_path / "three", texts, lambda: model, settings(4), 32)
    ensure_class_images(tmp_path / "one", texts[:1], lambda: model, settings(4), 32)
    three, one = (read_class_images(tmp_path / name, 4)[0] for name in ("three", "one"))
    assert [three[i] == one[i] for i in range(4)] == [True, False, False, True]

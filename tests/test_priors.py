"""Class images: drawn once, shared, continued by index, and never stale."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_project import REPOSITORY

from dreambooth import priors
from dreambooth.errors import PriorError
from dreambooth.models import Model, load_model
from dreambooth.params import Prior, load_params
from dreambooth.priors import PriorReport, ensure_class_images, is_flat, prior_key, read_class_images
from dreambooth.sampling import Drawing

PROMPT = "a photo of a dog"


@pytest.fixture
def model(tiny_model_folder: Path) -> Model:
    return load_model(tiny_model_folder, device="cpu")


def settings(count: int, **changes: object) -> Prior:
    values = load_params(REPOSITORY / "params.yaml").prior.model_dump()
    return Prior(**values | {"num_class_images": count, "num_inference_steps": 2, "batch_size": 4} | changes)


def ensure(store: Path, model: Model | None, count: int) -> PriorReport:
    def load() -> Model:
        assert model is not None, "a model was loaded though nothing was missing"
        return model

    return ensure_class_images(store, PROMPT, load, settings(count), 32)


def test_the_second_subject_of_a_class_draws_nothing_and_loads_no_model(model: Model, tmp_path: Path) -> None:
    assert str(ensure(tmp_path, model, 6)) == "0 reused, 6 generated"
    assert str(ensure(tmp_path, None, 6)) == "6 reused, 0 generated"


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
def test_a_damaged_image_is_made_again_as_it_was(model: Model, tmp_path: Path, name: str, damage: object) -> None:
    ensure(tmp_path, model, 6)
    before = (tmp_path / name).read_bytes()
    damage(tmp_path / name)  # type: ignore[operator]
    assert str(ensure(tmp_path, model, 6)) == "5 reused, 1 generated"
    assert (tmp_path / name).read_bytes() == before


def test_all_images_differ(model: Model, tmp_path: Path) -> None:
    ensure(tmp_path, model, 8)
    assert len(set(read_class_images(tmp_path, 8)[0])) == 8


def test_a_stop_between_two_batches_loses_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch, calls = priors.draw_batch, []

    def stop_at_third(*arguments: object) -> list[Drawing]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw_batch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(priors, "draw_batch", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path, model, 12)
    monkeypatch.setattr(priors, "draw_batch", draw_batch)
    assert str(ensure(tmp_path, model, 12)) == "8 reused, 4 generated"


def test_a_black_image_is_drawn_again_from_the_next_seed_and_counted(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch, seen = priors.draw_batch, []

    def black_at_first(*arguments: object) -> list[Drawing]:
        drawings = draw_batch(*arguments)  # type: ignore[arg-type]
        seen.append(arguments[2])
        return [Drawing(Image.new("RGB", (32, 32)), drawings[0].latents), *drawings[1:]] if len(seen) == 1 else drawings

    monkeypatch.setattr(priors, "draw_batch", black_at_first)
    assert str(ensure(tmp_path, model, 4)) == "0 reused, 4 generated, 1 rejected and drawn again"
    assert seen[0] != seen[1]
    index = json.loads((tmp_path / "index.json").read_text())
    assert [index[str(i)]["attempt"] for i in range(4)] == [1, 0, 0, 0]


def test_a_model_that_draws_nothing_is_given_up_with_the_reason(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_batch = priors.draw_batch
    monkeypatch.setattr(
        priors,
        "draw_batch",
        lambda *arguments: [Drawing(Image.new("RGB", (32, 32)), one.latents) for one in draw_batch(*arguments)],
    )
    with pytest.raises(PriorError, match=r"0, 1 of 'a photo of a dog' stay black or flat after 5 seeds"):
        ensure(tmp_path, model, 2)


def test_flat_pictures_are_told_from_drawn_ones() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert is_flat(Image.new("RGB", (32, 32)))
    assert is_flat(Image.new("RGB", (32, 32), (200, 10, 10)))
    assert not is_flat(Image.fromarray(noise))


def test_everything_an_image_depends_on_is_in_the_key_and_the_count_is_not() -> None:
    def key(**changes: object) -> str:
        values = {
            "base_hash": "a", "prompt": PROMPT, "settings": settings(4), "resolution": 64, "dtype": "float32",
            "device": "cpu",
        }  # fmt: skip
        return prior_key(**values | changes)  # type: ignore[arg-type]

    changed = [
        {"base_hash": "b"}, {"prompt": "a photo of a cat"}, {"resolution": 32}, {"dtype": "float16"},
        {"device": "cuda"}, {"settings": settings(4, scheduler="ddim")}, {"settings": settings(4, seed=1)},
        {"settings": settings(4, num_inference_steps=3)}, {"settings": settings(4, guidance_scale=2.0)},
        {"settings": settings(4, negative_prompt="blurred")}, {"settings": settings(4, batch_size=2)},
    ]  # fmt: skip
    assert len({key(), *(key(**change) for change in changed)}) == len(changed) + 1
    assert key(settings=settings(200)) == key()


def draw_in_process(store: Path, base: Path, answers: "multiprocessing.Queue[str]") -> None:
    answers.put(str(ensure(store, load_model(base, device="cpu"), 6)))


@pytest.mark.slow
def test_of_two_processes_one_draws_and_the_other_waits(tiny_model_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=draw_in_process, args=(tmp_path, tiny_model_folder, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    said = sorted(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert said == ["0 reused, 6 generated", "6 reused, 0 generated"]

"""The table of methods at toy size: real stages of each, resumed by method, and a page and a picture of them."""

from pathlib import Path

import pytest
from PIL import Image
from tiny_project import REPOSITORY, make_project, tiny_values

from benchmarks.methods import METHODS, _key, main, parameters
from benchmarks.results import MAX_BYTES, _spread, small_png
from dreambooth.images import png_bytes
from dreambooth.params import parse_params
from dreambooth.yaml12 import load_yaml


@pytest.mark.slow
@pytest.mark.nightly
def test_a_table_and_a_picture_of_two_methods_of_which_the_done_one_is_read_again(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    project = make_project(tmp_path / "project", tiny_model_folder, tiny_values())
    out, shown, folder = tmp_path / "docs/results.md", tmp_path / "docs/images/methods.png", tmp_path / "work"
    told = ["--project", str(project), "--folder", str(folder), "--out", str(out), "--picture", str(shown)]
    main([*told, "--steps", "2", "--method", "full"])
    first = (folder / "biscuit-full/models/biscuit/manifest.json").stat().st_mtime_ns
    drawn = {path: path.stat().st_mtime_ns for path in (folder / "cache/priors").rglob("*.png")}
    main(
        [*told, "--steps", "2", "--method", "full", "--method", "textual_inversion", "--rate", "textual_inversion=0.1"]
    )
    assert (folder / "biscuit-full/models/biscuit/manifest.json").stat().st_mtime_ns == first
    assert drawn == {path: path.stat().st_mtime_ns for path in (folder / "cache/priors").rglob("*.png")}
    assert (
        "reads no class rows: prior.kind images has no effect" in (folder / "biscuit-textual_inversion/log").read_text()
    )
    page = out.read_text()
    lines = [line for line in page.splitlines() if line.startswith(("| full |", "| textual_inversion |"))]
    assert len(lines) == 4  # a line of numbers and a line of what it was told, each
    assert "`learning_rate: 0.1`" in page
    assert "![prompts by method](images/methods.png)" in page
    with Image.open(shown) as image:
        assert image.width > 4 * 128
    assert shown.stat().st_size < 200_000


def test_every_method_gets_the_same_budget_and_valid_parameters() -> None:
    values = load_yaml((REPOSITORY / "params.yaml").read_text())
    budgets = set()
    for method, changes in METHODS.items():
        one = parse_params(parameters(values, "biscuit", method, changes))
        train = one.train
        budgets.add(str((train.max_train_steps, train.train_batch_size, train.seed, one.evaluate, one.prior)))
        assert train.method == method
        assert one.subject("biscuit").identifier == ("sks" if method in ("full", "lora") else "<biscuit>")
    assert len(budgets) == 1


def test_another_base_or_another_rate_is_another_result(tmp_path: Path, tiny_model_folder: Path) -> None:
    values = tiny_values()
    project = make_project(tmp_path / "project", tiny_model_folder, values)
    keys = [_key(project, values, "biscuit") for _ in range(2)]
    keys.append(_key(project, values | {"train": values["train"] | {"learning_rate": 1e-6}}, "biscuit"))
    (project / "data/base/tiny/unet/config.json").write_text("{}")
    keys.append(_key(project, values, "biscuit"))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.parametrize(("count", "expected"), [(2, "ad"), (3, "ace"), (6, "abcdef"), (9, "abcdef")])
def test_prompts_of_the_picture_are_taken_from_all_along_the_list(count: int, expected: str) -> None:
    assert "".join(_spread("abcdef", count)) == expected


def test_a_picture_takes_fewer_colours_before_it_takes_more_room() -> None:
    noise = Image.effect_noise((500, 500), 90).convert("RGB")
    assert len(small_png(noise)) <= MAX_BYTES < len(png_bytes(noise.quantize(256)))

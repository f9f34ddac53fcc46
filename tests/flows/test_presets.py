"""Presets are written into params.yaml, where DVC and a reader see them."""

import io
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from test_cli import dreambooth
from toy_project import REPOSITORY

from dreambooth.errors import ParamsError
from dreambooth.params import load_params
from dreambooth.yaml12 import load_yaml
from flows.presets import Change, apply, merge, names, read, remarks

WHOLE = ("sd15-full", "sd15-lora", "sdxl-lora")
SHIPPED = ("faces", "low-memory", "objects", "sd15-full", "sd15-lora", "sdxl-lora")
ALONE = {"faces": ["sd15-full"], "objects": ["sd15-full"], "low-memory": ["sd15-lora"]}  # what they stand on top of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copy(REPOSITORY / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(REPOSITORY / "params", tmp_path / "params")
    return tmp_path


def test_the_presets_that_are_promised_are_there(root: Path) -> None:
    assert tuple(names(root)) == SHIPPED


@pytest.mark.parametrize("preset", SHIPPED)
def test_every_preset_gives_valid_parameters_and_says_its_source(root: Path, preset: str) -> None:
    assert apply(root, [*ALONE.get(preset, []), preset])
    params = load_params(root / "params.yaml")
    assert params.base.resolution >= 512
    head = (root / "params" / f"{preset}.yaml").read_text().split("\nbase:")[0]
    assert "# Source: " in head
    assert "# Expected, not measured: " in head


@pytest.mark.parametrize("preset", [name for name in SHIPPED if "lora" in name or name == "low-memory"])
def test_a_lora_is_evaluated_in_the_precision_that_it_is_saved_in(root: Path, preset: str) -> None:
    apply(root, [*ALONE.get(preset, []), preset])
    params = load_params(root / "params.yaml")
    assert params.train.method == "lora"
    assert params.base.inference_dtype == params.train.save_dtype  # docs/decisions/0091


def test_only_the_lines_of_changed_values_are_changed(root: Path) -> None:
    before = [line for line in (root / "params.yaml").read_text().splitlines() if not line.startswith("    - ")]
    changes = apply(root, ["sd15-lora"])  # prior.prompts was a list of lines and becomes one
    after = [line for line in (root / "params.yaml").read_text().splitlines() if not line.startswith("    - ")]
    assert len(after) == len(before)
    changed = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    assert len(changed) == len(changes)
    assert {one.split(":")[0] for one, _ in changed} == {other.split(":")[0] for _, other in changed}
    assert load_params(root / "params.yaml").train.method == "lora"


def test_line_ends_stay_as_they_are(root: Path) -> None:
    path = root / "params.yaml"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert apply(root, ["sd15-lora"])
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n")
    assert b"\r\r" not in path.read_bytes()
    assert load_params(path).train.method == "lora"


def test_a_second_time_nothing_changes(root: Path) -> None:
    apply(root, ["sd15-full"])
    before = (root / "params.yaml").read_bytes()
    assert apply(root, ["sd15-full"]) == []
    assert (root / "params.yaml").read_bytes() == before


def test_a_later_preset_stands_on_top_of_an_earlier_one(root: Path) -> None:
    changes = {change.name: change for change in apply(root, ["sd15-full", "objects"])}
    assert changes["train.max_train_steps"].after == 400
    assert changes["train.max_train_steps"].before == 450  # what the file said before both
    assert load_params(root / "params.yaml").base.resolution == 512


@pytest.mark.parametrize("preset", WHOLE)
def test_a_photo_scale_preset_has_encoders_prompts_and_class_images_for_photos(root: Path, preset: str) -> None:
    apply(root, [preset])
    evaluate = load_params(root / "params.yaml").evaluate
    assert (evaluate.encoders, evaluate.prompts, evaluate.num_class_images) == ("hub", "data/prompts/photo", 50)


@pytest.mark.parametrize(("preset", "below"), [(preset, below) for preset, (below,) in ALONE.items()])
def test_a_preset_without_the_one_that_it_stands_on_says_so(root: Path, preset: str, below: str) -> None:
    apply(root, [preset])
    (remark,) = remarks(root, [preset])
    assert f"params/{preset}.yaml stands on top of {below}" in remark
    assert "base.pretrained_model_name_or_path is data/base/emoji64, there stable-diffusion-v1-5/" in remark
    assert remark.endswith(f"--preset {below} --preset {preset}")
    apply(root, [below, preset])
    assert remarks(root, [below, preset]) == remarks(root, [preset]) == remarks(root, [below]) == []


@pytest.mark.parametrize(("preset", "below"), [(preset, below) for preset, (below,) in ALONE.items()])
def test_a_preset_before_the_one_that_it_stands_on_is_refused_with_their_order(
    root: Path, preset: str, below: str
) -> None:
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(
        ParamsError, match=rf"{preset}: stands on top of {below}.*; --preset {below} --preset {preset}$"
    ):
        apply(root, [preset, below])
    assert (root / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("preset", WHOLE)
def test_what_stands_left_and_right_of_an_arrow_is_what_the_file_says_before_and_after(root: Path, preset: str) -> None:
    before = _values(root)
    changes = apply(root, [preset])
    after = _values(root)
    for line in map(str, changes):
        name, said = line.split(": ", 1)
        assert [load_yaml(value) for value in said.split(" -> ")] == [before[name], after[name]]
    assert "base.revision: null -> " in " ".join(map(str, changes))
    assert str(Change("a", "null", ["no", 1.0, None])) == "a: 'null' -> [no, 1.0, null]"


def test_rates_of_another_method_than_the_one_in_use_are_told(root: Path) -> None:
    apply(root, ["sd15-lora", "faces"])
    (remark,) = remarks(root, ["sd15-lora", "faces"])
    assert "(train.method is lora, there full)" in remark


def _values(root: Path) -> dict[str, Any]:
    load_params(root / "params.yaml")
    return {
        f"{section}.{key}": value
        for section, values in load_yaml((root / "params.yaml").read_text()).items()
        for key, value in values.items()
    }


def _said(root: Path, preset: str) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, part in read(root, preset).items() for key, value in part.items()}


def _as_dvc_leaves_it(path: Path) -> None:
    """Dump params.yaml as `dvc exp run -S` does: lists stand at the indent of their key."""
    yaml, text = YAML(), io.StringIO()
    yaml.dump(yaml.load(path.read_text()), text)
    path.write_text(text.getvalue())


@pytest.mark.parametrize("dumped", [False, True])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(SHIPPED, 2)))
def test_any_preset_goes_after_any_other(root: Path, first: str, second: str, dumped: bool) -> None:
    comments = (root / "params.yaml").read_text().count("#")
    apply(root, [first])
    if dumped:
        _as_dvc_leaves_it(root / "params.yaml")
    apply(root, [second])
    assert _said(root, second).items() <= _values(root).items()
    assert (root / "params.yaml").read_text().count("#") == comments


@pytest.mark.parametrize("preset", WHOLE)
def test_a_whole_preset_is_the_same_whatever_was_before(root: Path, preset: str) -> None:
    keys = {key for whole in WHOLE for key in _said(root, whole)}
    results = []
    original = (root / "params.yaml").read_bytes()
    for first in SHIPPED:
        (root / "params.yaml").write_bytes(original)
        apply(root, [first])
        apply(root, [preset])
        results.append({key: value for key, value in _values(root).items() if key in keys})
    assert all(result == results[0] for result in results)
    assert keys == set(_said(root, preset))
    assert {key for each in SHIPPED for key in _said(root, each)} <= keys


def test_params_that_are_no_yaml_are_refused_without_a_traceback(root: Path) -> None:
    for text in ("a: b: c", "a: 1\na: 2\n", "a: [1"):
        (root / "params.yaml").write_text(text)
        with pytest.raises(ParamsError, match=r"params\.yaml: cannot be read"):
            apply(root, ["sd15-lora"])
        assert (root / "params.yaml").read_text() == text


def test_true_is_not_one() -> None:
    text, changes = merge("train:\n  a: 1\n", {"train": {"a": True}})
    assert (text, changes) == ("train:\n  a: true\n", [Change("train.a", 1, True)])


def test_what_does_not_fit_leaves_the_file_as_it_was(root: Path) -> None:
    before = (root / "params.yaml").read_bytes()
    for text, complaint in (
        ("train: {learning_rate: 5}", "train.learning_rate"),
        ("train: {learning_rat: 5}", "unknown, but a preset sets it"),
        ("subjects: {rex: {}}", "should be a map in one of"),
        ("export: {formats: [diffusers, kohya]}", "kohya holds what train.method lora or pivotal makes"),
        ("a: b: c", "cannot be read"),
        ("on_top_of: nothing", r"params/odd.yaml: on_top_of: should be one of faces, .* \(got 'nothing'\)"),
        ("on_top_of: [faces]", "on_top_of: should be one of"),
    ):
        (root / "params/odd.yaml").write_text(text)
        with pytest.raises(ParamsError, match=complaint):
            apply(root, ["odd"])
        assert (root / "params.yaml").read_bytes() == before
    for name in ("nothing", "../params"):
        with pytest.raises(ParamsError, match=r"there is no '.*'; the presets of this project: faces, low-memory"):
            apply(root, [name])


def test_the_command_says_each_change_and_checks_the_ids_before_it_writes(project: Path) -> None:
    (project / "params").mkdir()
    (project / "params/quick.yaml").write_text("train: {max_train_steps: 7}\n")
    before = (project / "params.yaml").read_bytes()
    done = dreambooth(project, "run", "nobody", "--preset", "quick")
    assert done.returncode == 3
    assert "there is no subject 'nobody'" in done.stderr
    assert (project / "params.yaml").read_bytes() == before
    assert "no 'slow'" in dreambooth(project, "run", "--preset", "slow").stderr
    (project / "params/slow.yaml").write_text("base: {pretrained_model_name_or_path: data/base/other}\n")
    (project / "params/quick.yaml").write_text("on_top_of: slow\ntrain: {max_train_steps: 7}\n")
    (project / "dvc.yaml").write_text("stages: [")  # so that the run ends after the preset
    done = dreambooth(project, "run", "--preset", "quick")
    assert done.stdout.splitlines()[0] == "params.yaml: train.max_train_steps: 450 -> 7"
    assert "warning: params/quick.yaml stands on top of slow" in done.stderr
    assert done.returncode != 0
    assert load_params(project / "params.yaml").train.max_train_steps == 7

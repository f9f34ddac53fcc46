"""`dvc repro` alone: everything up to the export, and afterwards only what a change really touches."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import REPOSITORY, add_photos, make_project, tiny_values, write_params

from flows.graph import Graph

pytestmark = pytest.mark.slow


def dvc(root: Path, *arguments: str) -> str:
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Path]:
    """Return a project with this repository's dvc.yaml and code in which `dvc repro` ran once."""
    folder = tmp_path_factory.mktemp("repro")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMBOOTH_CACHE", str(folder / "cache"))
        root = make_project(folder / "project", tiny_model_folder, tiny_values())
        for name in ("dreambooth", "stages"):
            shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "dvc.yaml", root)
        dvc(root, "init", "--no-scm", "--quiet")
        dvc(root, "repro")
        yield root


@pytest.fixture
def values(reproduced: Path) -> Iterator[dict[str, Any]]:
    """Return the parameters of the project to be changed; what a test did to the file is taken back."""
    before = (reproduced / "params.yaml").read_text()
    yield yaml.safe_load(before)
    (reproduced / "params.yaml").write_text(before)


def changed(root: Path) -> set[str]:
    """Return the stages with changes of their own, without those below them."""
    return {stage.name for stage in Graph.load(root).stages if stage.reasons}


def stale(root: Path) -> set[str]:
    return {stage.name for stage in Graph.load(root).stale}


def test_everything_up_to_the_export_is_made_without_a_server(reproduced: Path) -> None:
    assert (reproduced / "export/biscuit/model_index.json").is_file()
    assert (reproduced / "metrics/biscuit.json").is_file()
    assert stale(reproduced) == set()
    assert "up to date" in dvc(reproduced, "repro")


def test_a_new_learning_rate_keeps_the_class_images(reproduced: Path, values: dict[str, Any]) -> None:
    values["train"]["learning_rate"] = 0.5
    write_params(reproduced, values)
    assert stale(reproduced) == {f"{stage}@biscuit" for stage in ("train", "evaluate", "report", "export")}


def test_another_method_is_stale_in_the_training_and_below_it_alone(reproduced: Path, values: dict[str, Any]) -> None:
    values["train"]["method"] = "lora"
    write_params(reproduced, values)
    assert stale(reproduced) == {f"{stage}@biscuit" for stage in ("train", "evaluate", "report", "export")}


def test_a_new_class_noun_draws_the_class_images_again(reproduced: Path, values: dict[str, Any]) -> None:
    values["classes"]["dog"]["class_noun"] = "puppy"
    write_params(reproduced, values)
    assert "prior@dog" in changed(reproduced)
    assert "validate@biscuit" not in stale(reproduced)


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("photos", "min_side", 9, {"validate@biscuit", "prior@dog"}),  # own photos of a class are checked alike
        ("prior", "guidance_scale", 1.5, {"prior@dog"}),
        ("base", "inference_dtype", "bfloat16", {"prior@dog", "evaluate@biscuit", "export@biscuit"}),
        ("evaluate", "seeds", [5], {"evaluate@biscuit"}),
        ("train", "prior_loss_weight", 0.5, {"train@biscuit", "export@biscuit"}),
        ("train", "method", "lora", {"train@biscuit", "export@biscuit"}),
        ("prior", "kind", "teacher", {"prior@dog", "train@biscuit", "export@biscuit"}),  # its headers say how many
    ],
)
def test_a_parameter_touches_only_the_stages_that_read_it(
    reproduced: Path, values: dict[str, Any], section: str, key: str, value: Any, expected: set[str]
) -> None:
    values[section][key] = value
    write_params(reproduced, values)
    assert changed(reproduced) == expected


def test_a_new_photo_validates_again_and_keeps_the_class_images(reproduced: Path) -> None:
    add_photos(reproduced / "data/subjects/biscuit", 1, first=9)
    try:
        # the report shows the originals, the export asks for the consent that lies beside them
        assert changed(reproduced) == {"validate@biscuit", "report@biscuit", "export@biscuit"}
        assert "prior@dog" not in stale(reproduced)
    finally:
        (reproduced / "data/subjects/biscuit/09.png").unlink()


def test_a_second_subject_of_a_class_runs_no_prior(reproduced: Path, values: dict[str, Any]) -> None:
    values["subjects"]["rex"] = {"class_id": "dog", "identifier": "zwx", "kind": "live"}
    add_photos(reproduced / "data/subjects/rex", 4, first=20)
    write_params(reproduced, values)
    assert stale(reproduced) == {f"{stage}@rex" for stage in ("validate", "train", "evaluate", "report", "export")}


def test_a_parameter_that_is_changed_back_is_restored_without_computing(
    reproduced: Path, values: dict[str, Any]
) -> None:
    before = (reproduced / "export/biscuit/manifest.json").read_bytes()
    values["train"]["max_train_steps"] = 2
    write_params(reproduced, values)
    assert "Running stage 'train@biscuit'" in dvc(reproduced, "repro", "train@biscuit")
    values["train"]["max_train_steps"] = 4
    write_params(reproduced, values)
    said = dvc(reproduced, "repro")
    assert "Running stage" not in said
    assert "is cached - skipping run" in said
    assert (reproduced / "export/biscuit/manifest.json").read_bytes() == before


def test_another_method_trains_again_and_keeps_pictures_and_class_images(
    reproduced: Path, values: dict[str, Any]
) -> None:
    values["train"]["method"] = "lora"
    write_params(reproduced, values)
    said = dvc(reproduced, "repro", "train@biscuit")
    ran = [line for line in said.splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'train@biscuit':"]
    assert (reproduced / "models/biscuit/pytorch_lora_weights.safetensors").is_file()

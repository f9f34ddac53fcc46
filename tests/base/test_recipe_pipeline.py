"""base/dvc.yaml: what it declares is what the modules import, and it runs from icon packages to a model card."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from imports import import_closure
from toy_recipe import FURTHER, pack_further_hand, pack_hands, toy

from base import recipe, sprites
from base.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]
STAGES = ("icons", "sprites", "subjects", "autoencoder", "tokenizer", "text_encoder", "denoiser", "scorer", "judge",
          "quality", "card")  # fmt: skip
# They cannot change what a stage writes.
WITHOUT_EFFECT = {"base/__init__.py", "dreambooth/__init__.py", "dreambooth/errors.py"}


@cache
def declared() -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load((REPOSITORY / "base/dvc.yaml").read_text())["stages"]
    return stages


def test_stages_stand_in_their_order_each_a_module_of_the_same_name() -> None:
    assert tuple(declared()) == STAGES
    for stage, entry in declared().items():
        assert entry["cmd"].startswith(f"python -m base.{stage}")
        assert entry["wdir"] == ".."


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_can_change_the_output_is_a_dependency_and_no_other(stage: str) -> None:
    modules = {dep for dep in declared()[stage]["deps"] if dep.endswith(".py")}
    assert modules == import_closure(f"base/{stage}.py", ("base", "dreambooth"), WITHOUT_EFFECT)


@pytest.mark.parametrize("stage", STAGES)
def test_every_declared_parameter_exists(stage: str) -> None:
    values = recipe.load().model_dump()
    for entry in declared()[stage].get("params", []):
        for key in entry["base/params.yaml"]:
            value: Any = values
            for part in key.split("."):
                assert part in value, f"{stage}: {key}"
                value = value[part]


def test_every_value_of_the_recipe_is_a_parameter_of_a_stage() -> None:
    keys = {
        key.split(".")[0] for e in declared().values() for p in e.get("params", []) for key in p["base/params.yaml"]
    }
    assert set(Recipe.model_fields) == keys


@pytest.fixture
def toy_project(tmp_path: Path) -> Path:
    """Return a copy of the recipe with toy values, its icon packages there already."""
    from dvc.repo import Repo

    root = tmp_path / "project"
    for folder in ("base", "dreambooth"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    values = toy(yaml.safe_load((REPOSITORY / "base/params.yaml").read_text()))
    values["subjects"] = {
        "rex": {"package": "alpha", "icon": "poodle", "class_noun": "dog", "contexts": ["blue", "in space"]}
    }
    values |= {"held_out": ["alpha:poodle"], "styles": {"alpha": "flat"}}
    values["packages"] = {}
    drawings = [icon for names in values["nouns"].values() for icon in names] + values["extra_icons"]
    drawings += [scene["icon"] for scene in values["scenes"].values()]
    drawings += [*values["accessories"].values(), *values["neighbours"].values()]
    folder = root / recipe.SCRATCH / "icons"
    values["packages"] = pack_hands(folder, sorted(set(drawings)))
    values["scorer"]["packages"] = pack_further_hand(folder)
    (root / "base/params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    Repo.init(str(root), no_scm=True).close()
    return root


def repro(root: Path, *arguments: str, path: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run `dvc repro base/dvc.yaml` as a person would."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    environment["PATH"] = path or f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "base/dvc.yaml", *arguments],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_from_icon_packages_to_model_scorer_and_cards_and_then_nothing_to_do(toy_project: Path) -> None:
    done = repro(toy_project)
    assert done.returncode == 0, done.stdout + done.stderr
    model, scorer = toy_project / recipe.MODEL, toy_project / recipe.SCORER
    drawn = sprites.load(toy_project / recipe.SCRATCH / "sprites")
    assert not drawn.rows("noun", "poodle")
    further = sprites.load(toy_project / recipe.SCRATCH / "further_sprites")
    assert {(sprite.package, sprite.icon) for sprite in further.table} == {(FURTHER, "dog-face"), (FURTHER, "fox")}
    assert FURTHER in (scorer / "README.md").read_text()
    assert len(list((toy_project / recipe.SUBJECTS / "rex").glob("*.png"))) == 2
    found = json.loads((model / "quality.json").read_text())
    assert set(found["rows"]) == {"model", "random weights", "composed"}
    for judges in found["rows"].values():
        assert all(0 <= share <= 1 for right in judges.values() for share in right.values())
        assert set(judges) == {"scorer", "judge"}
    assert "| this model | judge |" in (model / "README.md").read_text()
    assert (model / "contact-sheet.png").is_file()
    assert "gamma" in (scorer / "README.md").read_text()
    assert_loads(toy_project, model, scorer)
    again = repro(toy_project)
    assert again.returncode == 0
    assert "up to date" in again.stdout
    assert "Running stage" not in again.stdout


def assert_loads(root: Path, model: Path, scorer: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from dreambooth.scorer import BundledScorer

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a photo of a dog in space", num_inference_steps=2).images
    judge = BundledScorer(scorer)
    assert judge.embed_images(images).shape == judge.embed_texts(["a photo of a dog in space"]).shape


@pytest.mark.slow
def test_without_npm_the_first_stage_says_what_to_install(toy_project: Path, tmp_path: Path) -> None:
    shutil.rmtree(toy_project / recipe.SCRATCH)
    (tmp_path / "bin").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "base.icons"],
        cwd=toy_project, env=os.environ | {"PYTHONPATH": str(toy_project), "PATH": str(tmp_path / "bin")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "npm is not installed" in done.stderr
    assert "install Node.js" in done.stderr

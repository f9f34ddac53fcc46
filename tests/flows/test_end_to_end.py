"""The command, the flow, the real stages, a real registry and the bundled model, with a few steps of everything."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from toy_project import REPOSITORY, dvc, make_photos, quiet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def real_project(tmp_path: Path) -> Path:
    """Return a project with this repository's dvc.yaml, code, prompts and bundled model, and no subject."""
    from dvc.repo import Repo

    root = tmp_path / "project"
    for folder in ("dreambooth", "stages", "data/classes", "data/prompts", "data/base/emoji64"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text()) | {"subjects": {}, "classes": {}}
    values["prior"] |= {"num_class_images": 5, "num_inference_steps": 4, "batch_size": 4}
    values["train"] |= {"max_train_steps": 4}
    values["evaluate"] |= {"seeds": [1], "num_inference_steps": 4}
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    Repo.init(str(root), no_scm=True).close()
    return root


def test_from_photos_to_pictures_by_three_commands(real_project: Path, tmp_path: Path) -> None:
    def dreambooth(*arguments: str) -> str:
        environment = {**quiet(tmp_path / "prefect"), "COLUMNS": "160"}
        command = [sys.executable, "-m", "flows.cli", *arguments]
        environment["PYTHONPATH"] = str(REPOSITORY)
        done = subprocess.run(command, cwd=real_project, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    make_photos(tmp_path / "camera", 4)
    assert "Next: dreambooth run tom" in dreambooth("add", "tom", str(tmp_path / "camera"), "--class-noun", "cat")
    first = dreambooth("run")
    assert "models:/tom@challenger (v1)" in first
    assert "prior cat: 0 reused, 5 generated" in first
    assert '"start and registration"' in (real_project / ".scratch/rates.jsonl").read_text()
    assert "identity" in first
    assert "didn't change" in dvc(real_project, "repro").stdout
    assert "Everything is up to date." in dreambooth("run", "tom")
    shown = dreambooth("generate", "tom", "a photo of {} in space", "-n", "2", "--seed", "7", "--steps", "2")
    pictures = [real_project / line for line in shown.splitlines()]
    assert [path.name for path in pictures] == [
        "a-photo-of-sks-cat-in-space-v1-steps2-7.png",
        "a-photo-of-sks-cat-in-space-v1-steps2-8.png",
        "sheet-a-photo-of-sks-cat-in-space-v1-steps2-7.png",
    ]
    assert all(path.is_file() for path in pictures)
    with Image.open(pictures[0]) as drawn:
        assert drawn.size == (64, 64)
    assert "v1" in dreambooth("status")
    assert "as before" in dreambooth("register", "tom")

"""A disk that is full: what was whole stays whole, nothing half is left, and the message says how to go on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from registered import write_export
from tiny_project import REPOSITORY, add_photos, make_photo
from toy_checkpoints import open_checkpoints
from waiting import free_port

from dreambooth import folders, methods, mlflowstore, tracking
from dreambooth.errors import RegistryError
from dreambooth.folders import DiskFullError, content_hash, new_folder, read_manifest, write_file
from dreambooth.models import Model, load_model
from dreambooth.params import Prior, load_params
from dreambooth.priors import ensure_class_images
from dreambooth.registry import register
from dreambooth.versions import find
from stages import train


def fill(disk: Path, free: int) -> Path:
    """Leave about `free` bytes of a disk."""
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free))
    return disk / "ballast"


@pytest.mark.fault(19)
def test_a_folder_and_a_file_that_find_no_room_leave_the_old_ones(small_disk: Path) -> None:
    with new_folder(small_disk / "report", {}) as folder:
        (folder / "index.html").write_text("old")
    write_file(small_disk / "index.html", b"old")
    ballast = fill(small_disk, 100_000)

    def report() -> None:
        with new_folder(small_disk / "report", {}) as folder:
            (folder / "index.html").write_bytes(bytes(400_000))

    for write in (report, lambda: write_file(small_disk / "index.html", bytes(400_000))):
        with pytest.raises(OSError, match="No space left"):
            write()
    ballast.unlink()
    assert sorted(path.name for path in small_disk.iterdir()) == ["index.html", "report"]
    assert (small_disk / "index.html").read_bytes() == b"old"
    assert read_manifest(small_disk / "report")["files"]["index.html"]["size"] == 3


@pytest.mark.parametrize(
    ("changes", "copies", "bytes_per_weight"),
    [
        ({"checkpointing_steps": 5}, 3, 12),
        ({"checkpointing_steps": 5, "evaluation_steps": 5}, 3, 12),
        ({"checkpointing_steps": 5, "evaluation_steps": 5, "load_best_model_at_end": True}, 4, 12),
        ({"checkpointing_steps": 5, "ema_decay": 0.9}, 3, 16),
        ({"checkpointing_steps": 5, "optimizer": "prodigy"}, 3, 20),
        ({"checkpointing_steps": None}, 1, 12),  # the one of a stop
    ],
    ids=["two and the next", "measured alone", "and the best", "averages", "four moments", "none between"],
)
@pytest.mark.fault(20)
def test_a_training_asks_for_room_for_the_checkpoints_it_will_write_less_those_that_are_there(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], copies: int, bytes_per_weight: int,
) -> None:  # fmt: skip
    params = load_params(project / "params.yaml")
    params = params.model_copy(update={"train": params.train.model_copy(update={"evaluation_steps": None} | changes)})
    model = load_model(project / params.base.pretrained_model_name_or_path, device="cpu")
    needed = copies * bytes_per_weight * methods.count_weights(model, params.train)
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    monkeypatch.setattr(folders, "free_bytes", lambda folder: needed - 1000)
    with pytest.raises(DiskFullError, match=f"training with checkpoints needs {needed:,} bytes"):
        train._require_room(params, model, checkpoints)
    write_file(checkpoints.folder / "step-0000001", bytes(1000))
    train._require_room(params, model, checkpoints)


@pytest.mark.fault(19)
def test_a_stage_without_room_exits_with_71_and_the_free_bytes(small_disk: Path, params_values: dict[str, Any]) -> None:
    add_photos(small_disk / "data/subjects/biscuit", 2)
    make_photo(7, 800).save(small_disk / "data/subjects/biscuit/large.jpg")
    (small_disk / "params.yaml").write_text(yaml.safe_dump(params_values, sort_keys=False))
    fill(small_disk, 60_000)
    command = [sys.executable, "-m", "stages.validate", "biscuit"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=small_disk, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 71, done.stderr
    assert "E_DISK_FULL" in done.stderr
    assert "bytes free); make room, run again" in done.stderr
    assert [path for path in (small_disk / "build").rglob("*") if path.is_file()] == []


@pytest.mark.fault(19)
def test_class_images_that_found_no_room_are_continued(
    small_disk: Path, tiny_model_folder: Path, params_values: dict[str, Any]
) -> None:
    prior = Prior(**params_values["prior"])
    model: Model = load_model(tiny_model_folder)
    ballast = fill(small_disk, 12_000)
    store = small_disk / "store"
    with pytest.raises(OSError, match="No space left"):
        ensure_class_images(store, ["a photo of a dog"], lambda: model, prior, 32)
    ballast.unlink()
    report = str(ensure_class_images(store, ["a photo of a dog"], lambda: model, prior, 32))
    again = str(ensure_class_images(store, ["a photo of a dog"], lambda: model, prior, 32))
    assert "generated" in report
    assert again.startswith("5 reused, 0 generated")


@pytest.mark.fault(19)
@pytest.mark.parametrize("answers", [True, False], ids=["MLflow answers", "MLflow is away"])
def test_a_run_on_a_full_disk_goes_on_and_says_in_one_line_what_mlflow_does_not_get(
    small_disk: Path, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, answers: bool,
) -> None:  # fmt: skip
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    where = f"sqlite:///{tmp_path}/mlflow.db" if answers else f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where)
    monkeypatch.delenv("DREAMBOOTH_TRACKING")
    (tmp_path / "grid.png").write_bytes(bytes(100_000))
    fill(small_disk, 0)
    with tracking.open_run(small_disk, key="a" * 64, name="train biscuit") as run:
        run.metrics({"loss": 1.0}, 1)
        if answers:
            run.file(tmp_path / "grid.png", "pictures")
        done = "trained"
    assert done == "trained"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dreambooth.tracking"]
    assert "'train biscuit'" in line
    assert "No space left on device" in line
    assert ("1 files of" if answers else "1 metrics") in line
    assert not list((small_disk / ".scratch/unsent").iterdir())
    if answers:
        (stored,) = mlflowstore.connect(small_disk)[0].search_runs(["1"])
        assert (stored.info.status, stored.data.metrics) == ("FINISHED", {"loss": 1.0})


@pytest.fixture
def database(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put MLflow's database alone on the small disk, with no room to grow."""
    from mlflow.tracking import MlflowClient

    file = small_disk / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").create_experiment(
        "dreambooth", artifact_location=(tmp_path / "mlartifacts").as_uri()
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    monkeypatch.delenv("DREAMBOOTH_TRACKING", raising=False)
    return file


@pytest.mark.slow
@pytest.mark.fault(19)
def test_a_database_without_room_costs_one_warning_and_nothing_is_lost(
    database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ballast = fill(database.parent, 0)
    with tracking.open_run(tmp_path, key="a" * 64, name="train biscuit") as run:
        for step in range(5000):
            run.metrics({"loss": 1.0}, step)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dreambooth.tracking"]
    assert "did not take all of 'train biscuit'" in line
    assert "full" in line
    assert "5000 metrics" in line
    ballast.unlink()
    assert tracking.resend(tmp_path) == []
    (stored,) = mlflowstore.connect(tmp_path)[0].search_runs(["1"])
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics == {"loss": 1.0}
    assert len(mlflowstore.connect(tmp_path)[0].get_metric_history(stored.info.run_id, "loss")) == 5000


@pytest.mark.slow
@pytest.mark.fault(19)
def test_a_registration_that_finds_no_room_in_the_database_is_one_line_and_the_export_stays(
    database: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    write_export(tmp_path, tiny_model_folder, "1" * 64)
    export = content_hash(tmp_path / "export/biscuit")
    ballast = fill(database.parent, 0)
    with pytest.raises(RegistryError, match=r"^cannot register biscuit in .*full.*; the export stays as it is") as full:
        register(tmp_path, "biscuit")
    assert "\n" not in str(full.value)
    assert content_hash(tmp_path / "export/biscuit") == export
    ballast.unlink()
    assert find(tmp_path, "biscuit") is None
    assert register(tmp_path, "biscuit").version == 1


@pytest.mark.slow
@pytest.mark.fault(19)
def test_a_new_database_that_finds_no_room_is_one_line(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{small_disk / 'mlflow.db'}")
    fill(small_disk, 20_000)
    with pytest.raises(OSError, match="full"):
        mlflowstore.connect(small_disk)

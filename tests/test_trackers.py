"""Trackers beside MLflow: what they are told is read back from what they wrote."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_project import make_project, write_params

from dreambooth import trackers
from dreambooth.errors import ParamsError, TrackerError
from dreambooth.params import load_params, parse_params
from dreambooth.trackers import open_trackers
from stages import prior, train, validate


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))


def curves(folder: Path) -> Any:
    """Read what TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


@pytest.mark.slow
def test_a_training_is_told_to_both_while_it_goes_on(
    tmp_path: Path, tiny_model_folder: Path, params_values: dict[str, Any]
) -> None:
    params_values["tracking"]["report_to"] = ["tensorboard", "wandb"]
    params_values["train"] |= {"preview_steps": 2, "evaluation_steps": 2, "learning_rate": 1.0e-4}
    root = make_project(tmp_path / "project", tiny_model_folder, params_values)
    params = load_params(root / "params.yaml")
    validate.run(params, "biscuit", root)
    prior.run(params, "dog", root)
    train.run(params, "biscuit", root)
    (folder,) = (path for path in (root / ".scratch/trackers/biscuit").iterdir() if path.name != "wandb")
    events = curves(folder)
    assert [point.step for point in events.Scalars("loss")] == [0, 1, 2, 3]
    assert [point.value for point in events.Scalars("learning_rate")] == pytest.approx([1e-4] * 4)
    assert [point.step for point in events.Scalars("evaluation_loss_instance")] == [2, 4]
    assert {point.step for point in events.Images("previews")} == {2, 4}
    (run,) = (root / ".scratch/trackers/biscuit/wandb").glob("offline-run-*")
    assert run.name.endswith(folder.name)
    assert len(list((run / "files/media/images").rglob("*.png"))) == 2 * 3
    assert b"loss_instance" in next(run.glob("*.wandb")).read_bytes()


def test_a_missing_package_is_named_before_anything_is_loaded(
    project: Path, params_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params_values["tracking"]["report_to"] = ["wandb"]
    write_params(project, params_values)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        TrackerError, match=r"wandb is not installed; pip install 'dreambooth\[wandb\]', or take it out"
    ):
        train.run(load_params(project / "params.yaml"), "biscuit", project)


def test_one_that_does_not_start_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # it reads the environment once in a process
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # no account, and nobody to ask for one
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with (
        pytest.raises(TrackerError, match=r"wandb does not start \(.*\); wandb login, or WANDB_MODE=offline"),
        open_trackers(["wandb"], tmp_path / "logs", "0" * 64, "biscuit"),
    ):
        pass


def test_one_that_fails_later_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_trackers(["tensorboard"], tmp_path, "1" * 64, "biscuit") as told:
        told.metrics({"loss": 0.5, "loss_prior": None}, step=0)
        told.pictures([Image.new("RGB", (8, 8))] * 2, "previews", 1)
        told._open[0].writer = None  # the disk is gone
        told.metrics({"loss": 0.4}, step=1)
        told.metrics({"loss": 0.3}, step=2)
    assert [record.message for record in caplog.records if "told nothing more" in record.message] == [
        "tensorboard is told nothing more of this training: 'NoneType' object has no attribute 'add_scalar'"
    ]
    events = curves(tmp_path / ("1" * 16))
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(0, 0.5)]
    assert "loss_prior" not in events.Tags()["scalars"]


def test_none_leaves_nothing_behind(tmp_path: Path) -> None:
    with open_trackers([], tmp_path / "logs", "0" * 64, "biscuit") as told:
        told.params({"a": None})
        told.metrics({"loss": 0.5})
    assert not (tmp_path / "logs").exists()


def test_an_unknown_tracker_is_refused(params_values: dict[str, Any]) -> None:
    params_values["tracking"]["report_to"] = ["comet"]
    with pytest.raises(ParamsError, match=r"tracking\.report_to"):
        parse_params(params_values)

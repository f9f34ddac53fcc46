import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from registered import write_project
from tiny_project import REPOSITORY, add_photos, tiny_values

import dreambooth
from dreambooth import hardware, health, mlflowstore
from dreambooth.health import Finding
from dreambooth.locks import only_one
from dreambooth.params import parse_params
from dreambooth.photos import check_photos
from flows.doctor import _copies, _device, _libraries, _program, _servers, examine, installed


@pytest.fixture
def root(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_project(tmp_path / "project", _empty(tmp_path))
    (tmp_path / "project" / "mlflow.db").unlink()
    return tmp_path / "project"


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty.db").touch()
    return tmp_path / "empty.db"


def about(findings: list[Finding], what: str) -> Finding:
    return next(one for one in findings if one.what == what)


def test_a_new_project_is_whole_and_is_left_as_it_is(root: Path) -> None:
    findings = examine(root)
    assert about(findings, "database").state == "good"
    assert not (root / "mlflow.db").exists()
    assert about(findings, "libraries").state == "good"
    assert "dvc init" in about(findings, "DVC").remedy


def test_a_damaged_database_is_named(root: Path) -> None:
    (root / "mlflow.db").write_bytes(b"SQLite format 3\0" + b"x" * 4096)
    found = about(examine(root), "database")
    assert found.is_broken
    assert "mlflow.db" in found.found
    assert "backup" in found.remedy


def test_what_killed_processes_left_is_named(root: Path) -> None:
    (root / ".scratch/upload-abc").mkdir(parents=True)
    (root / ".scratch/unsent/x").mkdir(parents=True)
    (root / ".scratch/unsent/x/pending.json").touch()
    (root / ".scratch/checkpoints/rex-0123").mkdir(parents=True)
    (root / ".scratch/forget-rex.json").touch()
    findings = examine(root)
    assert "upload-abc" in about(findings, "scratch").found
    assert "dreambooth.tracking" in about(findings, "metrics").remedy
    assert "rex-0123" in about(findings, "checkpoints").found
    assert about(findings, "forget rex").remedy == "dreambooth forget rex --yes"


def test_checkpoints_of_a_training_that_nobody_continues_are_named_with_their_size(root: Path) -> None:
    params = yaml.safe_load((root / "params.yaml").read_text())
    subject = next(iter(params["subjects"]))
    for name, age in (("old", 8), ("new", 6)):
        folder = root / f".scratch/checkpoints/{subject}-{name}/step-0000001"
        folder.mkdir(parents=True)
        with (folder / "moments.safetensors").open("wb") as file:
            file.truncate(250_000_000)
        for path in (folder, folder.parent):
            os.utime(path, (time.time() - 86400 * age,) * 2)
    assert about(examine(root), "checkpoints").found == (
        f"of trainings stopped over 7 days ago: {subject}-old (0.2 GB)"
    )


@pytest.mark.parametrize(
    ("listener", "environment", "said"),
    [
        (("0.0.0.0", 5000, "python -m mlflow server"), {}, ["MLflow server"]),
        (("192.168.1.5", 5000, "/venv/bin/mlflow server --host 192.168.1.5"), {}, ["MLflow server"]),
        (("fe80::1%eth0", 5000, "mlflow server"), {}, ["MLflow server"]),
        (("127.0.1.1", 5000, "mlflow server"), {}, []),
        (("::1", 5000, "mlflow server"), {}, []),
        (("::ffff:127.0.0.1", 5000, "mlflow server"), {}, []),
        (("10.0.0.2", 5000, "python -m uvicorn mlflow.server.auth:create_app --factory"), {}, []),
        (("10.0.0.2", 5000, "python -m uvicorn mlflow.server.fastapi_app:app"), {}, ["MLflow server"]),
        (("10.0.0.2", 4200, "/home/mlflow/bin/prefect server start"), {}, ["Prefect server"]),
        (
            ("10.0.0.2", 4200, "uvicorn --app-dir /work/mlflow prefect.server.api.server:create_app"),
            {},
            ["Prefect server"],
        ),
        (("127.0.0.1", 4200, "prefect server start"), {"PREFECT_SERVER_API_HOST": "192.168.1.5"}, ["Prefect server"]),
        (("127.0.0.1", 4200, "prefect server start"), {"PREFECT_SERVER_API_HOST": "localhost"}, []),
        (("0.0.0.0", 5000, "mlflow server --app-name basic-auth"), {}, []),
        (("127.0.0.1", 5000, "mlflow server"), {}, []),
        (("::", 4200, "prefect server start"), {}, ["Prefect server"]),
        (("::", 4200, "prefect server start"), {"PREFECT_SERVER_API_AUTH_STRING": "a:b"}, []),
        (("127.0.0.1", 4200, "prefect server start"), {"PREFECT_SERVER_API_HOST": "0.0.0.0"}, ["Prefect server"]),
    ],
)
@pytest.mark.threat(15, 16)
def test_a_server_that_is_open_to_the_network_is_a_warning(
    listener: tuple[str, int, str], environment: dict[str, str], said: list[str]
) -> None:
    address, port, command = listener
    found = list(_servers([(address, port, tuple(command.split()))], environment))
    assert [one.what for one in found] == said
    assert all((one.state == "warning" and "127.0.0.1" in one.remedy) or "unset" in one.remedy for one in found)


@pytest.mark.parametrize(
    "command", ["cat /work/mlflow/notes", "python /srv/prefect/app.py", "uvicorn app --x mlflow.d/y"]
)
def test_a_path_with_the_name_of_a_server_makes_no_server(command: str) -> None:
    assert _program(command.split()) == ""


def test_clones_and_sweeps_that_killed_processes_left_are_named_with_their_size(root: Path) -> None:
    clone, sweep, used = (
        root / ".scratch/clone-abc",
        root / ".dvc/tmp/exps/standalone/tmpxyz",
        root / ".scratch/clone-d",
    )
    for folder in (clone / "project", sweep, used / "project"):
        folder.mkdir(parents=True)
        with (folder / "weights").open("wb") as file:
            file.truncate(250_000_000)
    with only_one(used, "owner", "work in a clone"):
        findings = list(_copies(root))
    assert [(one.what, one.remedy) for one in findings] == [("clone", f"rm -r {clone}"), ("sweep", f"rm -r {sweep}")]
    assert all("(0.2 GB)" in one.found or "(0.3 GB)" in one.found for one in findings)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fastapi": "0.151.0"}, "fastapi 0.151.0, wanted <0.151,>=0.139"),
        ({"sqlalchemy": "2.1"}, "sqlalchemy 2.1"),
        ({"mlflow": "3.9.1"}, "mlflow 3.9.1, wanted <4,>=3.11"),
        ({"torch": None}, "torch is missing"),
        ({"prefect": "3.8.0rc1"}, "prefect 3.8.0rc1, wanted <4,>=3.8"),  # before the first that is wanted
        ({"prefect": "3.9.0rc1"}, None),
        ({"torch": "2.10.0+cpu"}, None),
    ],
)
@pytest.mark.threat(19)
def test_a_library_outside_of_its_bounds_is_named(changed: dict[str, Any], said: str | None) -> None:
    (found,) = _libraries(lambda name: changed[name] if name in changed else installed(name))
    assert found.is_broken == (said is not None)
    assert (said or "within their bounds") in found.found


def test_versions_are_told_as_security_md_asks_for_them() -> None:
    (found,) = _libraries(lambda name: "2.10.0+cpu" if name == "torch" else installed(name))
    assert "doctor" in (REPOSITORY / "SECURITY.md").read_text()
    assert f"dreambooth {dreambooth.__version__}, torch 2.10.0+cpu, diffusers {installed('diffusers')}" in found.found
    assert all(f"{name} {installed(name)}" in found.found for name in ("prefect", "dvc", "mlflow"))


@pytest.mark.parametrize(
    ("gpu", "tiles", "dtype", "found", "hint"),
    [
        (None, False, "float32", "the CPU", ""),
        (None, True, "float32", "the CPU", "base.inference_dtype: bfloat16"),
        (None, True, "bfloat16", "the CPU", ""),
        ("H200, 144 GB", False, "float32", "H200, 144 GB", "base.inference_dtype: float16"),  # as save_dtype
        ("H200, 144 GB", False, "float16", "H200, 144 GB", ""),
    ],
)
def test_what_computes_is_told_and_a_precision_that_would_draw_faster(
    params_values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    gpu: str | None,
    tiles: bool,
    dtype: str,
    found: str,
    hint: str,
) -> None:
    monkeypatch.setattr(hardware, "gpu_in_words", lambda: gpu)
    monkeypatch.setattr(hardware, "cpu_has_tiles", lambda: tiles)
    params_values["base"]["inference_dtype"] = dtype
    (finding,) = _device(parse_params(params_values))
    assert finding.found.startswith(found)
    assert finding.remedy.partition(" draws")[0] == hint


def test_a_gpu_that_only_emulates_bfloat16_is_told_to_take_float16(
    params_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpu_in_words", lambda: "T4, 16 GB")
    monkeypatch.setattr(hardware, "gpu_lacks_bfloat16", lambda: True)
    for dtype in ("float32", "bfloat16", "float16"):
        params_values["base"]["inference_dtype"] = dtype
        (finding,) = _device(parse_params(params_values))
        assert ("inference_dtype: float16" in finding.remedy) == (dtype != "float16")


@pytest.mark.parametrize("cuda", ["12.8", None])
def test_a_gpu_that_torch_cannot_use_is_a_warning_unless_it_is_hidden(
    params_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None
) -> None:
    monkeypatch.setattr(hardware, "NVIDIA", (str(tmp_path),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (finding,) = _device(parse_params(params_values))
    assert (finding.state, finding.found) == ("warning", "the CPU: there is no GPU that torch can use")
    built = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    for said in (f"torch {torch.__version__}, {built}", "nvidia-smi", "https://pytorch.org/get-started/locally/"):
        assert said in finding.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [one.state for one in _device(parse_params(params_values))] == ["good"]


@pytest.mark.parametrize(("what", "count"), [("uploads", 5), ("runs", 5)])
def test_what_is_left_behind_is_counted_on_every_page(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch, what: str, count: int
) -> None:
    from mlflow.tracking import MlflowClient

    write_project(tmp_path / "project", empty_database)
    client, experiment = mlflowstore.connect(tmp_path / "project")
    for number in range(count):
        client.create_logged_model(experiment, name=f"upload-{number}")
        client.create_run(experiment)
    for name in ("search_logged_models", "search_runs"):
        search = getattr(MlflowClient, name)
        monkeypatch.setattr(MlflowClient, name, lambda *a, _search=search, **b: _search(*a, **b | {"max_results": 2}))
    monkeypatch.setattr(health, "DAY", -1)
    assert about(examine(tmp_path / "project"), what).found.startswith(f"{count} ")


def test_keys_of_the_run_cache_without_an_entry_are_named_and_the_remedy_removes_them(root: Path) -> None:
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=root, check=True)
    runs = root / ".dvc/cache/runs"
    for key in ("ab/abcd", "ab/abef", "cd/cdef"):
        (runs / key).mkdir(parents=True)
    (runs / "ab/abcd/entry").touch()
    found = about(examine(root), "DVC run cache")
    assert found.is_broken
    assert found.found.startswith("2 of its keys have no entry")
    subprocess.run(found.remedy.removeprefix("when nothing runs: "), shell=True, check=True)
    assert sorted(path.name for path in runs.iterdir()) == ["ab"]
    assert "DVC run cache" not in [one.what for one in examine(root)]


def test_photos_that_dvc_made_links_are_named_and_the_remedy_makes_them_files(root: Path) -> None:
    add_photos(root / "data/subjects/rex", 2)

    def dvc(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True, capture_output=True)

    dvc("init", "--no-scm", "--quiet")
    dvc("config", "cache.type", "symlink")
    dvc("add", "--quiet", "data/subjects/rex")
    found = about(examine(root), "DVC links")
    assert found.is_broken
    assert "photos of rex are symbolic links" in found.found
    for command in found.remedy.split("; "):
        dvc(*command.split()[1:])
    assert "DVC links" not in [one.what for one in examine(root)]
    assert len(check_photos(root / "data/subjects/rex", parse_params(tiny_values()).photos)) == 2

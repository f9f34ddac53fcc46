import base64
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from PIL import Image
from registered import load
from waiting import await_server, free_port

from dreambooth import folders, mlflowstore, registry
from dreambooth import versions as registered
from dreambooth.aliases import history, move, read_log
from dreambooth.errors import RegistryError, SubjectError
from dreambooth.folders import DiskFullError, TornFolderError, new_folder
from dreambooth.images import read_provenance
from dreambooth.registry import SCORES, register
from dreambooth.versions import RegisteredVersion, find
from flows.generate import draw

BISCUIT = "biscuit"
CALL = {"prompt": "a photo of sks dog"}


@pytest.fixture
def root(tmp_path: Path, empty_database: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one export, and a path that has to be quoted, far from the current folder."""
    folder = tmp_path / "my project 100%"
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    write_export(folder, tiny_model_folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_REGISTRY_URI", "DREAMBOOTH_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    return folder


def write_export(root: Path, pipeline: Path, note: str = "") -> None:
    defaults = {
        "subject": BISCUIT, "identifier": "sks", "class_noun": "dog", "instance_prompt": "a photo of sks dog",
        "resolution": 32, "scheduler": "ddim", "num_inference_steps": 2, "guidance_scale": 5.0, "negative_prompt": "",
    }  # fmt: skip
    with new_folder(root / "export" / BISCUIT, {"base": "b" * 64, "model": "f" * 64}) as target:
        shutil.copytree(pipeline, target, dirs_exist_ok=True)
        (target / "generation.json").write_text(json.dumps(defaults))
        (target / "README.md").write_text(f"# biscuit {note}\n")


def write_evaluation(root: Path, model: str = "f" * 64, fingerprint: str = "e" * 64, **more: Any) -> None:
    with new_folder(root / "build" / BISCUIT / "evaluation", {"model": model, "fingerprint": fingerprint}) as target:
        Image.new("RGB", (4, 4)).save(target / "grid.png")
        for name in SCORES:
            (target / name).touch()
    (root / "metrics").mkdir(exist_ok=True)
    content = {"identity": {"personalised": 0.75, "low": None}, "photos": 5, "encoder": {"name": "lite0"}} | more
    (root / "metrics" / f"{BISCUIT}.json").write_text(json.dumps(content))


def versions(root: Path) -> list[Any]:
    return sorted(
        mlflowstore.connect(root)[0].search_model_versions(f"name = '{BISCUIT}'"), key=lambda v: int(v.version)
    )


def places(root: Path) -> list[Path]:
    return [folder for folder in (root / "mlartifacts/models").iterdir() if folder.name.startswith("m-")]


def stored_unet(root: Path) -> Path:
    (place,) = places(root)
    return place / f"artifacts/artifacts/{BISCUIT}/unet/diffusion_pytorch_model.safetensors"


def test_a_path_in_which_mlflow_would_read_another_is_refused_before_anything_is_sent(root: Path) -> None:
    other = root.rename(root.with_name("a%41b"))
    with pytest.raises(
        RegistryError, match=r"/a%41b: MLflow reads it as .*/aAb, .*; rename it without % before two hexa"
    ):
        register(other, BISCUIT)
    assert not (other / "mlartifacts").exists()


@pytest.mark.fault(30)
def test_an_export_is_one_version_however_often_it_is_registered(root: Path) -> None:
    first, again = register(root, BISCUIT), register(root, BISCUIT)
    assert first == RegisteredVersion(BISCUIT, 1, True, first.export_hash)
    assert again == RegisteredVersion(BISCUIT, 1, False, first.export_hash)
    assert find(root, BISCUIT) == find(root, BISCUIT, version=1) == find(root, BISCUIT, alias="challenger") == again
    (stored,) = versions(root)
    assert stored.tags["dreambooth.base"] == "b" * 64
    assert stored.tags["dreambooth.identifier"] == "sks"
    assert len(places(root)) == 1
    assert not list(Path.cwd().iterdir())  # no ./mlflow.db, no ./mlruns


def test_the_challenger_is_what_was_registered_last_and_every_move_is_written_down(
    root: Path, tiny_model_folder: Path
) -> None:
    register(root, BISCUIT)
    write_export(root, tiny_model_folder, note="second")
    assert register(root, BISCUIT).version == 2
    write_export(root, tiny_model_folder)
    back = register(root, BISCUIT)
    assert (back.version, back.created) == (1, False)
    challenger = find(root, BISCUIT, alias="challenger")
    assert challenger is not None
    assert challenger.version == 1
    entries = read_log(mlflowstore.connect(root)[0], BISCUIT)
    assert [(entry.before, entry.after) for entry in entries] == [(None, 1), (1, 2), (2, 1)]
    assert history(entries, "challenger") == [1, 2, 1]


def test_a_version_that_another_program_has_not_finished_hides_no_older_one(
    root: Path, tiny_model_folder: Path
) -> None:
    for note in ("first", "second"):
        write_export(root, tiny_model_folder, note)
        register(root, BISCUIT)
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute(
            "UPDATE model_versions SET status = 'PENDING_REGISTRATION' WHERE name = 'biscuit' AND version = 2"
        )
    newest = find(root, BISCUIT)
    assert newest is not None
    assert newest.version == 1


def test_a_torn_export_is_not_registered(root: Path) -> None:
    unet = root / "export" / BISCUIT / "unet/diffusion_pytorch_model.safetensors"
    unet.write_bytes(unet.read_bytes()[:-1])
    with pytest.raises(TornFolderError, match=r"unet/diffusion_pytorch_model\.safetensors has"):
        register(root, BISCUIT)
    assert find(root, BISCUIT) is None


def test_a_missing_export_says_what_makes_it(root: Path) -> None:
    with pytest.raises(RegistryError, match=r"export/rex does not exist; dreambooth run rex"):
        register(root, "rex")
    with pytest.raises(SubjectError):
        register(root, "../rex")


@pytest.mark.fault(29)
def test_an_upload_that_was_killed_leaves_no_version_and_is_taken_up_again(root: Path) -> None:
    program = """
import os, shutil, signal, sys
from pathlib import Path
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

def half(self, local_dir, artifact_path=None):
    shutil.copytree(local_dir, self.artifact_dir, dirs_exist_ok=True)
    shutil.rmtree(Path(self.artifact_dir) / "artifacts/biscuit/unet")
    os.kill(os.getpid(), signal.SIGKILL)

LocalArtifactRepository.log_artifacts = half
from dreambooth.images import read_provenance
from dreambooth.registry import register
register(Path(sys.argv[1]), "biscuit")
"""
    killed = subprocess.run([sys.executable, "-c", program, str(root)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert find(root, BISCUIT) is None
    assert not stored_unet(root).exists()
    assert register(root, BISCUIT).created
    assert [int(version.version) for version in versions(root)] == [1]
    assert stored_unet(root).exists()  # in the same place: nothing is left lying about


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_an_upload_that_arrives_damaged_makes_no_version(
    root: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    whole = LocalArtifactRepository.log_artifacts

    def damaged(self: Any, local_dir: str, artifact_path: str | None = None) -> None:
        whole(self, local_dir, artifact_path)
        content = bytearray(stored_unet(root).read_bytes())
        content[-1] ^= 1
        if damage == "missing":
            stored_unet(root).unlink()
        else:
            stored_unet(root).write_bytes(content[:-1] if damage == "short" else content)

    with monkeypatch.context() as patch:
        patch.setattr(LocalArtifactRepository, "log_artifacts", damaged)
        with pytest.raises(RegistryError, match=r"arrived damaged .*unet/.*no version was made, try again"):
            register(root, BISCUIT)
    assert find(root, BISCUIT) is None
    assert register(root, BISCUIT).version == 1


def test_a_version_whose_files_are_gone_gets_them_back(root: Path) -> None:
    register(root, BISCUIT)
    content = stored_unet(root).read_bytes()
    stored_unet(root).unlink()
    with pytest.raises(RegistryError, match="unet"):
        load(root, BISCUIT)
    assert register(root, BISCUIT).version == 1
    assert stored_unet(root).read_bytes() == content
    load(root, BISCUIT)


def test_a_version_whose_files_were_deleted_for_good_gives_way_to_a_new_one(root: Path) -> None:
    client = mlflowstore.connect(root)[0]
    register(root, BISCUIT)
    client.delete_logged_model(versions(root)[0].tags["dreambooth.model_id"])
    again = register(root, BISCUIT)
    assert (again.version, again.created) == (2, True)
    assert load(root, BISCUIT).predict(CALL, params={"seed": 1})
    assert register(root, BISCUIT).version == 2
    assert [version.version for version in versions(root)] == [1, 2]


def test_files_that_were_changed_in_the_store_are_not_loaded(root: Path) -> None:
    register(root, BISCUIT)
    content = bytearray(stored_unet(root).read_bytes())
    content[-1] ^= 1
    stored_unet(root).write_bytes(content)
    with pytest.raises(RegistryError, match="was changed"):
        load(root, BISCUIT)


def test_the_champion_is_loaded_before_the_challenger(
    root: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for note in ("one", "two", "three"):
        write_export(root, tiny_model_folder, note)
        register(root, BISCUIT)
    loaded: list[Path] = []
    monkeypatch.setattr(registered, "load_folder", lambda root, folder: loaded.append(folder))
    client = mlflowstore.connect(root)[0]
    move(client, BISCUIT, "register", "challenger", 3, 2)
    move(client, BISCUIT, "promote", "champion", None, 1)
    load(root, BISCUIT)
    client.delete_registered_model_alias(BISCUIT, "champion")
    load(root, BISCUIT)
    client.delete_registered_model_alias(BISCUIT, "challenger")
    load(root, BISCUIT)
    load(root, BISCUIT, version=1)
    notes = [(folder / f"artifacts/{BISCUIT}/README.md").read_text().split()[2] for folder in loaded]
    assert notes == ["one", "two", "three", "one"]


def test_a_loaded_version_draws_and_leaves_the_import_path_alone(root: Path) -> None:
    register(root, BISCUIT)
    before = list(sys.path)
    (picture,) = load(root, BISCUIT).predict(CALL, params={"seed": 1})
    assert picture.startswith(b"\x89PNG")
    assert sys.path == before


def test_scores_and_grid_stand_beside_the_version(root: Path) -> None:
    write_evaluation(root)
    register(root, BISCUIT)
    (stored,) = versions(root)
    assert stored.tags["metric.identity.personalised"] == "0.75"
    run = mlflowstore.connect(root)[0].get_run(stored.run_id)
    assert run.data.metrics == {"identity.personalised": 0.75, "photos": 5.0}
    assert run.data.tags["dreambooth.key"] == "f" * 64  # the run that the training has opened, or will
    assert (root / "mlartifacts" / stored.run_id / "artifacts/grid.png").exists()


def test_scores_of_another_model_are_left_out(root: Path) -> None:
    write_evaluation(root, model="0" * 64)
    register(root, BISCUIT)
    (stored,) = versions(root)
    assert not [name for name in stored.tags if name.startswith("metric.")]


def test_scores_that_a_newer_evaluation_has_not_measured_are_not_those_of_the_one_before(root: Path) -> None:
    write_evaluation(root, prompt={"personalised": 0.3})
    register(root, BISCUIT)
    assert registered.rows(root, BISCUIT)[0].scores["prompt.personalised"] == 0.3
    write_evaluation(root, fingerprint="d" * 64)  # without the scorer
    assert not register(root, BISCUIT).created
    assert registered.rows(root, BISCUIT)[0].scores == {"identity.personalised": 0.75, "photos": 5.0}


def test_who_waits_for_the_versions_of_a_subject_says_at_once_for_whom_and_goes_on(
    root: Path,
) -> None:
    told: SimpleQueue[str] = SimpleQueue()
    with ThreadPoolExecutor() as pool:
        with registry.alone(root, BISCUIT, print):
            second = pool.submit(register, root, BISCUIT, say=told.put)
            line = told.get(timeout=60)
            assert not second.done()
        assert second.result(timeout=60).version == 1
    who = f"pid {os.getpid()} on {socket.gethostname()}"
    assert line.endswith(f"rollback or erasure of biscuit is already running: {who}; waiting for it")


def test_looking_for_a_version_makes_no_database(tmp_path: Path) -> None:
    assert find(tmp_path, BISCUIT) is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(RegistryError, match=r"biscuit has no version in sqlite.*; dreambooth run biscuit"):
        load(tmp_path, BISCUIT)


def test_what_is_not_there_is_none(root: Path) -> None:
    register(root, BISCUIT)
    assert find(root, "rex") is None
    assert find(root, BISCUIT, version=7) is None
    assert find(root, BISCUIT, alias="champion") is None
    assert registered.in_words(root, [BISCUIT, "rex"]) == {BISCUIT: "v1 @challenger", "rex": "none"}


@pytest.mark.fault(28)
def test_a_dead_server_is_one_line_and_the_export_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    with pytest.raises(RegistryError) as caught:
        register(root, BISCUIT)
    assert "Connection refused; the export stays as it is" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def add_to_dvc(root: Path) -> str:
    """Have the export in DVC's cache and in dvc.lock; return its md5."""
    from dvc.repo import Repo

    with Repo.init(str(root), no_scm=True) as repo:
        (added,) = repo.add(str(root / "export" / BISCUIT))
        md5 = str(added.outs[0].hash_info.value)
    lock = {"schema": "2.0", "stages": {"export@biscuit": {"outs": [{"path": f"export/{BISCUIT}", "md5": md5}]}}}
    (root / "dvc.lock").write_text(json.dumps(lock))
    return md5


def test_a_large_export_stays_in_dvc_and_is_served_from_there(root: Path, tiny_model_folder: Path) -> None:
    md5 = add_to_dvc(root)
    register(root, BISCUIT, max_logged_bytes=100_000)
    assert register(root, BISCUIT, max_logged_bytes=100_000).version == 1
    (stored,) = versions(root)
    assert (stored.tags["dvc.path"], stored.tags["dvc.md5"]) == (f"export/{BISCUIT}", md5)
    (place,) = places(root)
    assert files_of(place) == TEXTS
    assert not list(place.rglob("*.safetensors"))
    (expected,) = load(root, BISCUIT).predict(CALL, params={"seed": 1})
    shutil.rmtree(root / "export" / BISCUIT)
    write_export(root, tiny_model_folder, note="another")  # the next training took its place
    assert load(root, BISCUIT).predict(CALL, params={"seed": 1}) == [expected]
    shutil.rmtree(root / ".dvc/cache")
    with pytest.raises(RegistryError, match=r"neither does the cache of DVC .*dvc pull export/biscuit"):
        load(root, BISCUIT)


def test_a_large_export_of_a_clone_that_is_gone_is_served_from_the_project_that_asks(
    root: Path, tmp_path: Path
) -> None:
    add_to_dvc(root)
    register(root, BISCUIT, max_logged_bytes=0)
    (place,) = places(root)
    pointer = place / f"artifacts/artifacts/{BISCUIT}/pointer.json"
    gone = tmp_path / "clone-1" / "project"
    pointer.write_text(json.dumps(json.loads(pointer.read_text()) | {"root": str(gone)}))
    shutil.rmtree(root / "export")
    client, (version,) = mlflowstore.connect(root)[0], versions(root)
    assert registered.check_files(root, client, version, deep=False) == []
    assert registered.check_files(root, client, version) == []
    assert load(root, BISCUIT).predict(CALL)[0].startswith(b"\x89PNG")
    assert "DREAMBOOTH_HOME" not in os.environ
    assert not gone.parent.exists()


def test_a_large_export_is_served_from_the_project_that_made_it_where_the_one_that_asks_has_none(
    root: Path, tmp_path: Path
) -> None:
    add_to_dvc(root)
    register(root, BISCUIT, max_logged_bytes=0)
    another = tmp_path / "another"
    another.mkdir()
    shutil.copyfile(root / "mlflow.db", another / "mlflow.db")
    client, (version,) = mlflowstore.connect(another)[0], versions(root)
    assert registered.check_files(another, client, version) == []
    shutil.rmtree(root / "export")
    assert registered.check_files(another, client, version) == []
    assert list((another / ".scratch/pipelines").glob("*/unet"))  # laid out for who asks, who may forget it
    assert not (root / ".scratch/pipelines").exists()


@pytest.mark.parametrize("limit", [None, 0], ids=["copied", "behind a pointer"])
def test_whoever_looks_at_an_export_reads_each_file_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    register(root, BISCUIT, max_logged_bytes=limit)
    client, (version,) = mlflowstore.connect(root)[0], versions(root)
    unet, read, hash_file = "unet/diffusion_pytorch_model.safetensors", list[Path](), folders.sha256_of_file
    monkeypatch.setattr(folders, "sha256_of_file", lambda path: read.append(path) or hash_file(path))

    def times(look: Callable[[], object]) -> int:
        read.clear()
        look()
        assert len(read) == len(set(read))
        return sum(path.as_posix().endswith(unet) for path in read)

    def check(deep: bool) -> None:
        assert registered.check_files(root, client, version, deep) == []

    assert times(lambda: registry._read_export(root, BISCUIT, limit)) == 1
    assert times(lambda: check(deep=True)) == 1
    assert times(lambda: check(deep=False)) == (0 if limit is None else 1)
    assert times(lambda: load(root, BISCUIT)) == 1


def test_an_export_that_took_the_place_of_another_is_told_from_it_without_reading_its_weights(
    root: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(root, BISCUIT, max_logged_bytes=0)
    shutil.rmtree(root / "export" / BISCUIT)
    write_export(root, tiny_model_folder, note="another")
    client, (version,) = mlflowstore.connect(root)[0], versions(root)
    monkeypatch.setattr(folders, "sha256_of_file", lambda path: pytest.fail(f"{path} was read"))
    assert "does not hold the export" in registered.check_files(root, client, version)[0]


def write_lora_export(root: Path, pipeline: Path) -> None:
    """Write an export with the LoRA alone beside the pipeline, as two programs read it."""
    write_export(root, pipeline)
    with new_folder(root / "export" / "lora", {"base": "b" * 64, "model": "f" * 64}) as target:
        shutil.copytree(root / "export" / BISCUIT, target, dirs_exist_ok=True)
        for name, size in (("lora/pytorch_lora_weights.safetensors", 300), ("kohya/biscuit.safetensors", 50_000)):
            (target / name).parent.mkdir()
            (target / name).write_bytes(bytes(size))
    shutil.rmtree(root / "export" / BISCUIT)
    (root / "export" / "lora").rename(root / "export" / BISCUIT)


def files_of(place: Path) -> set[str]:
    folder = place / f"artifacts/artifacts/{BISCUIT}"
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


LORA = "lora/pytorch_lora_weights.safetensors"
TEXTS = {"pointer.json", "README.md", "generation.json"}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(100_000, TEXTS | {LORA, "kohya/biscuit.safetensors"}), (10_000, TEXTS | {LORA}), (0, {"pointer.json"})],
)
def test_of_a_large_export_the_parts_that_stand_alone_are_logged_beside_the_pointer_as_they_fit(
    root: Path, tiny_model_folder: Path, limit: int, expected: set[str]
) -> None:
    write_lora_export(root, tiny_model_folder)
    register(root, BISCUIT, max_logged_bytes=limit)
    (place,) = places(root)
    assert files_of(place) == expected
    assert load(root, BISCUIT).predict(CALL)[0].startswith(b"\x89PNG")  # from where the pointer leads
    assert not register(root, BISCUIT, max_logged_bytes=limit).created
    assert not register(root, BISCUIT).created  # with the limit raised the version stays as it is
    assert files_of(place) == expected


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"another"), lambda path: flip(path)])
def test_a_part_beside_the_pointer_that_is_lost_is_found_and_comes_back(
    root: Path, tiny_model_folder: Path, harm: Callable[[Path], object]
) -> None:
    write_lora_export(root, tiny_model_folder)
    register(root, BISCUIT, max_logged_bytes=100_000)
    (place,) = places(root)
    lost = place / f"artifacts/artifacts/{BISCUIT}" / LORA
    client = mlflowstore.connect(root)[0]
    (version,) = versions(root)
    assert registered.check_files(root, client, version, deep=True) == []
    size = lost.stat().st_size
    harm(lost)
    (fault,) = registered.check_files(root, client, version, deep=True)
    assert LORA in fault
    shallow = registered.check_files(root, client, version, deep=False)
    if lost.exists() and lost.stat().st_size == size:
        assert shallow == []  # names and sizes are looked at
        return
    assert LORA in shallow[0]
    assert not register(root, BISCUIT, max_logged_bytes=100_000).created
    assert registered.check_files(root, client, version, deep=True) == []


def test_a_version_of_an_older_release_without_parts_beside_its_pointer_gets_them(
    root: Path, tiny_model_folder: Path
) -> None:
    write_lora_export(root, tiny_model_folder)
    register(root, BISCUIT, max_logged_bytes=0)
    (place,) = places(root)
    pointer = place / f"artifacts/artifacts/{BISCUIT}/pointer.json"
    about = json.loads(pointer.read_text())
    assert about.pop("beside") == {}
    pointer.write_text(json.dumps(about))
    assert registered.rows(root, BISCUIT, deep=True)[0].faults == ()
    assert register(root, BISCUIT, max_logged_bytes=10_000).version == 1
    assert files_of(place) == TEXTS | {LORA}
    assert registered.rows(root, BISCUIT, deep=True)[0].faults == ()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.fault(20)
def test_a_full_disk_is_seen_before_the_copy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DiskFullError, match=r"registering biscuit needs [\d,]+ bytes, 1 are free; make room"):
        register(root, BISCUIT)


@pytest.mark.slow
@pytest.mark.fault(30)
def test_two_processes_register_once(root: Path) -> None:
    program = "import sys; from pathlib import Path; from dreambooth.registry import register; "
    program += "print(register(Path(sys.argv[1]), 'biscuit').created)"
    command = [sys.executable, "-c", program, str(root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(process.communicate(timeout=300)[0].split()[-1] for process in processes) == ["False", "True"]
    assert [int(version.version) for version in versions(root)] == [1]


@pytest.mark.slow
def test_mlflow_loads_it_where_dreambooth_is_not_installed(root: Path) -> None:
    register(root, BISCUIT)
    (expected,) = load(root, BISCUIT).predict(CALL, params={"seed": 1})
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
try:
    import dreambooth
    raise SystemExit("dreambooth is installed")
except ModuleNotFoundError:
    pass
import mlflow
model = mlflow.pyfunc.load_model("models:/biscuit@challenger")
import dreambooth
assert "mlartifacts" in dreambooth.__file__, dreambooth.__file__
sys.stdout.buffer.write(model.predict({"prompt": "a photo of sks dog"}, params={"seed": 1})[0])
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment(root) | {"PYTHONPATH": ""}, capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout == expected


@pytest.mark.slow
def test_mlflow_serves_it_over_http(root: Path) -> None:
    register(root, BISCUIT)
    model = load(root, BISCUIT)
    port = free_port()
    command = ["models", "serve", "-m", f"models:/{BISCUIT}@challenger", "--env-manager", "local", "-p", str(port)]
    with mlflow(command, port, "/ping", environment(root)):
        (alone,) = invoke(port, {"inputs": CALL, "params": {"seed": 7}})
        assert base64.b64decode(alone) == model.predict(CALL, params={"seed": 7})[0]
        rows = {"columns": ["prompt"], "data": [["a dog"], ["a photo of sks dog"]]}
        two = invoke(port, {"dataframe_split": rows, "params": {"seed": 6}})
        assert base64.b64decode(two[1]) == base64.b64decode(alone)
        assert len(invoke(port, {"inputs": {"prompt": ["a", "b", "c"]}})) == 3
        drawn = draw(model, [CALL["prompt"]], 2, {"seed": 6}, root / "out", {"model": "models:/biscuit/1"})
        written = drawn.pictures[1].read_bytes()
        assert Image.open(io.BytesIO(base64.b64decode(alone))).tobytes() == Image.open(io.BytesIO(written)).tobytes()
        about = read_provenance(written)
        assert (about["model"], about["seed"], about["prompt"]) == ("models:/biscuit/1", 7, CALL["prompt"])
        with pytest.raises(urllib.error.HTTPError) as caught:
            invoke(port, {"inputs": CALL, "params": {"num_inference_steps": 10**9}})
        assert caught.value.code == 400
        assert b"num_inference_steps: should be 1 to 999" in caught.value.read()


@pytest.mark.slow
def test_a_server_takes_an_export_and_gives_it_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    store = root / "server"
    store.mkdir()
    shutil.move(root / "mlflow.db", store)
    command = ["server", "--port", str(port), "--workers", "1", "--backend-store-uri", "sqlite:///mlflow.db"]
    with mlflow(command, port, "/health", environment(root) | {"MLFLOW_TRACKING_URI": ""}, store):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        write_evaluation(root)
        assert register(root, BISCUIT).created
        assert not register(root, BISCUIT).created
        assert load(root, BISCUIT).predict(CALL, params={"seed": 1})[0].startswith(b"\x89PNG")
        lost = next(store.rglob("diffusion_pytorch_model.safetensors"))
        lost.unlink()
        assert register(root, BISCUIT).version == 1
        assert lost.exists()
    assert not (root / "mlartifacts").exists()
    assert {path.name for path in (root / ".scratch").iterdir()} <= {"mlflow.lock", "locks"}


def environment(root: Path) -> dict[str, str]:
    return os.environ | {
        "MLFLOW_TRACKING_URI": mlflowstore.tracking_uri(root),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "HOME": str(root),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # mlflow starts uvicorn by name
    }


def invoke(port: int, call: dict[str, Any]) -> list[str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(call).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        predictions: list[str] = json.load(reply)["predictions"]
    return predictions


@contextmanager
def mlflow(command: list[str], port: int, path: str, env: dict[str, str], cwd: Path | None = None) -> Iterator[None]:
    """Run a program of MLflow until the block ends; enter it once it answers."""
    folder = cwd or Path.cwd()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command], cwd=folder, env=env, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        await_server(f"http://127.0.0.1:{port}{path}", process, folder / "log")
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)

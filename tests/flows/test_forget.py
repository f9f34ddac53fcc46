"""Forget a subject: canary bytes in its photos, file names and name are found nowhere afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from toy_project import REPOSITORY, dvc, make_photos, quiet

from dreambooth.errors import SubjectError
from dreambooth.locks import AlreadyRunningError, only_one
from flows import dvcstore, prefectstore
from flows.clones import OWNER
from flows.dvcstore import _names
from flows.forget import (
    _left_copies,
    _refuse_beside_copies,
    _refuse_beside_stages,
    erase,
    inventory,
    without_subject,
)

SUBJECT, IN_NAME, IN_BYTES = "zq7canary", "kanarienvogel", b"CANARY-5d1f0e"
MARKS = (SUBJECT.encode(), IN_NAME.encode(), IN_BYTES)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "subjects:\n  a:\n    kind: live\n  b: {kind: live}\nphotos: 1\n",
            "subjects:\n  b: {kind: live}\nphotos: 1\n",
        ),
        ("subjects:\n  b: 1\n\n  'a':\n    kind: live\n    # of a\n", "subjects:\n  b: 1\n\n"),
        ("subjects:\n  a:\n    kind: live\n\nphotos: 1\n", "subjects: {}\nphotos: 1\n"),
        ("subjects:   # all of them\n  a: {kind: live}\n", "subjects: {}\n"),
        ("subjects:\n  ab: 1\n", "subjects:\n  ab: 1\n"),
        ("classes:\n  a: 1\nsubjects:\n  b: 1\n", "classes:\n  a: 1\nsubjects:\n  b: 1\n"),
    ],
)
def test_only_the_lines_of_the_subject_leave_params(text: str, left: str) -> None:
    assert without_subject(text, "a") == left


def found_in(folder: Path) -> Iterator[str]:
    """Yield every file whose name or content holds a canary."""
    for path in folder.rglob("*"):
        name = os.fsencode(path.relative_to(folder))
        if any(mark in name for mark in MARKS):
            yield f"{path} (name)"
        elif path.is_file() and any(mark in path.read_bytes() for mark in MARKS):
            yield str(path)


def forget(root: Path, home: Path, *arguments: str, before: str = "") -> "subprocess.CompletedProcess[str]":
    program = f"import sys, os, signal\n{before}\nfrom flows.cli import main\nmain()\n"
    command = [sys.executable, "-c", program, "forget", SUBJECT, *arguments]
    return subprocess.run(command, cwd=root, env=quiet(home), capture_output=True, text=True, check=False)


def leave_behind(root: Path, subject_id: str) -> list[Path]:
    """Make what killed processes leave of a subject; return the folders."""
    hidden = [f"{place}/.{subject_id}.0123abcd" for place in ("data/subjects", "models", "export", "reports")]
    working = [f".scratch/{work}-{subject_id}-a1_b2c3d" for work in ("upload", "download", "scores")]
    kept = [f".scratch/checkpoints/{subject_id}-{'0123456789abcdef'}", f".scratch/evaluation/{subject_id}"]
    folders = [root / name for name in (*hidden, *working, *kept)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "content").write_bytes(IN_BYTES)
    return folders


def test_what_a_stage_is_writing_is_not_erased_and_what_a_killed_one_wrote_is(project: Path) -> None:
    """DVC notes who writes what; a process that died cannot take its name back."""
    notes = project / ".dvc/tmp/rwlock"
    notes.parent.mkdir(parents=True, exist_ok=True)
    written = str(project / "build/rex/evaluation")
    notes.write_text(json.dumps({"write": {written: {"pid": os.getpid(), "cmd": "dvc repro"}}}))
    with pytest.raises(AlreadyRunningError, match=f"build/rex/evaluation is being computed: pid {os.getpid()}"):
        _refuse_beside_stages(project, "rex")
    _refuse_beside_stages(project, "biscuit")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    notes.write_text(json.dumps({"write": {written: {"pid": ended.pid, "cmd": "dvc repro"}}}))
    _refuse_beside_stages(project, "rex")


@pytest.mark.parametrize(
    ("path", "subject_id", "mine"),
    [
        *((f"{folder}/rex", "rex", True) for folder in ("build", "models", "export", "reports", "data/subjects")),
        ("metrics/rex.json", "rex", True),
        ("build/rex/instance", "rex", True),
        ("build/classes/rex", "rex", False),
        ("stages/train.py", "train", False),
        ("dreambooth/lora.py", "lora", False),
        ("dreambooth/card.py", "card", False),
        ("flows/gate", "gate", False),
        ("data/prompts/rex", "rex", False),
        ("models/rex-2", "rex", False),
        ("metrics/rex", "rex", False),
        ("models", "models", False),
    ],
)
def test_a_path_is_a_subject_s_where_outputs_lie_and_not_where_a_module_has_its_name(
    path: str, subject_id: str, mine: bool
) -> None:
    assert _names({"path": path}, subject_id) == mine


def test_a_subject_with_the_name_of_a_module_takes_nobody_s_runs(project: Path) -> None:
    """Every entry of the run cache depends on modules: a subject called train must not take them all."""
    entry = {
        "cmd": "python -m stages.train rex",
        "deps": [{"path": "stages/train.py", "md5": 32 * "a"}],
        "outs": [{"path": "models/rex", "md5": 32 * "b"}],
    }
    file = project / ".dvc/cache/runs/ab/abcd/ef01"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump(entry))
    assert dvcstore.kept_of(project, "train").runs == set()
    assert dvcstore.kept_of(project, "rex").runs == {"ab/abcd/ef01"}


def left_copies(root: Path) -> list[Path]:
    """Make what a killed run and a killed sweep leave: copies of the project with photos and weights."""
    folders = [root / ".scratch/clone-a1b2c3d4", root / ".dvc/tmp/exps/standalone/tmpa1b2c3d4"]
    for project in (folders[0] / "project", folders[1]):
        for name in ("data/subjects", "models"):
            (project / name / SUBJECT).mkdir(parents=True)
            (project / name / SUBJECT / IN_NAME).write_bytes(IN_BYTES)
    return folders


def test_copies_that_killed_runs_and_sweeps_left_are_listed_and_erased(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefectstore, "_server", lambda: None)
    monkeypatch.setattr(prefectstore, "_database_file", lambda: None)
    folders = left_copies(project)
    with pytest.raises(SubjectError):  # a typing error is told, whatever was left
        inventory(project, "nobody")
    found = inventory(project, SUBJECT)
    assert found.places["copies of the project that killed runs left"] == 2
    erase(project, found)
    assert not any(folder.exists() for folder in folders)
    assert list(found_in(project)) == []


def test_a_copy_in_which_somebody_works_is_refused_and_stays(project: Path) -> None:
    clone, sweep = left_copies(project)
    with only_one(clone, OWNER, "work in a clone"), pytest.raises(AlreadyRunningError, match=f"pid {os.getpid()} on"):
        _refuse_beside_copies(project, SUBJECT)
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=sweep / "models", stdin=subprocess.PIPE) as child:
        with pytest.raises(AlreadyRunningError, match=f"pid {child.pid} works in"):
            _refuse_beside_copies(project, SUBJECT)
        _refuse_beside_copies(project, "rex")  # of which it has nothing
        assert _left_copies(project) == [clone]
        child.communicate(b"\n")
    assert _left_copies(project) == [clone, sweep]


def test_a_server_that_a_profile_of_prefect_names_is_asked(tmp_path: Path) -> None:
    """Flows use it: a look into the local database alone would find nothing there."""
    environment = {name: value for name, value in quiet(tmp_path).items() if name != "PREFECT_API_URL"}
    url = "http://prefect.example:4200/api"
    (tmp_path / "profiles.toml").write_text(f'active = "box"\n[profiles.box]\nPREFECT_API_URL = "{url}"\n')
    command = [sys.executable, "-c", "from flows.prefectstore import _server; print(_server())"]
    for more, said in (({}, url), ({"PREFECT_API_URL": ""}, "")):
        done = subprocess.run(
            command, cwd=REPOSITORY, env={**environment, **more}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == said


@pytest.mark.slow
@pytest.mark.fault(44)
@pytest.mark.threat(23)
def test_nothing_of_a_forgotten_subject_is_left_and_the_other_champion_still_loads(
    project: Path, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from registered import write_export

    from dreambooth import aliases, tracking
    from dreambooth.registry import register
    from dreambooth.versions import load

    home, remote, caches = tmp_path / "prefect", tmp_path / "remote", tmp_path / "caches"
    remote.mkdir()
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DREAMBOOTH_CACHE"):
        monkeypatch.setenv(name, str(caches / name))
    monkeypatch.setenv("PREFECT_HOME", str(home))
    photos = project / "data" / "subjects" / SUBJECT
    for number, path in enumerate(make_photos(photos, 3, seed=5)):
        mark = PngInfo()
        mark.add_text("comment", IN_BYTES.decode())
        with Image.open(path) as picture:
            picture.save(photos / f"{IN_NAME} {number}.png", pnginfo=mark)
        path.unlink()
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["subjects"][SUBJECT] = dict(values["subjects"]["rex"])
    (project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    dvc(project, "remote", "add", "--default", "box", str(remote))
    dvc(project, "add", f"data/subjects/{SUBJECT}")
    # A real flow in a real database of Prefect, whose registration only counts.
    program = Path(__file__).parent / "flow_program.py"
    ran = subprocess.run(
        [sys.executable, str(program), str(project), SUBJECT, "rex"], env=quiet(home), capture_output=True, text=True,
        check=False, cwd=project,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for name in ("ran.log", "registry.json"):  # of the toys
        (project / name).unlink(missing_ok=True)
    dvc(project, "push", "--run-cache")
    for name in (SUBJECT, "rex"):
        shutil.rmtree(project / "export" / name)
        write_export(project, tiny_model_folder, name.encode().hex(), subject=name)
        register(project, name)
        aliases.move(tracking.connect(project)[0], name, "promote", "champion", None, 1)
    everywhere = (project, remote, home, caches)
    assert all(list(found_in(folder)) for folder in everywhere[:3])
    others = leave_behind(project, f"{SUBJECT}-2")
    leave_behind(project, SUBJECT)
    left_copies(project)
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*") if ".scratch" not in path.parts}

    shared = {path.name: path.read_bytes() for path in (project / "build/classes/dog").iterdir()}

    looked = forget(project, home)
    assert looked.returncode == 0, looked.stderr
    assert f"dreambooth forget {SUBJECT} --yes" in looked.stdout
    gone = [path for path in before if not path.exists()]
    assert not gone  # a look changes nothing

    for step in ("dvcstore.erase", "_forget_in_lock", "_write_receipt"):
        die = f"import flows.forget as f; f.{step} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)"
        assert forget(project, home, "--yes", before=die).returncode == -signal.SIGKILL
        assert list(found_in(project)), step  # at the last one the journal alone
    with only_one(project / ".scratch/locks", f"train-{SUBJECT}", "a training"):
        busy = forget(project, home, "--yes")
    assert busy.returncode == AlreadyRunningError.exit_code
    assert f"the training of {SUBJECT} is already running: pid {os.getpid()}" in busy.stderr
    done = forget(project, home, "--yes")
    assert done.returncode == 0, done.stderr
    assert all(path.exists() for path in others)  # of a subject whose id begins alike
    for path in others:
        shutil.rmtree(path)
    assert "not reached: the history of git" in done.stdout
    assert [line for folder in everywhere for line in found_in(folder)] == []
    (receipt,) = (project / "receipts").iterdir()
    told = json.loads(receipt.read_text())
    assert told["out_of_reach"]
    assert all(count > 0 for place, count in told["erased"].items() if place != "entries of the run cache"), told
    assert {path.name: path.read_bytes() for path in (project / "build/classes/dog").iterdir()} == shared

    assert load(project, "rex").predict({"prompt": "a photo of sks dog"})[0].startswith(b"\x89PNG")
    shutil.rmtree(project / "models" / "rex")
    shutil.rmtree(project / ".dvc" / "cache")
    dvc(project, "pull", "train@rex")  # its objects are in the remote still
    assert forget(project, home).returncode == 3  # nothing is known of it

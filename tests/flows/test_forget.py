"""Forget a subject: canary bytes in its photos, file names and name are found nowhere afterwards."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from toy_project import REPOSITORY, dvc, make_origin, make_photos, quiet, ran

from dreambooth import erasure, sweeps
from dreambooth.erasure import Holdings
from dreambooth.errors import ParamsError, PipelineError, SubjectError
from dreambooth.folders import is_private
from dreambooth.locks import AlreadyRunningError, only_one
from dreambooth.params import names_id
from dreambooth.tracking import PENDING, unsent
from flows import clones, dvcstore, prefectstore
from flows.add import Wish, add_subject, track_photos
from flows.check import check
from flows.commandline import ROBOT, git
from flows.copies import OWNER
from flows.doctor import _left_beside
from flows.dvcrun import DvcRunner
from flows.dvcstore import _names
from flows.entries import without_subject
from flows.forget import (
    _left_copies,
    _refuse_beside_copies,
    _refuse_beside_stages,
    erase,
    inventory,
)
from flows.graph import Graph

SUBJECT, IN_NAME, IN_BYTES = "zq7canary", "kanarienvogel", b"CANARY-5d1f0e"
EMPTY_HERE = ("entries of the run cache", "experiments of sweeps")  # those have a test of their own
MARKS = (SUBJECT.encode(), IN_NAME.encode(), IN_BYTES)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "subjects:\n  a:\n    kind: live\n  b: {kind: live}\nphotos: 1\n",
            "subjects:\n  b: {kind: live}\nphotos: 1\n",
        ),
        ("subjects:\n  b: 1\n\n  'a':\n    kind: live\n    # of a\n", "subjects:\n  b: 1\n\n"),
        ("subjects:\n  a:\n    kind: live\n\nphotos: 1\n", "subjects: {}\n\nphotos: 1\n"),
        ("subjects:\n  b: 1\n  a: 2\n\nphotos: 1\n", "subjects:\n  b: 1\n\nphotos: 1\n"),
        ("subjects:   # all of them\n  a: {kind: live}\n", "subjects: {}\n"),
        ("subjects:\n  ab: 1\n", "subjects:\n  ab: 1\n"),
        ("classes:\n  a: 1\nsubjects:\n  b: 1\n", "classes:\n  a: 1\nsubjects:\n  b: 1\n"),
    ],
)
def test_only_the_lines_of_the_subject_leave_params(text: str, left: str) -> None:
    assert without_subject(text, "a") == left


@pytest.mark.parametrize("subject_id", ["kind", "identifier"])
@pytest.mark.parametrize("indent", [2, 4])
def test_a_subject_called_as_a_field_takes_no_line_of_the_others(subject_id: str, indent: int) -> None:
    entry = {"class_id": "dog", "identifier": "sks", "kind": "live"}
    values = {"classes": {"dog": {"class_noun": "dog"}}, "subjects": {"rex": entry, subject_id: entry, "tom": entry}}
    text = yaml.safe_dump(values, sort_keys=False, indent=indent) + "photos: 1\n"
    del values["subjects"][subject_id]
    assert without_subject(text, subject_id) == yaml.safe_dump(values, sort_keys=False, indent=indent) + "photos: 1\n"


def test_a_comment_at_the_margin_ends_no_entry() -> None:
    text = "subjects:\n  b: 1\n  a:\n    class_id: dog\n# of whom?\n    kind: live\n# all\n  c: 1\n"
    assert without_subject(text, "a") == "subjects:\n  b: 1\n# of whom?\n# all\n  c: 1\n"


@pytest.fixture
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefectstore, "server", lambda: None)
    monkeypatch.setattr(prefectstore, "_database_file", lambda: Path("nowhere"))


def add_entry(root: Path, subject_id: str) -> None:
    values = yaml.safe_load((root / "params.yaml").read_text())
    values["subjects"][subject_id] = dict(values["subjects"]["rex"])
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


@pytest.mark.usefixtures("no_prefect")
def test_a_subject_called_kind_is_forgotten_to_the_end(project: Path) -> None:
    before = (project / "params.yaml").read_text()
    add_entry(project, "kind")
    erase(project, inventory(project, "kind"), print)
    assert (project / "params.yaml").read_text() == before
    with pytest.raises(SubjectError, match="nothing is known of 'kind'"):
        inventory(project, "kind")


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
def test_what_waits_for_mlflow_goes_before_the_runs_so_that_no_registration_brings_them_back(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_entry(project, "tom")
    parcel = unsent(project) / "a"
    parcel.mkdir(parents=True)
    (parcel / PENDING).write_text(json.dumps({"name": "train", "tags": {"subject": "tom"}}))
    waiting: list[Path] = []
    monkeypatch.setattr(erasure, "erase", lambda root, subject_id: waiting.extend(unsent(root).iterdir()) or [])
    erase(project, inventory(project, "tom"), print)
    assert waiting == []
    assert not parcel.exists()


@pytest.mark.usefixtures("no_prefect")
def test_an_entry_that_no_lines_can_be_taken_from_is_said_and_not_passed_over(project: Path) -> None:
    values = yaml.safe_load((project / "params.yaml").read_text())
    subjects = values.pop("subjects")
    text = yaml.safe_dump(values) + f"subjects: {json.dumps(subjects)}\n"
    (project / "params.yaml").write_text(text)
    with pytest.raises(ParamsError, match=r"subjects\.rex cannot be taken out; delete it by hand, then go on"):
        erase(project, inventory(project, "rex"), print)
    assert (project / "params.yaml").read_text() == text


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
@pytest.mark.parametrize("broken", ["unknown: 1\n", "photos: 1\nsubjects: [\n"])
def test_a_subject_is_forgotten_though_params_are_not_valid_and_what_cannot_be_read_is_said(
    project: Path, broken: str
) -> None:
    before = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(before + broken)
    readable = broken.startswith("unknown")
    found = inventory(project, "rex")
    assert found.places["entries of params.yaml, dvc.lock"] == 1
    receipt = erase(project, found, print)
    assert any("dreambooth generate --out" in line for line in json.loads(receipt.read_text())["out_of_reach"])
    assert not (project / "data/subjects/rex").exists()
    assert (project / "params.yaml").read_text() == (
        without_subject(before + broken, "rex") if readable else before + broken
    )
    unread = [line for line in json.loads(receipt.read_text())["out_of_reach"] if "params.yaml" in line]
    assert len(unread) == (0 if readable else 1)
    assert all(line.startswith("params.yaml, which cannot be read (line ") for line in unread)
    assert all(line.endswith("take out by hand what it says of ID") for line in unread)


def lay_out(root: Path, subject_id: str, export_hash: str) -> Path:
    """Make what `pointer.resolve` leaves of a version that is served from DVC's cache."""
    place = root / ".scratch/pipelines" / export_hash
    place.mkdir(parents=True)
    (place / "generation.json").write_text(json.dumps({"subject": subject_id}))
    place.with_suffix(".lock").touch()
    return place


@pytest.mark.usefixtures("no_prefect")
def test_what_subjects_share_in_the_scratch_folder_is_erased_by_whose_it_is(project: Path, tmp_path: Path) -> None:
    """A server of another subject works with what lies in `pipelines`."""
    rex, other = lay_out(project, "rex", 64 * "a"), lay_out(project, "biscuit", 64 * "b")
    camera = tmp_path / "camera"
    camera.mkdir()
    shutil.copy(project / "data/subjects/rex/photo 0.png", camera / "a.png")
    for number, photo in enumerate(make_photos(tmp_path / "more", 3, seed=5)):
        shutil.copy(photo, camera / f"b{number}.png")
    check(project, str(camera))
    thumbnails = project / ".scratch/check"
    assert len(list(thumbnails.iterdir())) == 4
    (thumbnails / "torn.png").write_bytes(b"torn")  # whom it shows is not known
    with pytest.raises(SubjectError, match="nothing is known of 'nosuch'"):
        inventory(project, "nosuch")
    found = inventory(project, "rex")
    assert set(found.shared) == {thumbnails / "00.png", thumbnails / "torn.png", rex}
    erase(project, found, print)
    assert not rex.exists()
    assert other.is_dir()
    assert sorted(path.name for path in thumbnails.iterdir()) == ["01.png", "02.png", "03.png"]


@pytest.mark.usefixtures("no_prefect")
def test_what_was_laid_out_of_a_version_is_found_by_its_export_when_its_files_are_gone(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Holdings(exports=(64 * "a",))
    monkeypatch.setattr(erasure, "holdings", lambda root, subject_id: held if subject_id == "rex" else Holdings())
    place = lay_out(project, "rex", 64 * "a")
    (place / "generation.json").unlink()
    (place / "generation.json").symlink_to(project / "gone")
    assert inventory(project, "rex").shared == [place, place.with_suffix(".lock")]
    assert inventory(project, "biscuit").shared == []


def add_experiments(root: Path, names: Sequence[str]) -> None:
    """Make a repository of git in which commits stand for experiments of DVC."""
    for arguments in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "first"]):
        git(root, *ROBOT, *arguments)
    baseline = git(root, "rev-parse", "HEAD")
    for name in names:
        commit = git(root, *ROBOT, "commit-tree", "-p", baseline, "-m", name, f"{baseline}^{{tree}}")
        git(root, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", commit)
    git(root, "update-ref", "refs/exps/exec/EXEC_APPLY", commit)


def experiments_in(root: Path) -> set[str]:
    refs = git(root, "for-each-ref", "--format=%(refname)", "refs/exps/").splitlines()
    return {ref.rpartition("/")[2] for ref in refs}


@pytest.mark.usefixtures("no_prefect")
def test_the_experiments_of_a_subject_s_sweeps_go_and_those_of_others_stay(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = [sweeps.name_of(["rex"], {"train.seed": seed}, "tree") for seed in (1, 2)]
    theirs = sweeps.name_of(["biscuit"], {"train.seed": 1}, "tree")
    add_experiments(project, [theirs, "my-own", *ours])
    for subject_id, names in (("rex", [*ours, "my-own"]), ("biscuit", [theirs])):
        table = project / "reports" / f"sweep-{subject_id}-seed.csv"
        table.parent.mkdir(exist_ok=True)
        rows = [f"{name},{subject_id},1" for name in names]
        table.write_text("\n".join(["experiment,subject,train.seed", *rows]) + "\n")
    shown = project / ".dvc/tmp/exps/cache/ab/cdef"  # DVC's notes of commits, which hold parameters and metrics
    shown.parent.mkdir(parents=True)
    shown.write_text("rex")
    found = inventory(project, "rex")
    assert found.places["experiments of sweeps"] == 2
    with monkeypatch.context() as patched:  # a kill before the table goes finds nothing twice
        patched.setattr(erasure, "erase", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            erase(project, found, print)
    assert experiments_in(project) == {theirs, "my-own"}
    assert not shown.exists()
    again = inventory(project, "rex")
    assert again.places["experiments of sweeps"] == 2  # the receipt tells all
    erase(project, again, print)
    assert experiments_in(project) == {theirs, "my-own"}
    assert not any("exp remove --all" in line for line in again.out_of_reach)  # it would take everybody's


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
def test_experiments_by_hand_are_named_and_photos_that_git_has_are_said_to_stay_in_its_history(project: Path) -> None:
    def commit(*paths: str) -> None:
        git(project, "add", *paths)
        git(project, *ROBOT, "commit", "--quiet", "--allow-empty", "--message", "more")

    def left(subject_id: str) -> list[str]:
        return [line for line in inventory(project, subject_id).out_of_reach if re.match("experiments|the hist", line)]

    assert left("rex") == [line for line in left("rex") if "the photos' hashes and" in line]  # without git
    git(project, "init", "--quiet")
    commit("params.yaml", "data/subjects/biscuit")
    baseline = git(project, "rev-parse", "HEAD")
    with_rex = git(project, *ROBOT, "commit-tree", "-p", baseline, "-m", "exp", f"{baseline}^{{tree}}")
    (project / "params.yaml").write_text(without_subject((project / "params.yaml").read_text(), "rex"))
    commit("params.yaml")
    for name, one in (("gemmy-harl", with_rex), ("bared-ewer", git(project, "rev-parse", "HEAD"))):
        git(project, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", one)
    git(project, "update-ref", "refs/exps/exec/EXEC_APPLY", with_rex)
    hashes, named = left("rex")
    assert "the photos' hashes and" in hashes
    assert named.endswith(": dvc exp remove gemmy-harl")
    photos, named = left("biscuit")
    assert "the photos themselves and" in photos
    assert named.endswith(": dvc exp remove bared-ewer gemmy-harl")
    assert "dvc exp remove gemmy-harl" in erase(project, inventory(project, "rex"), print).read_text()


def found_in(folder: Path) -> Iterator[str]:
    """Yield every file whose name or content holds a canary."""
    for path in folder.rglob("*"):
        name = os.fsencode(path.relative_to(folder))
        if any(mark in name for mark in MARKS):
            yield f"{path} (name)"
        elif path.is_file() and any(mark in path.read_bytes() for mark in MARKS):
            yield str(path)


def mark_photos(folder: Path) -> None:
    """Write the canary bytes behind the end of every picture, where cameras and phones write more of it."""
    for path in folder.iterdir():
        with path.open("ab") as file:
            file.write(IN_BYTES)


def cached(root: Path) -> list[Path]:
    return [path for path in (root / ".dvc/cache/files").rglob("*") if path.is_file()]


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
def test_photos_that_add_replaced_before_a_commit_leave_the_cache_of_dvc(project: Path, tmp_path: Path) -> None:
    for seed in (5, 7):
        make_photos(tmp_path / str(seed), 3, seed)
        mark_photos(tmp_path / str(seed))
        added = add_subject(project, Wish(SUBJECT, "dog", "sks", "live"), [tmp_path / str(seed)], force=True)
        assert track_photos(project, added.folder) is None
    assert len(cached(project)) == 8  # two folders of three photos
    erase(project, inventory(project, SUBJECT), print)
    assert cached(project) == []
    assert list(found_in(project)) == []


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
def test_photos_that_a_run_refused_and_that_were_taken_away_leave_the_cache_of_dvc(project: Path) -> None:
    add_entry(project, SUBJECT)
    folder, runner = project / "data/subjects" / SUBJECT, DvcRunner(project)
    make_photos(folder, 5, seed=5)
    mark_photos(folder)
    dvc(project, "add", f"data/subjects/{SUBJECT}")
    for photo in (folder / "photo 3.png", folder / "photo 4.png"):
        photo.write_bytes(photo.read_bytes() + b"secret")
    (project / f"fail-validate-{SUBJECT}").touch()
    runner.run(f"data/subjects/{SUBJECT}.dvc", str)
    with pytest.raises(PipelineError, match="E_TRAIN"):
        runner.run(f"validate@{SUBJECT}", str)
    (project / f"fail-validate-{SUBJECT}").unlink()
    for photo in (folder / "photo 3.png", folder / "photo 4.png"):
        photo.unlink()
    for stage in (f"data/subjects/{SUBJECT}.dvc", f"validate@{SUBJECT}"):
        runner.run(stage, str)
    (project / "ran.log").unlink()
    erase(project, inventory(project, SUBJECT), print)
    assert [path for path in cached(project) if IN_BYTES in path.read_bytes()] == []
    assert list(found_in(project)) == []


@pytest.mark.slow
@pytest.mark.threat(23)
@pytest.mark.usefixtures("no_prefect")
def test_dvc_notes_names_in_the_project_alone_and_those_of_clones_and_experiments_go_with_them(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_SITE_CACHE_DIR")
    open_to_all = Path("/var/tmp/dvc")
    before = set(found_in(open_to_all))
    make_origin(project)
    add_entry(project, SUBJECT)
    for number, path in enumerate(make_photos(project / "data/subjects" / SUBJECT, 3, seed=5)):
        path.rename(path.with_name(f"{IN_NAME} {number}.png"))
    dvc(project, "add", f"data/subjects/{SUBJECT}")
    git(project, "add", "--all")
    git(project, *ROBOT, "commit", "--quiet", "--message", "photos")
    runner = DvcRunner(project)
    runner.experiment("sweep-0000000001", ["photos.max_aspect=3.5"], [f"validate@{SUBJECT}"], str)
    runner.run(f"validate@{SUBJECT}", str)
    Graph.load(project)
    with clones.cloned(project, str(project), None) as clone:
        dvc(clone, "status")
        Graph.load(clone)
    (notes,) = (project / ".dvc/tmp/notes").iterdir()
    assert is_private(notes)
    assert list(found_in(notes))
    assert [path.name for path in notes.iterdir()] == ["repo"]
    assert len(list((notes / "repo").iterdir())) == 1
    assert not set(found_in(open_to_all)) - before
    erase(project, inventory(project, SUBJECT), print)
    assert not list((project / ".dvc/tmp").glob("notes/*/*"))
    assert not set(found_in(open_to_all)) - before


def forget(root: Path, home: Path, *arguments: str, before: str = "") -> "subprocess.CompletedProcess[str]":
    program = f"import sys, os, signal\n{before}\nfrom flows.cli import main\nmain()\n"
    command = [sys.executable, "-c", program, "forget", SUBJECT, *arguments]
    return subprocess.run(command, cwd=root, env=quiet(home), capture_output=True, text=True, check=False)


def leave_behind(root: Path, subject_id: str) -> list[Path]:
    """Make what killed processes leave of a subject; return the folders."""
    hidden = [f"{place}/.{subject_id}.0123abcd" for place in ("models", "export", "reports", "metrics")]
    working = [f".scratch/{work}-{subject_id}-a1_b2c3d" for work in ("upload", "download", "scores")]
    kept = [f".scratch/checkpoints/{subject_id}-{'0123456789abcdef'}", f".scratch/evaluation/{subject_id}"]
    folders = [root / name for name in (*hidden, *working, *kept)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "content").write_bytes(IN_BYTES)
    return folders


def killed(root: Path, program: str, *arguments: str) -> None:
    """Run a program that kills itself where it says so."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    command = [sys.executable, "-c", f"from processes import kill_this_process_in as kill_in\n{program}", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def kill_adding(root: Path, photos: Path, subject_id: str) -> None:
    """Kill a real `dreambooth add` once it has copied the photos."""
    program = "import flows.add, flows.cli\nkill_in(flows.add, 'check_photos', 0)\nflows.cli.main()\n"
    killed(root, program, "add", subject_id, str(photos), "--class-noun", "dog", "--force")


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
def test_what_a_killed_add_and_a_killed_writer_left_is_named_and_erased(project: Path, tmp_path: Path) -> None:
    photos = tmp_path / "camera"
    make_photos(photos, 3)
    for subject_id in ("tom", "tom-2"):
        kill_adding(project, photos, subject_id)
        program = "import sys, shutil, dreambooth.folders as f\nfrom pathlib import Path\nplace = Path(sys.argv[1])\n"
        program += (
            "with f.new_folder(place, {}): pass\nkill_in(shutil, 'rmtree', 0)\nwith f.new_folder(place, {}): pass\n"
        )
        killed(project, program, f"models/{subject_id}")
        shutil.rmtree(project / "models" / subject_id)
    (ours, theirs), (old, their_old) = (
        sorted((project / place).glob(".tom*"), key=lambda path: "tom-2" in path.name)
        for place in ("data/subjects", "models")
    )
    assert len(list(ours.rglob("*.png"))) == 3
    assert old.name.startswith(".tom.old.")
    findings = {one.what: one for one in _left_beside(project)}
    assert ours.name in findings["data/subjects"].found
    assert old.name in findings["models"].found
    erase(project, inventory(project, "tom"), print)
    assert [path.exists() for path in (ours, old, theirs, their_old)] == [False, False, True, True]
    for ignored in (["git", "check-ignore", "-q"], [sys.executable, "-m", "dvc", "check-ignore", "-q"]):
        subprocess.run([*ignored, f"data/subjects/{ours.name}/photos/00.png"], cwd=REPOSITORY, check=True)


def test_what_a_stage_is_writing_is_not_erased_and_what_a_killed_one_wrote_is(project: Path) -> None:
    """DVC notes who writes what; a process that died cannot take its name back."""
    notes = project / ".dvc/tmp/rwlock"
    notes.parent.mkdir(parents=True, exist_ok=True)
    written = str(project / "build/rex/evaluation")
    notes.write_text(json.dumps({"write": {written: {"pid": os.getpid(), "cmd": "dvc repro"}}}))
    (project.parent / "linked").symlink_to(project)
    for root in (project, project.parent / "linked"):
        with pytest.raises(AlreadyRunningError, match=f"build/rex/evaluation is being computed: pid {os.getpid()}"):
            _refuse_beside_stages(root, "rex")
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


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
@pytest.mark.parametrize("name", ["dvc.lock", "data/subjects/biscuit.dvc"])
def test_what_names_the_objects_of_dvc_is_mended_before_anything_is_erased(project: Path, name: str) -> None:
    (project / name).write_text("<<<<<<< HEAD\nschema: '2.0'\n=======\n")
    with pytest.raises(PipelineError, match=rf"{name} cannot be read \(line 2, .*\); mend it") as told:
        inventory(project, "rex")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
def test_a_history_that_git_cannot_read_is_mended_before_anything_is_erased(project: Path) -> None:
    """Of a subject trained long ago it may be all that names the objects of DVC."""
    (project / ".git").write_text("gitdir: gone\n")
    with pytest.raises(PipelineError, match=r"git rev-list in .*not a git repository: .*gone; mend that"):
        inventory(project, "rex")


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
def test_empty_and_torn_entries_of_the_run_cache_are_passed_over_and_one_that_names_the_subject_goes(
    project: Path,
) -> None:
    texts = {"aa": "", "bb": "cmd: python x.py rex\ndeps:\n- {path: 'mod", "cc": "cmd: x biscuit\ndeps: [", "dd": "- 1"}
    entries = {name: project / f".dvc/cache/runs/{name}/{name}00/ee" for name in texts}
    for name, file in entries.items():
        file.parent.mkdir(parents=True)
        file.write_text(texts[name])
    erase(project, inventory(project, "rex"), print)
    assert [name for name, file in entries.items() if file.exists()] == ["aa", "cc", "dd"]


@pytest.mark.usefixtures("no_prefect")
def test_a_subject_that_is_forgotten_and_added_again_is_computed_again(project: Path, tmp_path: Path) -> None:
    """DVC takes a key of the run cache for one that has an entry."""
    before, photos, remote = (project / "params.yaml").read_text(), project / "data/subjects/rex", tmp_path / "remote"
    dvc(project, "remote", "add", "--default", "box", str(remote))
    shutil.copytree(photos, tmp_path / "photos")
    dvc(project, "repro", "validate@rex", "validate@biscuit")
    dvc(project, "push", "--run-cache")
    ran(project)
    erase(project, inventory(project, "rex"), print)
    runs = (project / ".dvc/cache/runs", remote / "runs")
    assert [len(list(place.glob("*/*/*"))) for place in runs] == [1, 1]
    assert not [path for place in runs for path in place.rglob("*") if path.is_dir() and not any(path.iterdir())]
    shutil.copytree(tmp_path / "photos", photos)
    (project / "params.yaml").write_text(before)
    dvc(project, "repro", "--single-item", "validate@rex")
    assert ran(project) == ["validate@rex"]


@pytest.mark.usefixtures("no_prefect")
@pytest.mark.threat(23)
def test_a_remote_that_cannot_be_read_is_said_and_what_it_may_have_is_erased_elsewhere(
    project: Path, tmp_path: Path
) -> None:
    dvc(project, "remote", "add", "--default", "box", str(tmp_path / "remote"))
    dvc(project, "add", "data/subjects/rex")
    dvc(project, "push")
    objects = [path for path in (tmp_path / "remote/files").rglob("*") if path.is_file()]
    for path in (project / ".dvc/cache/files").rglob("*"):
        if path.is_file() and path.suffix != ".dir":  # the list of them stays
            path.unlink()
    loop = tmp_path / "remote/runs/ab/abcd/ef"
    loop.parent.mkdir(parents=True)
    loop.symlink_to(loop)
    found = inventory(project, "rex")
    assert found.places["objects of DVC (cache and remotes)"] == len(objects) == 4
    erase(project, found, print)
    (line,) = [line for line in found.out_of_reach if line.startswith("DVC remote box: ")]
    assert "symbolic links" in line
    assert not any(path.exists() for path in objects)


def test_a_remote_on_a_web_server_is_said_to_keep_what_it_has_whether_it_answers_or_not(project: Path) -> None:
    dvc(project, "remote", "add", "--default", "web", "http://127.0.0.1:9/store")
    dvc(project, "add", "data/subjects/rex")
    found = inventory(project, "rex")
    receipt = erase(project, found, print)
    line = "DVC remote web: http://127.0.0.1:9/store is a web server, where DVC deletes nothing; "
    line += "delete there what it was sent"
    assert found.out_of_reach.count(line) == 1
    assert line in json.loads(receipt.read_text())["out_of_reach"]


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
    monkeypatch.setattr(prefectstore, "server", lambda: None)
    monkeypatch.setattr(prefectstore, "_database_file", lambda: Path("nowhere"))
    folders = left_copies(project)
    with pytest.raises(SubjectError):  # a typing error is told, whatever was left
        inventory(project, "nobody")
    found = inventory(project, SUBJECT)
    assert found.places["copies of the project that killed runs left"] == 2
    erase(project, found, print)
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
        assert [copy.folder for copy in _left_copies(project)] == [clone]
        child.communicate(b"\n")
    assert [copy.folder for copy in _left_copies(project)] == [clone, sweep]


@pytest.mark.parametrize("text", ["rex", "train@rex:", "data/subjects/rex/1.png", "rex, max", "{rex: 1}"])
def test_an_id_is_named_alone(text: str) -> None:
    assert names_id(text, "rex")
    assert not any(names_id(text.replace("rex", other), "rex") for other in ("rex-2", "t-rex", "rexy", "rex_2"))


def test_a_server_that_a_profile_of_prefect_names_is_asked(tmp_path: Path) -> None:
    """Flows use it: a look into the local database alone would find nothing there."""
    environment = {name: value for name, value in quiet(tmp_path).items() if name != "PREFECT_API_URL"}
    url = "http://prefect.example:4200/api"
    (tmp_path / "profiles.toml").write_text(f'active = "box"\n[profiles.box]\nPREFECT_API_URL = "{url}"\n')
    command = [sys.executable, "-c", "from flows.prefectstore import server; print(server())"]
    for more, said in (({}, url), ({"PREFECT_API_URL": ""}, "")):
        done = subprocess.run(
            command, cwd=REPOSITORY, env={**environment, **more}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == said


def test_the_database_that_a_profile_of_prefect_names_is_looked_at_and_one_that_is_no_sqlite_is_said(
    tmp_path: Path,
) -> None:
    environment = {**quiet(tmp_path), "PREFECT_API_URL": ""}
    program = "from flows.prefectstore import _database_file as file, count, erase; "
    program += "print(file(), count('rex'), *erase('rex'))"
    for url, said in (
        (f"sqlite+aiosqlite:///{tmp_path}/ours.db", f"{tmp_path}/ours.db 0"),
        ("postgresql+asyncpg://u:canary@db/prefect", "None 0 flow runs that name the subject in the database of"),
    ):
        profile = f'active = "box"\n[profiles.box]\nPREFECT_SERVER_DATABASE_CONNECTION_URL = "{url}"\n'
        (tmp_path / "profiles.toml").write_text(profile)
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip().startswith(said)
        assert "canary" not in done.stdout


@pytest.mark.slow
@pytest.mark.fault(44)
@pytest.mark.threat(23)
def test_nothing_of_a_forgotten_subject_is_left_and_the_other_champion_still_loads(
    project: Path, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from registered import load, write_export

    from dreambooth import aliases, mlflowstore
    from dreambooth.registry import register

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
        aliases.move(mlflowstore.connect(project)[0], name, "promote", "champion", None, 1)
    everywhere = (project, remote, home, caches)
    assert all(list(found_in(folder)) for folder in everywhere[:3])
    others = leave_behind(project, f"{SUBJECT}-2")
    leave_behind(project, SUBJECT)
    for subject_id in (f"{SUBJECT}-2", SUBJECT):
        kill_adding(project, photos, subject_id)
    others += (project / "data/subjects").glob(f".{SUBJECT}-2.*")
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
    assert all(count > 0 for place, count in told["erased"].items() if place not in EMPTY_HERE), told
    assert {path.name: path.read_bytes() for path in (project / "build/classes/dog").iterdir()} == shared

    assert load(project, "rex").predict({"prompt": "a photo of sks dog"})[0].startswith(b"\x89PNG")
    shutil.rmtree(project / "models" / "rex")
    shutil.rmtree(project / ".dvc" / "cache")
    dvc(project, "pull", "train@rex")  # its objects are in the remote still
    assert forget(project, home).returncode == 3  # nothing is known of it

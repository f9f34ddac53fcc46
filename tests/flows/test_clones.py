"""Two workers in two clones that share a git repository, a DVC remote and the server, and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect.states import Failed
from servers import refusing
from toy_project import REPOSITORY, dvc, git, kill_tree, make_origin, make_toy_project, post, prefect, quiet, worker
from waiting import await_true, free_port

from dreambooth import versions
from dreambooth.errors import ParamsError, PipelineError
from dreambooth.params import load_params
from dreambooth.yaml12 import load_yaml
from flows import clones, commandline, copies
from flows.clone import PAUSES, REMEDY, RETRIES, _may_pass, hand_back
from flows.graph import Graph
from flows.program import failed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SUBJECTS = {"biscuit": "dog", "rex": "dog", "bad": "dog", "mug": "cup", "pot": "cup", "jar": "cup"}
ENTRIES = ("validate", "train", "evaluate", "report", "export")
BROKEN, SLOW = "bad", "jar"


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A bare repository of six subjects of two classes, one of them broken, with a folder as the DVC remote."""
    root = make_toy_project(tmp_path / "source", SUBJECTS)
    (root / f"fail-train-{BROKEN}").touch()
    return make_origin(root)


@pytest.fixture
def machines(origin: Path, tmp_path: Path, prefect_home: Path, prefect_server: str) -> dict[str, dict[str, str]]:
    """The environments of two workers, each with a checkout, a cache and a scratch folder of its own."""
    found = {}
    for name in ("one", "two"):
        home = tmp_path / name
        git(tmp_path, "clone", "--quiet", str(origin), str(home))
        found[name] = {
            **quiet(prefect_home),
            "PREFECT_API_URL": prefect_server,
            "DREAMBOOTH_HOME": str(home),
            "DREAMBOOTH_SCRATCH": str(tmp_path / f"scratch-{name}"),
            "DREAMBOOTH_TRACKING": "off",
            "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests/flows"))),
            "TOY_LOG": str(tmp_path / "ran.log"),
            "TOY_MACHINE": name,
            "TOY_REGISTRY": str(tmp_path / "registry.json"),
        }
    deploy(found["one"], tmp_path)
    return found


def deploy(environment: dict[str, str], folder: Path) -> None:
    """Deploy prefect.yaml with a pool of our own, and with the registry that counts; from a checkout of no worker."""
    text = (REPOSITORY / "prefect.yaml").read_text()
    text = text.replace("name: dreambooth", "name: clones").replace(
        "flows.clone.personalize", "counting_flows.personalize"
    )
    (folder / "prefect.yaml").write_text(text)
    prefect(environment, "work-pool", "create", "clones", "--type", "process", "--overwrite")
    elsewhere = {**environment, "DREAMBOOTH_HOME": str(folder / "laptop")}
    prefect(elsewhere, "deploy", "--name", "clone", "--prefect-file", "prefect.yaml", folder=folder)


def retrain(environment: dict[str, str], told: str = "", **parameters: Any) -> str:
    """Run the flow where `environment` has its checkout; return how it ended, having `told` something."""
    given = {"deployment": "personalize/clone", "promotion": "none", **parameters}
    program = "import json, sys; from counting_flows import retrain; "
    program += "state = retrain(**json.loads(sys.argv[1]), return_state=True); print(state.name, state.message)"
    command = [sys.executable, "-c", program, json.dumps(given)]
    home = environment["DREAMBOOTH_HOME"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert told in done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.fault(38)
def test_two_workers_share_six_subjects_and_no_stage_runs_twice(
    machines: dict[str, dict[str, str]], tmp_path: Path, prefect_server: str
) -> None:
    log, home = tmp_path / "ran.log", Path(machines["one"]["DREAMBOOTH_HOME"])
    with (
        worker(machines["one"], tmp_path / "one.log", "one", "clones", 3),
        worker(machines["two"], tmp_path / "two.log", "two", "clones", 3),
    ):
        assert retrain(machines["one"], "prefect gcl create gpu --limit 1").startswith(
            "Failed 1/6 subjects failed: bad: "
        )
        executed = Counter(log.read_text().splitlines())
        whole = [f"{entry}@{one}" for one in SUBJECTS if one != BROKEN for entry in ENTRIES]
        wanted = {*whole, "prior@dog", "prior@cup", f"validate@{BROKEN}", f"train@{BROKEN}"}
        assert executed == Counter(wanted)
        assert all("submitting flow run" in (tmp_path / f"{name}.log").read_text() for name in machines)
        table = next(one for one in post(prefect_server, "artifacts/filter", {}) if one["key"] == "retrain")
        rows = json.loads(table["data"])
        assert rows[0]["subject"] == BROKEN
        assert "E_TRAIN: the loss is NaN" in rows[0]["outcome"]
        assert {row["outcome"] for row in rows[1:]} == {"done"}

        # What the workers made is known here, by dvc.lock, and restored from the remote without computing.
        stale = {stage.key for stage in Graph.load(home, allow_missing=True).stale}
        assert stale == {BROKEN}
        log.unlink()
        dvc(home, "pull", "--quiet", "export@mug")
        assert (home / "export/mug/manifest.json").is_file()
        # Only what failed is tried again.
        assert retrain(machines["one"]).startswith("Failed 1/1 subjects failed: bad: ")
        assert set(log.read_text().splitlines()) == {f"train@{BROKEN}"}


def test_a_clone_whose_export_could_not_be_registered_says_to_start_it_again(
    tmp_path: Path, prefect_home: Path, prefect_server: str, tiny_model_folder: Path
) -> None:
    """The clone is gone, and `dreambooth register` would take what lies in the home for the newest."""
    root = make_toy_project(tmp_path / "source", {"biscuit": "dog"})
    shutil.copytree(tiny_model_folder, root / "pipeline")
    home = tmp_path / "home"
    git(tmp_path, "clone", "--quiet", str(make_origin(root)), str(home))
    program = "import sys; from flows.clone import personalize; "
    program += "print(personalize('biscuit', root=sys.argv[1], return_state=True).message)"
    environment = {
        **quiet(prefect_home),
        "PREFECT_API_URL": prefect_server,
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",
        "DREAMBOOTH_SCRATCH": str(tmp_path / "scratch"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    }
    command = [sys.executable, "-c", program, str(home)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=True)
    message = done.stdout.splitlines()[-1]
    assert message.startswith("register biscuit: E_REGISTRY: cannot register biscuit in ")
    assert message.endswith(f"Connection refused; {REMEDY}")


@pytest.mark.usefixtures("automations_for_now")
def test_a_killed_worker_s_subject_continues_from_its_checkpoint_elsewhere(
    machines: dict[str, dict[str, str]], tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for environment in machines.values():
        environment["DREAMBOOTH_SCRATCH"] = str(tmp_path / "scratch")  # on a disk that both reach
    source = tmp_path / "source"
    (source / f"steps-train-{SLOW}").write_text("40")
    git(source, "add", "--all")
    git(source, "commit", "--quiet", "--message", "slow")
    git(source, "push", "--quiet", str(tmp_path / "origin.git"), "main")
    apply_with(machines["one"])
    log = tmp_path / "ran.log"
    prefect(machines["one"], "deployment", "run", "personalize/clone", "--param", f'subject="{SLOW}"')
    with worker(machines["one"], tmp_path / "one.log", "one", "clones", 3) as first:
        await_true(lambda: log.exists() and "step 5 " in log.read_text(), 200)
        kill_tree(first.pid)
        killed = time.monotonic()
    with worker(machines["two"], tmp_path / "two.log", "two", "clones", 3):
        deployment = {"deployments": {"name": {"any_": ["clone"]}}, "sort": "START_TIME_DESC", "limit": 1}
        await_true(
            lambda: post(prefect_server, "flow_runs/filter", deployment)[0]["state_type"] in ("COMPLETED", "FAILED"),
            300,
            1,
        )
        sys.stdout.write(f"the subject of the killed worker was done {time.monotonic() - killed:.0f} s later\n")
        run = post(prefect_server, "flow_runs/filter", deployment)[0]
        assert run["state_type"] == "COMPLETED", run["state"]
        assert run["run_count"] == 2
    steps = [line.split() for line in log.read_text().splitlines() if line.startswith("step")]
    numbers = [int(step[1]) for step in steps]
    assert sorted(set(numbers)) == list(range(40))
    assert len(numbers) <= 41  # the step that was not kept is taken again
    assert {step[-1] for step in steps if int(step[1]) < 5} == {"one"}
    assert steps[-1][-1] == "two"


def apply_with(environment: dict[str, str]) -> None:
    program = "from flows.automations import apply; apply()"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)


def test_a_clone_has_its_parameters_overridden_where_dvc_hashes_them(tmp_path: Path) -> None:
    root = make_toy_project(tmp_path / "project", {"biscuit": "dog"})
    clones.override(root, {"train.learning_rate": 2e-6, "subjects.biscuit.identifier": "zwx"})
    params = load_params(root / "params.yaml")
    assert params.train.learning_rate == 2e-6
    assert params.subject("biscuit").identifier == "zwx"
    before = (root / "params.yaml").read_bytes()
    for values, message in (
        ({"train.learning_rat": 1}, r"an override sets it; did you mean train\.learning_rate\?"),
        ({"train": {}}, "write section.name"),
        ({"train.learning_rate": "fast"}, "learning_rate"),
    ):
        with pytest.raises(ParamsError, match=message):
            clones.override(root, values)
    assert (root / "params.yaml").read_bytes() == before


def test_an_override_changes_as_many_lines_as_it_has_values_and_keeps_the_comments(tmp_path: Path) -> None:
    before = (REPOSITORY / "params.yaml").read_text().splitlines()
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    clones.override(tmp_path, {"train.learning_rate": 3e-6, "train.seed": 7})
    after = (tmp_path / "params.yaml").read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 2
    assert [new.partition("#")[2] for _, new in changed] == [old.partition("#")[2] for old, _ in changed]


def test_linked_parameters_stay_a_link_and_what_it_leads_to_is_handed_back(tmp_path: Path) -> None:
    home = make_toy_project(tmp_path / "home", {"biscuit": "dog"})
    (home / "params.yaml").rename(home / "ours.yaml")
    (home / "params.yaml").symlink_to("ours.yaml")
    (home / "dvc.lock").write_text("schema: '2.0'\n")
    git(home, "init", "--quiet")
    git(home, "add", "--all")
    git(home, "commit", "--quiet", "--message", "toy")
    git(tmp_path, "clone", "--quiet", str(home), "clone")
    clones.override(tmp_path / "clone", {"train.learning_rate": 2e-6})
    assert clones.commit_back(tmp_path / "clone", "7") == "runs/7"
    assert git(home, "ls-tree", "runs/7", "params.yaml").startswith("120000 ")
    changed = load_yaml(git(home, "show", "runs/7:ours.yaml"))
    assert changed["train"]["learning_rate"] == 2e-6


def test_overridden_parameters_do_not_follow_a_link_out_of_the_clone(tmp_path: Path) -> None:
    root = make_toy_project(tmp_path / "project", {"biscuit": "dog"})
    shared = (root / "params.yaml").rename(tmp_path / "shared.yaml")
    (root / "params.yaml").symlink_to(shared)
    before = shared.read_bytes()
    clones.override(root, {"train.learning_rate": 2e-6})
    assert load_params(root / "params.yaml").train.learning_rate == 2e-6
    assert shared.read_bytes() == before


@contextmanager
def a_clone(home: Path) -> "Iterator[subprocess.Popen[str]]":
    """Have a process that works in a clone of the home."""
    program = "import sys, time; from pathlib import Path; from flows.clones import cloned; home = Path(sys.argv[1])\n"
    program += "with cloned(home, str(home), None): print('cloned', flush=True); time.sleep(99)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("DREAMBOOTH_SCRATCH", None)
    command = [sys.executable, "-c", program, str(home)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "cloned\n"
        try:
            yield child
        finally:
            child.kill()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A project that is its own repository."""
    root = make_toy_project(tmp_path / "home", {"biscuit": "dog"})
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "toy")
    return root


def test_a_killed_process_leaves_a_clone_that_nobody_uses_and_a_living_one_says_who_it_is(home: Path) -> None:
    with a_clone(home) as child:
        (used,) = copies.copies(home)
        assert f"pid {child.pid} on" in used.user
    (left,) = copies.copies(home)
    assert (left.folder, left.user, left.is_clone) == (used.folder, "", True)
    assert (left.project / "params.yaml").is_file()


def test_a_run_removes_the_clone_of_one_that_was_killed_and_none_in_which_somebody_works(
    home: Path, prefect_home: Path, prefect_server: str
) -> None:
    with a_clone(home):
        (killed,) = copies.copies(home)
    with a_clone(home):
        (used,) = {copy.folder for copy in copies.copies(home)} - {killed.folder}
        program = "import sys; from flows.clone import personalize; personalize('tom', return_state=True)"
        environment = {**quiet(prefect_home), "PREFECT_API_URL": prefect_server, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, "-c", program], cwd=home, env=environment, check=True, capture_output=True)
        assert [copy.folder for copy in copies.copies(home)] == [used]


def test_a_lock_takes_the_entries_of_some_keys_and_keeps_ours_of_the_others() -> None:
    ours = {"schema": "2.0", "stages": {"train@rex": {"cmd": "a"}, "train@biscuit": {"cmd": "b"}}}
    theirs = {"schema": "2.0", "stages": {"train@rex": {"cmd": "x"}, "train@biscuit": {"cmd": "y"}, "prior@dog": {}}}
    merged = clones.merge_locks(ours, theirs, ["rex"])
    assert merged["stages"] == {"train@rex": {"cmd": "x"}, "train@biscuit": {"cmd": "b"}}


@pytest.mark.fault(28)
def test_outputs_that_a_remote_does_not_take_stay_and_are_sent_when_it_does(project: Path, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    remote.write_text("no folder")
    dvc(project, "remote", "add", "--default", "store", str(remote))
    dvc(project, "repro", "validate@rex")
    with pytest.raises(PipelineError) as refused:
        clones.publish(project, ["validate@rex"])
    assert len(str(refused.value).splitlines()) == 1
    assert (project / "build/rex/instance/manifest.json").is_file()
    remote.unlink()
    clones.publish(project, ["validate@rex"])
    assert [path for path in remote.rglob("*") if path.is_file()]


@pytest.mark.fault(28)
def test_a_hand_back_says_why_it_is_tried_again(project: Path, prefect_home: Path) -> None:
    """Its tries take four minutes."""
    git(project, "remote", "add", "origin", str(make_origin(project)))
    dvc(project, "repro", "validate@rex")
    remote = project.parent / "remote"
    remote.write_text("no folder")
    program = (
        "import logging, sys; from pathlib import Path; from prefect import flow; from flows.clone import hand_back\n"
    )
    program += "from flows.personalize import _is_news; logging.getLogger('prefect.task_runs').addFilter(_is_news)\n"
    program += "flow(lambda: hand_back(Path(sys.argv[1]), ['validate@rex'], '7'), name='handing')()"
    command = [sys.executable, "-c", program, str(project)]
    environment = {**quiet(prefect_home / "by-hand"), "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as handing:
        assert handing.stderr is not None
        said = list[str]()
        for line in handing.stderr:
            said.append(line)
            if "Retry 1/4 will start 5.0 second(s)" in line:
                remote.unlink()
    assert handing.returncode == 0, said
    (told,) = [line for line in said if " - Retry " in line]
    assert "E_PIPELINE: dvc push in " in told
    assert "dvc.org/support" not in told
    assert git(project.parent / "origin.git", "branch", "--list", "runs/7")


@pytest.mark.fault(28)
def test_a_remote_that_refuses_is_said_in_a_line_with_its_reason_and_is_asked_once(project: Path) -> None:
    dvc(project, "repro", "validate@rex")
    with refusing(403) as address:
        dvc(project, "remote", "add", "--default", "store", f"{address}/store")
        with pytest.raises(PipelineError) as refused:
            clones.publish(project, ["validate@rex"])
    message = str(refused.value)
    assert re.search(r"dvc push in .* - 403, message='Forbidden'.*failed to upload; mend that", message)
    assert len(message.splitlines()) == 1
    assert not _may_pass(None, None, failed(refused.value))


def test_a_machine_without_git_is_told_so_in_a_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(project / "python"))  # beside which git may lie
    with pytest.raises(PipelineError, match=r"git in .*: git is not there; install .* then run again"):
        commandline.git(project, "status")


def test_a_folder_is_fetched_by_its_hash_and_one_that_the_remote_lacks_is_named(origin: Path, tmp_path: Path) -> None:
    made, home = tmp_path / "source", tmp_path / "home"
    dvc(made, "repro", "validate@rex")
    dvc(made, "push", "--quiet", "validate@rex")
    md5 = str(versions.recorded_md5(made, "build/rex/instance"))
    git(tmp_path, "clone", "--quiet", str(origin), str(home))
    clones.fetch(home, md5)
    fetched = [path for path in (home / ".dvc/cache/files").rglob("*") if path.is_file()]
    assert len(fetched) == 4  # a picture, two texts, and the list of them
    shutil.rmtree(home / ".dvc/cache")
    lost = next(path for path in (tmp_path / "remote/files").rglob("*") if path.is_file() and path.suffix != ".dir")
    lost.unlink()
    for bad, message in ((md5, "dvc fetch in"), (f"{0:032}.dir", f"lacks {0:032}.dir"), ("../../x", "is no hash")):
        with pytest.raises(PipelineError, match=message) as refused:
            clones.fetch(home, bad)
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("E_PIPELINE: dvc push: Connection refused", True),
        ("E_PIPELINE: dvc push: 503 Service Unavailable", True),
        ("E_PIPELINE: dvc push: 401 Unauthorized", False),
        ("E_PIPELINE: git push: fatal: Authentication failed, access denied", False),
    ],
)
def test_what_a_remote_says_decides_whether_a_hand_back_is_tried_again(said: str, again: bool) -> None:
    assert _may_pass(None, None, Failed(message=said)) == again
    assert (hand_back.retries, len(PAUSES)) == (RETRIES, RETRIES)
    assert hand_back.retry_condition_fn is _may_pass


def test_a_clone_has_the_remotes_and_the_credentials_of_its_home(tmp_path: Path) -> None:
    """A folder may be named in relation to the home, and git does not carry config.local."""
    home = make_toy_project(tmp_path / "home", {"rex": "dog"})
    git(home, "init", "--quiet", "--initial-branch", "main")
    dvc(home, "remote", "add", "--default", "store", "../my store")
    dvc(home, "remote", "add", "cloud", "s3://bucket/folder")
    dvc(home, "remote", "modify", "--local", "cloud", "access_key_id", "canary")
    git(home, "add", "--all")
    git(home, "commit", "--quiet", "--message", "toy")
    with clones.cloned(home, str(home), None) as clone:
        assert dict(clones.REMOTE.findall(commandline.dvc(clone, "config", "--list"))) == {
            "store": str(tmp_path / "my store"),
            "cloud": "s3://bucket/folder",
        }
        assert "canary" in (clone / clones.CONFIG).read_text()
        assert (clone / clones.CONFIG).stat().st_mode & 0o77 == (home / clones.CONFIG).stat().st_mode & 0o77

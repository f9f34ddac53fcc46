"""Which subjects are stale and why; what is skipped; what is one piece of work."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed
from registered import write_export
from test_cli import dreambooth
from toy_project import REPOSITORY, dvc, git, make_origin, quiet

from dreambooth import versions
from dreambooth.params import load_params
from dreambooth.registry import register
from flows import clones
from flows.graph import Graph
from flows.retrain import Work, _look_again, find_stale, inputs_hash

SUBJECTS = ["biscuit", "rex"]


def stale(project: Path, **options: object) -> dict[str, tuple[str, ...]]:
    graph = Graph.load(project, allow_missing=not options.get("files", True)).select(SUBJECTS)
    return find_stale(project, graph, SUBJECTS, **options)  # type: ignore[arg-type]


@pytest.fixture
def registered(project: Path, tiny_model_folder: Path) -> Path:
    """A project in which nothing is stale, and both exports are registered."""
    dvc(project, "repro")
    for subject in SUBJECTS:
        write_export(project, tiny_model_folder, "1" * 64, subject)
    dvc(project, "commit", "--force", "--quiet")
    for subject in SUBJECTS:
        register(project, subject)
    return project


def test_a_subject_is_stale_for_what_changed_or_for_what_is_not_registered(project: Path) -> None:
    assert stale(project) == dict.fromkeys(SUBJECTS, ("never ran",))
    dvc(project, "repro")
    assert stale(project) == dict.fromkeys(SUBJECTS, ("not registered",))
    photo = next((project / "data/subjects/rex").iterdir())
    photo.write_bytes(photo.read_bytes() + b"0")
    assert stale(project)["rex"] == ("data/subjects/rex modified",)
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["prior"]["seed"] += 1
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert stale(project)["biscuit"] == ("prior.seed modified",)


@pytest.mark.slow
def test_a_registered_subject_is_stale_when_its_champion_is_old_and_files_elsewhere_are_no_fault(
    registered: Path,
) -> None:
    from dreambooth import aliases, mlflowstore

    assert stale(registered) == {}
    client = mlflowstore.connect(registered)[0]
    aliases.move(client, "rex", "promote", "champion", None, 1, "promote", "a test")
    assert stale(registered, oldest_days=1.0) == {}
    assert stale(registered, oldest_days=0.0) == {"rex": ("the champion is 0 days old",)}

    for folder in ("build", "models", "export", "reports", "metrics"):
        shutil.rmtree(registered / folder)
    assert stale(registered, files=False) == {}
    assert set(stale(registered)) == set(SUBJECTS)


@pytest.mark.slow
def test_an_export_that_is_an_older_version_again_is_registered_once_it_is_the_challenger(
    registered: Path, tiny_model_folder: Path
) -> None:
    """A parameter is changed, and changed back."""
    for model in ("2", "1"):
        write_export(registered, tiny_model_folder, model * 64, "rex")
        dvc(registered, "commit", "--force", "--quiet")
        assert stale(registered) == {"rex": ("the export is not registered",)}
        version = register(registered, "rex")
    assert (version.version, version.created) == (1, False)
    assert stale(registered) == stale(registered, files=False) == {}
    assert " v1 " in dreambooth(registered, "status", "rex").stdout
    assert "Everything is up to date." in dreambooth(registered, "run", "rex").stdout

    write_export(registered, tiny_model_folder, "3" * 64, "rex")
    assert " v2 of another export " in dreambooth(registered, "status", "rex").stdout


@pytest.mark.slow
def test_what_a_clone_made_and_could_not_register_is_stale(registered: Path, tiny_model_folder: Path) -> None:
    """Its dvc.lock comes home, its export does not."""
    write_export(registered, tiny_model_folder, "2" * 64, "rex")
    dvc(registered, "commit", "--force", "--quiet")
    shutil.rmtree(registered / "export")
    assert stale(registered, files=False) == {"rex": ("the export is not registered",)}


@pytest.mark.slow
def test_dvc_lock_is_read_once_for_all_subjects_and_again_when_it_changed(
    registered: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = list[str](), versions.load_yaml
    monkeypatch.setattr(versions, "load_yaml", lambda text: [read.append(text), load(text)][1])
    (registered / "dvc.lock").touch()  # the fixture may have read it
    assert stale(registered, files=False) == {}
    assert len(read) == 1
    write_export(registered, tiny_model_folder, "2" * 64, "rex")
    dvc(registered, "commit", "--force", "--quiet")
    assert stale(registered, files=False) == {"rex": ("the export is not registered",)}
    assert len(read) == 2


@pytest.fixture
def retrained(prefect_home: Path, prefect_server: str) -> Callable[..., tuple[list[Any], str]]:
    """Run the flow in a process: name, message and type of its state and whether torch was imported, and its stderr."""
    program = (
        "import json, sys; from flows.retrain import retrain; state = retrain(*sys.argv[1:], return_state=True); "
        "print(json.dumps([state.name, state.message, state.type.value, 'torch' in sys.modules]))"
    )
    environment = {**quiet(prefect_home), "PREFECT_API_URL": prefect_server, "PYTHONPATH": str(REPOSITORY)}

    def run(root: Path, *arguments: str) -> tuple[list[Any], str]:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


@pytest.mark.slow
@pytest.mark.fault(37)
def test_an_unchanged_project_is_skipped_without_torch(
    registered: Path, retrained: Callable[..., tuple[list[Any], str]]
) -> None:
    assert retrained(registered)[0] == ["Skipped", "skipped: unchanged", "COMPLETED", False]


@pytest.mark.slow
def test_clones_of_a_project_without_git_are_refused_in_one_line(
    project: Path, retrained: Callable[..., tuple[list[Any], str]]
) -> None:
    (_, message, _, _), said = retrained(project, "rex", "personalize/clone")
    assert message.startswith("E_PIPELINE: git rev-parse in ")
    assert "Traceback" not in said


@pytest.mark.slow
def test_what_clones_would_not_see_is_named_before_a_flow_run_is_asked_for(
    project: Path, retrained: Callable[..., tuple[list[Any], str]]
) -> None:
    make_origin(project)
    git(project, "remote", "add", "origin", str(project.parent / "origin.git"))

    def told() -> str:
        (state, message, _, _), said = retrained(project, "rex", "personalize/clone", "none")
        assert (state, "(personalize/clone)" in said) == ("Failed", False), said
        return str(message)

    values = yaml.safe_load((project / "params.yaml").read_text())
    values["train"]["learning_rate"] *= 2
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert re.search(r"E_PIPELINE: clones work on .* differ from it: params.yaml; git commit and git push", told())
    git(project, "commit", "--all", "--quiet", "--message", "another rate")
    assert re.search(r"E_PIPELINE: .*origin.git lacks the commit [0-9a-f]{12} that .* has; git push", told())
    git(project, "push", "--quiet", "origin", "main")
    head = clones.pushed_head(project)
    elsewhere = project.parent / "elsewhere"  # others go on, and the home has not fetched what they pushed
    git(project.parent, "clone", "--quiet", str(project.parent / "origin.git"), str(elsewhere))
    git(elsewhere, "commit", "--quiet", "--allow-empty", "--message", "more")
    git(elsewhere, "push", "--quiet", "origin", "main")
    assert clones.pushed_head(project) == head


def test_a_subject_that_is_stale_after_its_run_is_not_called_done(project: Path) -> None:
    dvc(project, "repro", "report@biscuit", "export@biscuit")
    works = [Work((one,), ("a reason",), FlowRun(flow_id=uuid4(), state=Completed())) for one in SUBJECTS]
    _look_again(project, works, {})
    assert [work.is_done for work in works] == [True, False]
    assert "out of date here still: never ran; see git diff" in works[1].faults[0]


@pytest.mark.fault(36)
def test_the_same_work_has_the_same_key_and_other_photos_or_parameters_another(project: Path) -> None:
    def key(subject: str = "rex") -> str:
        return inputs_hash(project, load_params(project / "params.yaml"), subject, ["never ran"])

    first = key()
    assert key() == first
    assert key("biscuit") != first
    photo = next((project / "data/subjects/rex").iterdir())
    before = photo.read_bytes()
    photo.write_bytes(before + b"0")
    assert key() != first
    photo.write_bytes(before)
    assert key() == first
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["subjects"]["tom"] = dict(values["subjects"]["biscuit"])  # another subject is none of its business
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert key() == first
    values["train"]["learning_rate"] *= 2
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert key() != first

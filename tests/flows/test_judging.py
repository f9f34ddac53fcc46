"""Judge what a worker made in a clone where nothing of it lies: two clones, a DVC remote, git, and one registry."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from registered import BISCUIT, write_evaluation, write_export
from tiny_project import add_photos, make_project, tiny_values
from toy_project import REPOSITORY, dvc, git, make_origin, make_toy_project, quiet

from dreambooth import aliases, mlflowstore
from dreambooth.folders import new_folder, read_manifest, sha256_of
from dreambooth.registry import register
from dreambooth.versions import CHAMPION, aliases_of
from flows import clones

pytestmark = pytest.mark.slow
OLD, NEW = "1" * 64, "2" * 64  # fingerprints of two trainings
BEFORE, AFTER = {"code": "1", "photos": "p"}, {"code": "2", "photos": "q"}  # how they were evaluated

# The end of a retraining at home. Only the drawing is a stand-in: it notes what lies where it is told to draw, and
# scores the champion at .5 and the challenger at .6.
PROGRAM = """
import json, sys
from pathlib import Path
import stages.evaluate
from dreambooth.folders import read_manifest
from registered import add_champion, write_evaluation

def beside_champion(params, subject, root, champion, fingerprint, target):
    seen = {
        "training": read_manifest(root / "models" / subject)["fingerprint"],
        "instance": (root / "build" / subject / "instance/which.txt").read_text(),
        "champion": read_manifest(champion)["model"],
        "root": str(root),
    }
    Path(sys.argv[2]).write_text(json.dumps(seen))
    made = Path(sys.argv[2]).with_suffix(".folder")
    for name, score in (("champion", .5), ("personalised", .6)):
        write_evaluation(made / name, seen["training"], score, how={"code": "now"})
    one, other = (made / name / "build" / subject / "evaluation" for name in ("personalised", "champion"))
    one.rename(target)
    add_champion(target, other)

stages.evaluate.beside_champion = beside_champion
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed
from dreambooth.params import load_params
from flows import retrain
import uuid

@flow(persist_result=False)
def judge():  # what `retrain` does when the runs of its subjects have ended
    work = retrain.Work(("biscuit",), ("photos",), FlowRun(flow_id=uuid.uuid4(), state=Completed()))
    root = Path(sys.argv[1])
    retrain._promote(root, load_params(root / "params.yaml"), [work], "gate")
    return Completed(message=json.dumps([work.verdict, retrain._report([work]).message]))

print(judge(return_state=True).message)
"""


@dataclass
class Site:
    """A checkout where people promote, and one of a worker; they share git, a DVC remote and MLflow, and no disk."""

    folder: Path
    home: Path
    worker: Path

    def make(self, training: str, identity: float, how: dict[str, str], run: str, limit: int | None = None) -> None:
        """Have the worker make and register a version, and hand it back by the remote and the branch of the run."""
        root = self.worker
        dvc(root, "repro", "--force")
        photos = root / "build" / BISCUIT / "instance"
        (photos / "which.txt").unlink()
        with new_folder(photos, {}) as folder:
            (folder / "which.txt").write_text(f"photos of {run}")
        inputs = {"instance": sha256_of(read_manifest(photos)["files"])}
        with new_folder(root / "models" / BISCUIT, {"fingerprint": training, "inputs": inputs}):
            pass
        write_export(root, self.folder / "pipeline", training)
        write_evaluation(root, training, identity, how)
        dvc(root, "commit", "--force", "--quiet")
        self.hand_back(run, limit)

    def hand_back(self, run: str, limit: int | None = None) -> None:
        register(self.worker, BISCUIT, limit)
        clones.publish(self.worker, [f"{entry}@{BISCUIT}" for entry in ("validate", "train", "evaluate", "export")])
        assert clones.commit_back(self.worker, run)

    def environment(self) -> dict[str, str]:
        """Of a process at home that has no server of Prefect."""
        places = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
        found = {**quiet(self.folder / "prefect"), "PYTHONPATH": places, "DREAMBOOTH_HOME": str(self.home)}
        return {name: value for name, value in found.items() if name != "PREFECT_API_URL"}

    def judge(self) -> tuple[str, str, dict[str, str]]:
        """Judge at home; return the verdict, the message of the run, and what lay where the drawing was to draw."""
        seen = self.folder / "seen.json"
        command = [sys.executable, "-c", PROGRAM, str(self.home), str(seen)]
        done = subprocess.run(
            command, cwd=self.home, env=self.environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        verdict, message = json.loads(done.stdout.splitlines()[-1])
        return verdict, message, json.loads(seen.read_text()) if seen.exists() else {}

    def champion(self) -> int | None:
        return aliases_of(mlflowstore.connect(self.home)[0], BISCUIT).get(CHAMPION)


def share(root: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Put a project into a repository of git with a DVC remote and an MLflow; return two checkouts of it."""
    place = root.parent
    make_origin(root)
    shutil.copyfile(database, place / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    mlflowstore.connect(place)  # as a server, it keeps its files in neither checkout
    for name in ("home", "worker"):
        git(place, "clone", "--quiet", str(place / "origin.git"), str(place / name))
    return Site(place, place / "home", place / "worker")


@pytest.fixture
def site(
    tmp_path: Path, tiny_model_folder: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Site]:
    """Return what makes the two checkouts and two versions: the champion, and a better one of other photos."""
    root = make_toy_project(tmp_path / "source", {BISCUIT: "dog"})
    text = (root / "dvc.yaml").read_text()  # as in the real one, the evaluation reads the photos
    assert text.count("      cmd: python toy.py evaluate ${key}\n      deps:\n") == 1
    deps = "      cmd: python toy.py evaluate ${key}\n      deps:\n"
    (root / "dvc.yaml").write_text(text.replace(deps, deps + "        - build/${key}/instance\n"))
    shutil.copytree(tiny_model_folder, tmp_path / "pipeline")
    found = share(root, empty_database, monkeypatch)

    def made(limit: int | None = None) -> Site:
        found.make(OLD, 0.5, BEFORE, "first", limit)
        client = mlflowstore.connect(found.worker)[0]
        aliases.move(client, BISCUIT, "promote", CHAMPION, None, 1, "promote", "the first one")
        found.make(NEW, 0.6, AFTER, "second", limit)
        return found

    return made


def test_what_a_clone_made_of_other_photos_is_judged_at_home_and_promoted(site: Callable[..., Site]) -> None:
    """As `retrain` does after the run: dvc.lock has come home, no file has."""
    made = site()
    assert clones.take_back(made.home, str(made.folder / "origin.git"), "second", [BISCUIT])
    verdict, message, seen = made.judge()
    assert verdict.startswith("version 2: promote: identity +0.100"), verdict
    assert message == "1 subjects are up to date"
    assert made.champion() == 2
    assert (seen["training"], seen["instance"], seen["champion"]) == (NEW, "photos of second", OLD)
    assert not (made.home / "models").exists()
    assert not Path(seen["root"]).exists()


def test_without_its_files_it_is_said_to_be_unjudged_and_with_them_the_branch_of_the_run_is_enough(
    site: Callable[..., Site],
) -> None:
    """As an approval on another worker: not even dvc.lock has come home. At first the DVC remote is away, too."""
    made = site()
    remote = made.folder / "remote"
    remote.rename(made.folder / "away")
    verdict, message, seen = made.judge()
    assert verdict.startswith("E_REGISTRY: version 2 of biscuit was not judged: it and the champion, version 1, were")
    assert "evaluated differently (code, photos)" in verdict
    assert "dvc pull in " in verdict
    assert "mend that, then run again" in verdict
    assert len(verdict.splitlines()) == 1
    assert message == "1 subjects are up to date; not judged, see the table: biscuit"
    assert (made.champion(), seen) == (1, {})
    entries = aliases.read_log(mlflowstore.connect(made.home)[0], BISCUIT)
    assert "refuse" not in {entry.action for entry in entries}

    (made.folder / "away").rename(remote)
    verdict, message, seen = made.judge()
    assert verdict.startswith("version 2: promote: identity +0.100"), verdict
    assert made.champion() == 2
    assert (seen["training"], seen["instance"], seen["champion"]) == (NEW, "photos of second", OLD)


def test_exports_that_lie_in_dvc_alone_are_fetched_by_the_hash_of_their_version(site: Callable[..., Site]) -> None:
    """Above registry.max_logged_bytes the registry only points to them; no dvc.lock at home names the champion's."""
    made = site(limit=0)
    shutil.rmtree(made.worker)
    assert clones.take_back(made.home, str(made.folder / "origin.git"), "second", [BISCUIT])
    verdict, _, seen = made.judge()
    assert verdict.startswith("version 2: promote: identity +0.100"), verdict
    assert (made.champion(), seen["champion"]) == (2, OLD)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_real_stages_and_the_real_drawing_judge_what_a_worker_trained_on_more_photos(
    tmp_path: Path, tiny_model_folder: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the verdict on a tiny random model is: it is one on scores that were made alike."""
    from dvc.repo import Repo

    root = make_project(tmp_path / "source", tiny_model_folder, tiny_values())
    for name in ("dreambooth", "stages"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "data/classes/README.md").touch()  # git keeps no empty folder
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    Repo.init(str(root), no_scm=True).close()
    made = share(root, empty_database, monkeypatch)
    dvc(made.worker, "repro")
    made.hand_back("first")
    aliases.move(mlflowstore.connect(made.worker)[0], BISCUIT, "promote", CHAMPION, None, 1, "promote", "the first one")
    add_photos(made.worker / "data/subjects" / BISCUIT, 2, first=5)
    dvc(made.worker, "repro")
    made.hand_back("second")
    command = [sys.executable, "-m", "flows.promote", BISCUIT]
    done = subprocess.run(command, cwd=made.home, env=made.environment(), capture_output=True, text=True, check=False)
    assert "evaluation images, champion" in done.stderr
    (entry,) = [one for one in aliases.read_log(mlflowstore.connect(made.home)[0], BISCUIT) if one.after == 2][-1:]
    assert entry.alias == CHAMPION, done.stderr
    assert "identity" in entry.reason or "prompts count for" in entry.reason
    assert "evaluated alike" not in entry.reason
    assert not (made.home / "models").exists()

"""After an upgrade: what older code made is kept where nothing else changed, and nothing more is."""

from pathlib import Path

import pytest
import yaml
from toy_project import dvc, make_photos

from dreambooth.params import load_params
from flows import cli
from flows.graph import Graph, accept_code
from flows.lanes import Lanes
from flows.plan import make_plan

CODE = "dreambooth/method.py"


@pytest.fixture
def upgraded(project: Path) -> Path:
    """Return a project whose stages all ran; then the code that trains changed, and another module came with it."""
    (project / "dreambooth").mkdir()
    (project / CODE).write_text("one")
    depend(project, CODE)
    dvc(project, "repro")
    (project / CODE).write_text("two")
    (project / "dreambooth/more.py").write_text("one")
    depend(project, "dreambooth/more.py")
    (project / "ran.log").unlink()
    return project


def depend(project: Path, module: str) -> None:
    stages = yaml.safe_load((project / "dvc.yaml").read_text())
    stages["stages"]["train"]["do"]["deps"].append(module)
    (project / "dvc.yaml").write_text(yaml.safe_dump(stages))


def change(project: Path, section: str, key: str, value: float) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params[section][key] = value
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def stale(project: Path) -> list[str]:
    return [stage.name for stage in Graph.load(project).stale]


@pytest.mark.slow
def test_what_code_alone_made_stale_is_up_to_date_without_running_and_for_dvc_too(upgraded: Path) -> None:
    assert "train@biscuit" in stale(upgraded)
    assert accept_code(upgraded, Graph.load(upgraded)) == ["train@biscuit", "train@rex"]
    assert stale(upgraded) == []
    dvc(upgraded, "repro")
    assert not (upgraded / "ran.log").exists()
    assert accept_code(upgraded, Graph.load(upgraded)) == []


@pytest.mark.slow
def test_what_a_parameter_or_a_photo_changed_too_still_runs(upgraded: Path) -> None:
    make_photos(upgraded / "data/subjects/rex", 4, seed=5)
    (upgraded / "models/biscuit/which.txt").write_text("edited")
    assert accept_code(upgraded, Graph.load(upgraded)) == ["train@rex"]  # its own inputs lie there as they were
    assert {"validate@rex", "train@rex", "train@biscuit"} <= set(stale(upgraded))
    change(upgraded, "train", "learning_rate", 2e-4)
    assert accept_code(upgraded, Graph.load(upgraded)) == []
    dvc(upgraded, "repro")
    assert {"validate@rex", "train@rex", "train@biscuit"} <= set((upgraded / "ran.log").read_text().split())


@pytest.mark.slow
def test_what_changes_while_it_is_accepted_still_runs(upgraded: Path) -> None:
    seen = Graph.load(upgraded)
    change(upgraded, "train", "learning_rate", 2e-4)
    assert accept_code(upgraded, seen) == ["train@biscuit", "train@rex"]
    assert Graph.load(upgraded)["train@rex"].reasons == ("train.learning_rate modified",)


@pytest.mark.slow
def test_a_parameter_that_is_changed_back_is_restored_as_if_the_new_code_had_made_it(upgraded: Path) -> None:
    accept_code(upgraded, Graph.load(upgraded))
    before = (upgraded / "params.yaml").read_text()
    change(upgraded, "train", "learning_rate", 2e-4)
    dvc(upgraded, "repro")
    (upgraded / "ran.log").unlink()
    (upgraded / "params.yaml").write_text(before)
    dvc(upgraded, "repro")
    assert not (upgraded / "ran.log").exists()


@pytest.mark.slow
def test_the_plan_names_the_command_and_the_command_says_what_it_took_and_what_is_left(
    upgraded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_photos(upgraded / "data/subjects/rex", 4, seed=5)
    plan = make_plan(upgraded, load_params(upgraded / "params.yaml"), Graph.load(upgraded), Lanes())
    assert "2 stages are out of date by this program's code alone; to keep what they made: dreambooth accept" in (
        plan.in_words(None)
    )
    monkeypatch.chdir(upgraded)
    modules = "dreambooth/method.py modified, dreambooth/more.py modified"
    for arguments, said in (
        (["biscuit"], [f"train@biscuit: {modules}", "1 accepted, 0 left"]),
        (["biscuit"], ["0 accepted, 0 left"]),
        ([], [f"train@rex: {modules}", "1 accepted, 5 left"]),
    ):
        monkeypatch.setattr("sys.argv", ["dreambooth", "accept", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert [
            line.partition(":")[0] if "left" in line else line for line in capsys.readouterr().out.splitlines()
        ] == said

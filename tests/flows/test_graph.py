import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_project import dvc, kill_tree, make_photos
from waiting import await_true

from dreambooth.errors import ParamsError, PipelineError, SubjectError
from flows.check import check
from flows.commandline import child_environment
from flows.doctor import examine
from flows.graph import Graph

TOY = {
    "prior@dog": [],
    "validate@rex": ["data/subjects/rex.dvc"],
    "data/subjects/rex.dvc": [],
    "train@rex": ["validate@rex", "prior@dog"],
    "validate@biscuit": [],
    "train@biscuit": ["validate@biscuit", "prior@dog"],
}


def names(stages: object) -> list[str]:
    return [stage.name for stage in stages]  # type: ignore[attr-defined]


def test_order_is_data_priors_then_subject_after_subject() -> None:
    assert names(Graph.of(TOY, {}).stages) == [
        "data/subjects/rex.dvc",
        "prior@dog",
        "validate@biscuit",
        "train@biscuit",
        "validate@rex",
        "train@rex",
    ]


def test_what_stands_below_a_changed_stage_is_stale_too() -> None:
    graph = Graph.of(TOY, {"validate@rex": ["data/subjects/rex modified"]})
    assert names(graph.stale) == ["validate@rex", "train@rex"]
    assert graph["validate@rex"].reasons == ("data/subjects/rex modified",)
    assert graph["train@rex"].reasons == ()


def test_a_changed_prior_makes_every_subject_of_its_class_stale() -> None:
    assert names(Graph.of(TOY, {"prior@dog": ["changed"]}).stale) == ["prior@dog", "train@biscuit", "train@rex"]


def test_select_keeps_the_subject_and_what_it_is_made_from() -> None:
    selected = Graph.of(TOY, {}).select(["rex"])
    assert names(selected.stages) == ["data/subjects/rex.dvc", "prior@dog", "validate@rex", "train@rex"]
    assert names(selected.of_subject("rex")) == ["validate@rex", "train@rex"]


def test_a_subject_named_like_a_class_does_not_select_the_prior_of_that_class() -> None:
    graph = Graph.of({"prior@dog": [], "prior@cat": [], "train@dog": ["prior@cat"]}, {})
    assert names(graph.select(["dog"]).stages) == ["prior@cat", "train@dog"]


def test_select_refuses_an_unknown_subject_with_the_known_ones() -> None:
    with pytest.raises(SubjectError, match=r"no stage for 'tom'; known: biscuit, rex"):
        Graph.of(TOY, {}).select(["tom"])


def test_load_reads_the_graph_and_calls_everything_stale_that_never_ran(project: Path) -> None:
    graph = Graph.load(project)
    assert names(graph.stages) == names(graph.stale)
    assert names(graph.stages)[0] == "prior@dog"
    assert graph["train@rex"].reasons == ("never ran",)
    assert set(graph["train@rex"].upstream) == {"prior@dog", "validate@rex"}


@pytest.mark.slow
def test_nothing_is_stale_after_dvc_repro_and_a_parameter_tells_which_stage_is(project: Path) -> None:
    dvc(project, "repro")
    assert Graph.load(project).stale == ()
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["train"]["learning_rate"] = 2.0e-4
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    graph = Graph.load(project)
    assert graph["train@rex"].reasons == ("train.learning_rate modified",)
    assert not graph["prior@dog"].stale
    assert not graph["validate@rex"].stale
    assert graph["evaluate@rex"].stale


@pytest.mark.slow
def test_new_photos_make_their_data_file_and_their_subject_stale(project: Path) -> None:
    dvc(project, "add", "data/subjects/rex")
    dvc(project, "repro")
    make_photos(project / "data" / "subjects" / "rex", 5, seed=4)
    stale = Graph.load(project).stale
    assert names(stale)[0] == "data/subjects/rex.dvc"
    assert {stage.key for stage in stale} == {"", "rex"}


def test_a_fault_of_params_yaml_is_told_with_its_field(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("subjects:", "subject:"))
    with pytest.raises(ParamsError, match="subject: unknown key; did you mean subjects"):
        Graph.load(project)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("foreach: ${classes}", "foreach: ${clases}", "Could not find 'clases'"),
        ("do:", "dooo:", "dvc.yaml"),
        ("stages:", "stages: [", "dvc.yaml"),
        ("models/${key}\n", "build\n", "overlap"),
    ],
)
def test_a_fault_of_dvc_yaml_is_one_line(project: Path, old: str, new: str, told: str) -> None:
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace(old, new))
    with pytest.raises(PipelineError) as caught:
        Graph.load(project)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_dvc_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="run there: dvc init"):
        Graph.load(tmp_path)


def test_reading_the_graph_imports_neither_torch_nor_prefect(project: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from flows.graph import Graph; Graph.load(Path(sys.argv[1]));"
        "print([name for name in ('torch', 'prefect', 'mlflow', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(project)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_that_stages_share_are_compared_once_and_what_is_changed_is_what_dvc_says(project: Path) -> None:
    stages = yaml.safe_load((project / "dvc.yaml").read_text())
    for stage in stages["stages"].values():
        stage["do"].setdefault("deps", []).append("toy.py")
    (project / "dvc.yaml").write_text(yaml.safe_dump(stages))
    dvc(project, "repro")
    assert told_by_dvc(project) == changed(project) == set()
    next((project / "export/rex").iterdir()).unlink()
    assert told_by_dvc(project) == changed(project) == {"export@rex"}
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["evaluate"]["seeds"] = [5, 6]
    values["classes"]["dog"]["class_noun"] = "hound"
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert told_by_dvc(project) == changed(project) >= {"evaluate@rex", "prior@dog"}
    with (project / "toy.py").open("a") as file:
        file.write("# another line\n")
    assert told_by_dvc(project) == changed(project)
    assert {"prior@dog", "validate@biscuit", "report@rex"} <= changed(project)


@pytest.mark.fault(10)
def test_a_name_that_is_no_utf8_is_told_in_a_line_with_its_path(project: Path) -> None:
    """DVC can hash nothing beside it, so that it stops the subjects whose photos have good names as well."""
    for name in (b"rex/caf\xe9.png", b"biscuit/\xff"):
        (project / "data/subjects" / os.fsdecode(name)).write_bytes(b"a photo")
    with pytest.raises(PipelineError) as told:
        Graph.load(project)
    places = [f"{project}/data/subjects/{name}" for name in (r"biscuit/\udcff", r"rex/caf\udce9.png")]
    assert str(told.value) == " | ".join(
        f"{place}: the name is no UTF-8, which DVC cannot note; rename it" for place in places
    )
    checked = check(project, "rex")
    lines = str(checked.refusal).splitlines()
    assert lines[0] == f"{places[1]}: the name is no UTF-8, which DVC cannot note; rename it"
    assert "E_IMG_FORMAT" in lines[1]
    (found,) = [one for one in examine(project) if one.what == "names"]
    assert found.is_broken
    assert places[0] in found.found


@pytest.mark.slow
def test_a_stage_that_another_process_runs_is_stale_and_says_so(project: Path) -> None:
    dvc(project, "repro", "validate@rex", "prior@dog")
    (project / "slow-train-rex").touch()
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", "train@rex"]
    with subprocess.Popen(command, cwd=project, env=child_environment(project), stdout=subprocess.DEVNULL) as running:
        try:
            await_true((project / "started-train-rex").exists, 120)
            graph = Graph.load(project)
            assert graph["train@rex"].reasons == ("running in another process",)
            assert graph["validate@rex"].reasons == ()
        finally:
            kill_tree(running.pid)
    # Who died in the middle blocks nobody.
    assert Graph.load(project)["train@rex"].reasons == ("never ran",)


def changed(project: Path) -> set[str]:
    return {stage.name for stage in Graph.load(project).stages if stage.reasons}


def told_by_dvc(project: Path) -> set[str]:
    return set(json.loads(dvc(project, "status", "--json").stdout))

import json
from pathlib import Path

import pytest
from toy_project import dvc

from dreambooth.folders import scratch_folder
from dreambooth.params import Params, load_params
from flows.graph import Graph, Stage
from flows.lanes import Lanes
from flows.plan import (
    RATES,
    START,
    Measurement,
    make_plan,
    note,
    read_measurements,
    seconds_of,
    units_of,
)


@pytest.fixture
def params(project: Path) -> Params:
    return load_params(project / "params.yaml")


def test_time_is_a_start_and_a_rate_and_the_newest_measurements_count() -> None:
    assert seconds_of(10, [], default=2.0) == START + 20
    old, new = Measurement("train", "w", 100, START + 1000), Measurement("train", "w", 100, START + 100)
    assert seconds_of(200, [old, *[new] * 9], default=2.0) == pytest.approx(START + 200)


def test_a_stage_that_was_quicker_than_the_usual_start_is_planned_as_quick() -> None:
    assert seconds_of(1, [Measurement("report", "w", 1, 2.0)], default=5.0) == pytest.approx(2.2)


def test_units_follow_the_parameters(project: Path, params: Params) -> None:
    rows = 2 * params.train.train_batch_size
    assert units_of("train", "biscuit", params, project) == (params.train.max_train_steps or 0) * rows
    assert units_of("validate", "biscuit", params, project) == 3
    assert units_of("prior", "dog", params, project) == params.prior.num_class_images
    train = params.train.model_copy(update={"max_train_steps": None})
    assert units_of("train", "biscuit", params.model_copy(update={"train": train}), project) == 400 * rows


def test_a_plan_counts_what_is_stale_and_says_what_it_guesses(project: Path, params: Params) -> None:
    note(project, params, [("train@rex", 100.0), ("data/subjects/rex.dvc", 1.0)], Lanes())
    plan = make_plan(project, params, Graph.load(project), Lanes())
    by_entry = {line.entry: line for line in plan.lines}
    assert {entry: line.stages for entry, line in by_entry.items()} == {
        "prior": 1, "validate": 2, "train": 2, "evaluate": 2, "report": 2, "export": 2,
    }  # fmt: skip
    assert by_entry["train"].measured
    assert by_entry["train"].seconds == pytest.approx(200.0)
    assert not by_entry["prior"].measured
    words = plan.in_words(price=3600.0)
    assert any("by defaults" in line and "prior" in line and "train" not in line for line in words)
    assert f"cost: {plan.seconds:.2f} at 3600 an hour each" in words
    half = make_plan(project, params, Graph.load(project), Lanes(2))
    assert half.seconds == pytest.approx(plan.seconds / 2)


def test_what_was_measured_with_all_cores_says_nothing_of_a_share_of_them(project: Path, params: Params) -> None:
    note(project, params, [("train@rex", 100.0), ("report@rex", 5.0)], Lanes())
    shared = {
        line.entry: line for line in make_plan(project, params, Graph.load(project), Lanes(2, {"train": 1})).lines
    }
    assert not shared["train"].measured
    assert shared["report"].measured


def test_a_prior_without_effect_is_said_and_its_rows_are_not_counted(project: Path, params: Params) -> None:
    word = params.model_copy(update={"train": params.train.model_copy(update={"method": "textual_inversion"})})
    assert 2 * units_of("train", "biscuit", word, project) == units_of("train", "biscuit", params, project)
    said = [make_plan(project, one, Graph.load(project), Lanes()).in_words(None) for one in (params, word)]
    remark = "train.method textual_inversion reads no class rows: prior.kind images has no effect on it"
    assert [sum(line.startswith(remark) for line in lines) for lines in said] == [0, 1]


def test_after_a_run_nothing_is_planned_and_sizes_are_known(project: Path, params: Params) -> None:
    dvc(project, "repro")
    graph = Graph.load(project)
    assert make_plan(project, params, graph, Lanes()).in_words(None) == [
        f"Nothing would run: all {len(graph.stages)} stages are up to date."
    ]
    size = graph["export@rex"].size
    assert size == sum(path.stat().st_size for path in (project / "export/rex").iterdir())
    stale = Graph((*graph.stages, Stage("export@tom", stale=True, reasons=("never ran",))))
    (line,) = make_plan(project, params, stale, Lanes()).lines
    assert line.size == pytest.approx(size, abs=2)  # like those of the others; names differ in length


def test_a_torn_line_of_rates_is_passed_over(project: Path, params: Params) -> None:
    note(project, params, [("export@rex", 5.0)], Lanes())
    with (scratch_folder(project) / RATES).open("a") as file:
        file.write('{"entry": "tr')
    (only,) = read_measurements(project)
    assert (only.entry, only.seconds) == ("export", 5.0)
    assert json.loads((scratch_folder(project) / RATES).read_text().splitlines()[0])["units"] == 1

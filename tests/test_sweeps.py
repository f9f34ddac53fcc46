"""The grid of a sweep, the names of its experiments, and what is made of their results."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_project import tiny_values

from dreambooth import sweeps
from dreambooth.errors import ParamsError
from dreambooth.sweeps import Result, Tried
from dreambooth.yaml12 import load_yaml
from flows.sweep import Sweep, _table_name
from flows.tables import sweep_table


def result(
    experiment: str, gain: float, prompt: float | None, seconds: float | None = None, rate: float = 5e-5, seed: int = 1
) -> Result:
    measures = {"identity_gain": gain, "identity_low": gain - 0.01, "identity_high": gain + 0.01, "copies": 0.0}
    if prompt is not None:
        measures |= {"prompt_gain": prompt, "prompt_low": prompt - 0.02, "prompt_high": prompt + 0.02}
    return Result(experiment, "biscuit", {"train.learning_rate": rate, "train.seed": seed}, measures, seconds)


def of_seeds(**gains: tuple[float, ...]) -> list[Result]:
    """Return trainings of recipes by name, each with the seeds 0, 1, ... and these gains; the rate is the place."""
    return [
        result(f"{name}-{seed}", gain, 0.0, rate=rate, seed=seed)
        for rate, (name, of_recipe) in enumerate(gains.items())
        for seed, gain in enumerate(of_recipe)
    ]


def test_a_grid_holds_every_combination_and_the_last_parameter_changes_fastest() -> None:
    grid = sweeps.read_grid(["train.learning_rate=5e-5,1e-4", "train.mixed_precision=no,bf16"], tiny_values())
    assert [tuple(values.values()) for values in grid] == [(5e-5, "no"), (5e-5, "bf16"), (1e-4, "no"), (1e-4, "bf16")]


def test_values_may_be_lists_and_null() -> None:
    grid = sweeps.read_grid(["evaluate.seeds=[1,2],[3]", "train.snr_gamma=null,5.0"], tiny_values())
    assert [values["evaluate.seeds"] for values in grid] == [[1, 2], [1, 2], [3], [3]]
    assert [values["train.snr_gamma"] for values in grid[:2]] == [None, 5.0]


def test_every_fault_of_a_grid_is_named_at_once() -> None:
    settings = ["train.learning_rate=1e-4,fast", "train.learning_rat=1", "nothing.here=1", "train.seed=1,1"]
    with pytest.raises(ParamsError) as refused:
        sweeps.read_grid([*settings, "train.rank=", "train.lr_scheduler=[", "train.seed=2"], tiny_values())
    said = "\n".join(refused.value.problems)
    for fault in (
        "train.learning_rate: should be a valid number (got 'fast')",
        "train.learning_rat: there is no such parameter in params.yaml; did you mean train.learning_rate?",
        "nothing.here: there is no such parameter in params.yaml",
        "train.seed: 1 stands there twice",
        "train.seed: stands there twice",
        "train.rank: has no value",
        "-S train.lr_scheduler=[: cannot be read",
    ):
        assert fault in said


def test_values_that_contradict_each_other_are_refused_before_any_work() -> None:
    with pytest.raises(ParamsError, match="lr_warmup_steps: 4 leave none of the 4 steps"):
        sweeps.read_grid(["train.max_train_steps=4,8", "train.lr_warmup_steps=0,4"], tiny_values())


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(ParamsError, match="-S: nothing is to be changed"):
        sweeps.read_grid([], tiny_values())


WORDS = ["no", 'it\'s a \\ "dog", {}', "ends with \\", "\\'", "null", ["a photo of {}", "b, c"]]


@pytest.mark.parametrize("value", [5e-5, 3, True, None, [1, 2], *WORDS])
def test_dvc_reads_an_override_as_the_value_that_it_was(value: Any, tmp_path: Path) -> None:
    from dvc.utils.hydra import apply_overrides

    file = tmp_path / "params.yaml"
    file.write_text("train: {seed: 0}\n")
    apply_overrides(str(file), [sweeps.override_of("train.seed", value)])
    assert load_yaml(file.read_text()) == {"train": {"seed": value}}


def test_the_name_of_an_experiment_changes_with_all_that_it_is_made_from() -> None:
    names = {
        sweeps.name_of(subjects, values, tree)
        for subjects in (["biscuit"], ["biscuit", "rex"])
        for values in ({"train.seed": 1}, {"train.seed": 2}, {"train.rank": 1})
        for tree in ("a", "b")
    }
    assert len(names) == 12
    assert sweeps.name_of(["biscuit"], {"train.seed": 1}, "a") in names


def test_parameters_are_named_by_their_last_part_and_in_full_where_that_means_two() -> None:
    paths = ["prior.guidance_scale", "evaluate.guidance_scale", "train.seed"]
    assert sweeps.labels(paths) == ["prior.guidance_scale", "evaluate.guidance_scale", "seed"]
    assert sweeps.labels(["train.seed"], ["prior.seed", "train.seed"]) == ["train.seed"]
    words = sweeps.in_words({"prior.guidance_scale": 1.0, "evaluate.guidance_scale": 4.0})
    assert words == "prior.guidance_scale 1.0, evaluate.guidance_scale 4.0"


def test_the_columns_of_two_parameters_with_one_last_part_are_told_apart() -> None:
    values = {"prior.guidance_scale": 1.0, "evaluate.guidance_scale": 4.0}
    table = sweep_table([Result("sweep-1", "biscuit", values, {})])
    assert [column.header for column in table.columns][2:4] == list(values)


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (["train.learning_rate"], "biscuit-learning_rate"),
        (["evaluate.guidance_scale"], "biscuit-evaluate.guidance_scale"),  # prior has one too
        (["prior.guidance_scale", "train.rank"], "biscuit-prior.guidance_scale-rank"),
    ],
)
def test_sweeps_of_different_parameters_leave_different_tables(paths: list[str], name: str) -> None:
    assert _table_name(None, ["biscuit"], dict.fromkeys(paths), tiny_values()) == name


def test_sweeps_of_many_parameters_leave_different_tables_too() -> None:
    common = ["train.learning_rate", "train.max_train_steps", "train.gradient_accumulation_steps"]
    grids = [[*common, "train.rank"], [*common, "train.seed"]]
    names = {_table_name(None, ["biscuit"], dict.fromkeys(paths), tiny_values()) for paths in grids}
    assert len(names) == 2
    assert {len(name) for name in names} == {60}


def test_the_table_remembers_subjects_parameters_and_failures_of_an_experiment(tmp_path: Path) -> None:
    file = tmp_path / "sweep.csv"
    failed = Result("sweep-2", "rex", {"train.learning_rate": 1.0, "train.seed": 1}, {}, error="E_TRAIN: no")
    file.write_text(sweeps.csv_text([result("sweep-1", 0.01, 0.02), failed]))
    names = ("train.learning_rate", "train.seed")
    assert sweeps.read_tried(file, "sweep-1") == Tried(("biscuit",), names, "")
    assert sweeps.read_tried(file, "sweep-2") == Tried(("rex",), names, "E_TRAIN: no")
    assert sweeps.read_tried(file, "sweep-3") is None


@pytest.mark.parametrize(
    ("results", "best"),
    [
        ([("low", 0.01, 0.0), ("high", 0.05, -0.02), ("lost", 0.09, -0.2)], "high"),
        ([("low", 0.01, None), ("high", 0.05, -0.2)], "high"),
        ([("first", 0.05, 0.0), ("second", 0.05, 0.0)], "first"),
    ],
)
def test_the_best_has_the_most_identity_near_the_best_prompt(
    results: list[tuple[str, float, float | None]], best: str
) -> None:
    trained = [result(*one, rate=number) for number, one in enumerate(results)]
    assert sweeps.ranked(sweeps.recipes_of(trained), 0.03)[0].first.experiment == best


def test_a_sweep_ends_with_the_command_that_takes_the_best_over() -> None:
    trained = (result("sweep-1", 0.01, 0.0, rate=1), result("sweep-2", 0.05, 0.0, rate=2))
    without_seed = [dataclasses.replace(one, values={"train.rank": number}) for number, one in enumerate(trained)]
    (line,) = Sweep(tuple(without_seed), ()).in_words(0.03)
    assert line.endswith("to take it over: dreambooth sweep --apply sweep-2, then dreambooth run biscuit")
    assert "its scores chose it out of 2, so set other evaluate.seeds to judge it; to take" in line
    (alone,) = Sweep(tuple(without_seed[1:]), ()).in_words(0.03)
    assert "evaluate.seeds" not in alone


def test_a_recipe_is_the_mean_of_its_seeds_and_no_lucky_seed_is_recommended() -> None:
    trained = of_seeds(lucky=(0.01, 0.00, 0.09), steady=(0.05, 0.04, 0.06))
    first, second = sweeps.ranked(sweeps.recipes_of(trained), 0.03)
    assert [one.experiment for one in first.runs.values()] == ["steady-0", "steady-1", "steady-2"]
    assert second.identity == pytest.approx(0.1 / 3)
    lines = list(Sweep(tuple(trained), ()).in_words(0.03))
    assert lines[1] == "biscuit: learning_rate 1: identity gain +0.050 [+0.025, +0.075], prompt +0.000; seeds 0, 1, 2"
    assert "learning_rate 1 (not told apart from learning_rate 0 by 3 seeds); its scores chose it out of 2" in lines[2]
    assert "with the first seed, 0: dreambooth sweep --apply steady-0," in lines[2]  # seed 2 drew more identity


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({"a": (0.01, 0.02, 0.03), "b": (0.05, 0.061, 0.07)}, "told apart from the rest by 3 seeds"),
        ({"a": (0.01, 0.02, 0.03), "b": (0.05, 0.01, 0.04)}, "not told apart from learning_rate 0 by 3 seeds"),
        ({"a": (0.01, 0.02), "b": (0.05, 0.06)}, "not told apart from learning_rate 0: 2 seeds, and 3 are needed"),
        ({"a": (0.04,), "b": (0.05,)}, "not told apart from learning_rate 0: 1 seed, and 3 are needed, -S train.seed="),
        ({"a": (0.01,), "b": (0.05,)}, "told apart from the rest as a model, not as a recipe: 1 seed, and 3 are"),
        ({"a": (0.05,), "b": (0.05,), "c": (0.05,)}, "not told apart from learning_rate 1 | learning_rate 2: 1 seed"),
        ({"a": (0.05, 0.06, 0.07)}, ""),
    ],
)
def test_a_recipe_is_told_apart_by_three_seeds_and_a_sweep_says_how(
    gains: dict[str, tuple[float, ...]], said: str
) -> None:
    found = sweeps.certainty(sweeps.ranked(sweeps.recipes_of(of_seeds(**gains)), 0.03))
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_a_recipe_whose_seeds_failed_takes_no_part() -> None:
    trained = of_seeds(a=(0.09,), b=(0.05, 0.06))
    failed = Result("a-1", "biscuit", {"train.learning_rate": 0, "train.seed": 1}, {}, error="E_TRAIN: no")
    (only,) = sweeps.ranked(sweeps.recipes_of([*trained, failed]), 0.03)
    assert only.first.experiment == "b-0"


def test_of_seeds_alone_none_is_the_best() -> None:
    trained = [dataclasses.replace(one, values={"train.seed": seed}) for seed, one in enumerate(of_seeds(a=(0.1, 0.2)))]
    (line,) = Sweep(tuple(trained), ()).in_words(0.03)
    assert line.startswith("biscuit: params.yaml as it is: identity gain +0.150 [")
    assert line.endswith("; seeds 0, 1")


def test_of_failures_alone_none_is_the_best() -> None:
    failed = Result("sweep-1", "biscuit", {"train.seed": 1}, {}, error="E_TRAIN: no")
    assert sweeps.ranked(sweeps.recipes_of([failed]), 0.03) == []
    assert list(Sweep((failed,), ()).in_words(0.03)) == []


def test_the_table_gives_back_how_long_trainings_took(tmp_path: Path) -> None:
    file = tmp_path / "sweep.csv"
    file.write_text(sweeps.csv_text([result("sweep-1", 0.01, 0.02, 12.34), result("sweep-2", 0.01, None)]))
    assert sweeps.read_seconds(file) == {("sweep-1", "biscuit"): 12.3}
    assert file.read_text().splitlines()[2].startswith("sweep-2,biscuit,5e-05,1,0.01,0.0,0.02,,,,,0.0,,")


def test_the_picture_shows_what_was_measured_and_nothing_without_a_prompt_fidelity() -> None:
    assert sweeps.picture_of([result("sweep-1", 0.01, None)]) is None
    one, two = (sweeps.picture_of([result(str(x), x, x) for x in at]) for at in ([0.01], [0.01, 0.05]))
    assert one is not None
    assert two is not None
    assert one != two
    assert Image.open(io.BytesIO(two)).size == (605, 440)

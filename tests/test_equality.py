"""Equality with the reference, and growth: the arithmetic by hand, and both programs at toy size."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bench import SCRIPT
from tiny_project import add_photos

from benchmarks import equality, growth
from benchmarks.equality import Difference, compare_losses, read_reference, report
from benchmarks.recipe import Recipe
from benchmarks.usage import Usage

# The stand-in of test_bench, which also tells TensorBoard its losses and leaves the base as what it trained.
TELLING = SCRIPT.replace(
    "given = parser.parse_args()",
    'parser.add_argument("--report_to", required=True)\n'
    'parser.add_argument("--logging_dir", required=True)\n'
    "given = parser.parse_args()",
).replace(
    "pathlib.Path(given.output_dir).mkdir()",
    "import shutil\n"
    "assert len(list(pathlib.Path(given.class_data_dir).glob('*.png'))) == given.num_class_images\n"  # handed to it
    "from torch.utils.tensorboard import SummaryWriter\n"
    "shutil.copytree(given.pretrained_model_name_or_path, given.output_dir)\n"
    'with SummaryWriter(pathlib.Path(given.output_dir) / given.logging_dir / "dreambooth") as told:\n'
    '    for step in range(given.max_train_steps): told.add_scalar("loss", 101 + step, step + 1)',
)


def test_only_the_last_half_of_a_curve_counts() -> None:
    found = compare_losses([np.array([9.0, 9.0, 1.0, 3.0])], [np.array([0.0, 0.0, 2.0, 4.0])])
    assert (found.ours, found.reference) == (2, 3)


def test_curves_of_one_distribution_are_equal_and_shifted_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    curves = [1 + 0.1 * rng.standard_normal(400) for _ in range(6)]
    assert compare_losses(curves[:3], curves[3:]).equal
    assert not compare_losses([curve + 0.05 for curve in curves[:3]], curves[3:]).equal


def test_the_half_width_is_that_of_welch_by_hand() -> None:
    one, other = np.array([0, 0, 1.0, 3.0]), np.array([0, 0, 2.0, 4.0])
    # Two values of variance 2 a side: standard error sqrt(2/2 + 2/2), two degrees of freedom, t = 4.3027.
    assert compare_losses([one], [other]).half_width == pytest.approx(4.302653 * 2**0.5)


def test_the_page_of_three_seeds_has_the_t_interval_over_them(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path, tmp_path, "dog", 32, 4, 2, 1, 2, 1e-5, "no", 2)
    gaps = (-0.016, -0.007, 0.023)
    seeds = [{"base": 0.5, "ours": 0.5 + gap, "reference": 0.5, "low": -0.1, "high": 0.1} for gap in gaps]
    page = report(recipe, [0, 1, 2], Difference(0.65, 0.63, 0.03), seeds)
    # Deviation .0204 over the root of 3 is .0118; t of 2 degrees of freedom is 4.3027.
    assert re.search(r"mean of the seeds: [+-]0\.000 \[-0\.051, \+0\.051\] \(95 % over seeds\): not told apart\.", page)
    assert "mean of the seeds: +0.023.**" in report(recipe, [2], Difference(0.65, 0.63, 0.03), seeds[2:])


def test_losses_of_the_script_are_read_in_the_order_of_steps(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "logs/dreambooth") as told:
        for step, value in ((1, 0.5), (2, 0.25)):
            told.add_scalar("loss", value, step)
            told.add_scalar("lr", 1.0, step)
    assert read_reference(tmp_path).tolist() == [0.5, 0.25]


@pytest.mark.slow
@pytest.mark.nightly
def test_both_sides_are_trained_and_scored_at_toy_size(tmp_path: Path, tiny_model_folder: Path) -> None:
    (tmp_path / "train_dreambooth.py").write_text(TELLING)
    add_photos(tmp_path / "photos", 3)
    arguments = {
        "reference": tmp_path, "base": tiny_model_folder, "photos": tmp_path / "photos", "resolution": 32, "steps": 4,
        "class-images": 2, "train-batch-size": 1, "sample-batch-size": 2, "sampler-steps": 2, "seeds": 0,
        "scratch": tmp_path / "scratch", "out": tmp_path / "results",
    }  # fmt: skip
    text = equality.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))]).read_text()
    assert "reference 103.5000" in text  # of 101, 102, 103, 104 the last half
    assert "DIFFERENT" in text  # ours is a loss near 2
    (row,) = [line for line in text.splitlines() if line.startswith("| 0 |")]
    _, _, base, _, reference, *_ = row.split("|")
    assert base == reference  # the stand-in left the base as it was: same prompts and noise, same pictures
    assert not list((tmp_path / "scratch").iterdir())


def test_each_one_more_is_told_from_the_row_before() -> None:
    rows = [
        growth.Row(10, "train", Usage(3, 2.0, 100), floor=1.5),
        growth.Row(100, "train", Usage(4, 6.5, 110), floor=1.6),
        growth.Row(10, "plan", Usage(1, 1.0, 50), floor=0.5),
    ]
    lines = growth.markdown("steps", rows).splitlines()
    assert lines[4] == "| train | 10 | 3.0 | 1.50 | 2.0 | 2.0 | 100 | - |"
    assert lines[5] == "| train | 100 | 4.0 | 1.60 | 2.5 | 6.5 | 110 | 50 |"
    assert lines[6] == "| plan | 10 | 1.0 | 0.50 | 2.0 | 1.0 | 50 | - |"


@pytest.mark.parametrize("table", [growth.steps, growth.class_images, growth.versions])
def test_growth_up_to_1000_measures_a_thousand_of_each(
    table: Callable[[Any, int], Iterator[growth.Row]], tmp_path: Path
) -> None:
    class NothingRuns(growth.Place):
        write = 1e9  # bytes a second

        def imports(self, program: str) -> float:
            return 1.0

        def computing(self, steps: int = 0, images: int = 0) -> float:
            return 1.0 + steps + images

        def python(self, root: Path, *arguments: str) -> Usage:
            return Usage(1.0, 1.0, 1.0)

    rows = list(table(NothingRuns(tmp_path), 1000))
    assert max(row.count for row in rows) == 1000
    assert all(row.floor > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "table",
    [
        "subjects",  # the cheapest
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in ("photos", "steps", "class-images", "versions", "together")
        ),
    ],
)
def test_every_table_of_growth_runs_at_its_smallest(table: str, tmp_path: Path) -> None:
    largest = {"photos": 3, "steps": 10, "class-images": 16}.get(table, 1)
    text = growth.main([table, "--largest", str(largest), "--out", str(tmp_path)]).read_text()
    assert f"## {table}" in text
    assert f"| {largest} |" in text

"""The table of faults and threats says what the tests say."""

from pathlib import Path

import faults
import pytest
from faults import FAULTS, MISSING, TABLE, THREATS, collect, render


def test_the_committed_table_is_the_one_that_the_marks_give() -> None:
    assert render(collect()) == TABLE.read_text(encoding="utf-8"), "make faults"


def test_marks_of_tests_and_of_their_cases_count_and_one_without_test_or_row_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "TESTS", tmp_path)
    cases = "@pytest.mark.parametrize('x', [1, pytest.param(2, marks=pytest.mark.threat(3))])\n"
    (tmp_path / "test_it.py").write_text(f"@pytest.mark.fault(1, 2)\n{cases}def test_one(x): ...\n")
    place = f"{tmp_path.name}/test_it.py"
    test = f"{place}::test_one"
    assert collect() == {("fault", 1): [test], ("fault", 2): [test], ("threat", 3): [test]}
    wrong = "pytestmark = pytest.mark.fault(1)\n@pytest.mark.fault(99)\ndef test_one(): ...\n"
    (tmp_path / "test_it.py").write_text(wrong)
    with pytest.raises(SystemExit, match=f"^{test}: there is no fault 99\n{place}:1: a mark of no test$"):
        collect()


def test_a_row_without_a_test_is_printed_as_missing() -> None:
    everything = {("fault", number): ["tests/a.py::b"] for number in FAULTS}
    everything |= {("threat", number): ["tests/a.py::b"] for number in THREATS}
    assert MISSING not in render(everything)
    del everything["fault", 3]
    assert "1 of 69 rows have no test: fault 3." in render(everything)
    assert render(everything).count(MISSING) == 1

"""Tables at 80 columns: nothing is cut, nothing broken into strips, and no line ends in blanks."""

import pytest
from rich.console import Console
from rich.table import Table

from dreambooth.aliases import Entry
from dreambooth.health import Finding
from dreambooth.versions import Row
from flows import console
from flows.registry_tables import findings_table, log_table, versions_table

REASON = "identity +0.031 [+0.012, +0.050] over the champion at the same prompts and seeds, and no other score fell"
SCORES = {"identity.personalised": 0.61234, "identity.gain": 0.1, "prompt.personalised": 0.31}


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "out", Console(width=80))


def printed(table: Table, capsys: pytest.CaptureFixture[str]) -> list[str]:
    console.print_whole(table)
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    return lines


def test_the_log_shows_each_reason_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [
        Entry(1, "register", "challenger", None, 1, "", "", 0.0),
        Entry(2, "promote", "champion", None, 1, "promote", REASON, 0.0),
    ]
    _, first, second = printed(log_table(entries), capsys)
    assert len(first) < 80
    assert second.endswith(REASON)


def test_versions_show_the_whole_names_of_scores_and_every_fault(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(12, ("challenger", "champion"), 0.0, "promote", "", SCORES, 123_456_789, ("unet.safetensors is missing",))
    _, line = printed(versions_table([row]), capsys)
    for whole in (
        "identity.personalised 0.612",
        "identity.gain 0.100",
        "prompt.personalised 0.310",
        "challenger, champ",
    ):
        assert whole in line
    assert line.endswith("unet.safetensors is missing")


def test_a_remedy_stands_under_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    remedy = "restore the newest file of .scratch/backups, then run dreambooth doctor --verify; see docs/operations.md"
    findings = [Finding("broken", "database", f"mlflow.db: {REASON}", remedy), Finding("good", "DVC", "whole")]
    _, found, mended, good = printed(findings_table(findings), capsys)
    assert found.split() == ["broken", "database", "mlflow.db:", *REASON.split()]
    assert mended.strip() == f"-> {remedy}"
    assert good.split() == ["good", "DVC", "whole"]


def test_a_table_without_borders_wider_than_any_terminal_is_broken_at_words(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("reason", box=None, pad_edge=False)
    table.add_row("word " * 100)
    lines = printed(table, capsys)
    assert len(lines) > 2
    assert max(map(len, lines)) <= console.WIDEST

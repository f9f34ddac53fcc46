"""Clocks that jump, summer time, hosts whose clocks differ."""

import asyncio
import itertools
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect.server.schemas.schedules import CronSchedule
from toy_project import REPOSITORY, dvc

from flows.dvcrun import DvcRunner
from flows.graph import Graph

BERLIN = ZoneInfo("Europe/Berlin")
NIGHTS = [datetime(2026, 3, 26, 12, tzinfo=UTC), datetime(2026, 10, 22, 12, tzinfo=UTC)]


def shipped_schedule() -> CronSchedule:
    """The schedule of prefect.yaml as the server keeps it."""
    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    (schedule,) = next(one["schedules"] for one in deployments if one["name"] == "nightly")
    return CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])


@pytest.mark.fault(36)
@pytest.mark.parametrize(("start", "hours"), [*zip(NIGHTS, (23, 25), strict=True)], ids=["to-summer", "to-winter"])
def test_the_schedule_is_at_three_o_clock_of_its_zone_every_night_also_when_the_clocks_change(
    start: datetime, hours: int
) -> None:
    dates = asyncio.run(shipped_schedule().get_dates(7, start=start))
    local = [date.astimezone(BERLIN) for date in dates]
    assert [(one.hour, one.minute) for one in local] == [(3, 0)] * 7
    assert [(b.date() - a.date()).days for a, b in itertools.pairwise(local)] == [1] * 6
    apart = sorted((b.timestamp() - a.timestamp()) / 3600 for a, b in itertools.pairwise(dates))
    assert apart == sorted([24, 24, 24, 24, 24, hours])


@pytest.mark.slow
@pytest.mark.fault(36)
@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
def test_a_stage_takes_its_time_also_while_the_clock_jumps_by_hours(
    project: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    dvc(project, "repro", "prior@dog", "validate@rex")
    real, began = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() + jump * (time.monotonic() - began > 0.2))
    done = DvcRunner(project).run("train@rex", lambda line: None)
    assert done.outcome == "ran"
    assert 0 < done.seconds < 3600


@pytest.mark.fault(36)
def test_photos_and_outputs_of_another_host_s_clock_are_judged_by_content(project: Path) -> None:
    dvc(project, "repro")
    tomorrow = time.time() + 86400
    files = sorted(one for one in project.rglob("*") if one.is_file() and ".dvc" not in one.parts)
    for number, path in enumerate(files):
        os.utime(path, (tomorrow, tomorrow) if number % 2 else (0, 0))
    assert not Graph.load(project).stale

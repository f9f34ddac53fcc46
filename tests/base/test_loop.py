"""The parts that both trainings share."""

from pathlib import Path

import pytest
import torch
from torch import nn

from base import loop


def test_rate_warms_up_and_falls_to_its_end() -> None:
    assert loop.rate_at(0.0, 0, 1e-3, 1e-5, 10) == pytest.approx(1e-4)
    assert loop.rate_at(0.5, 99, 1e-3, 1e-5, 10) == pytest.approx((1e-3 + 1e-5) / 2)
    assert loop.rate_at(1.0, 99, 1e-3, 1e-5, 10) == pytest.approx(1e-5)


def test_progress_is_by_work_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    progress = loop.Progress(100, minutes=1)
    progress.add(50)
    assert progress.share == 0.5
    now[0] = 54.0
    progress.add(1)
    assert progress.share == pytest.approx(0.9)
    now[0] = 600.0
    progress.add(1)
    assert progress.share == 1.0


def test_average_follows_the_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(1.0)
    average = loop.Average({"m": module}, 0.5)
    with torch.no_grad():
        module.weight.fill_(2.0)
    average.update()
    assert average.weights["m"]["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)


def test_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "c.pt"
    assert loop.load(path) is None
    loop.save(path, {"a": torch.ones(2)})
    loop.save(path, {"a": torch.zeros(2)})
    state = loop.load(path)
    assert state is not None
    assert state["a"].sum() == 0
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]

"""How many stages compute at a time: by subjects, cores and memory."""

import logging
import shutil
from pathlib import Path

import psutil
import pytest
from test_cli import dreambooth

from dreambooth import drivers
from dreambooth.errors import PipelineError
from dreambooth.params import Params, load_params
from flows import lanes, personalize
from flows.graph import Graph
from flows.lanes import Lanes, lanes_of, one_gpu

CHAIN = {"prior@dog": [], "train@biscuit": ["prior@dog"], "train@rex": ["prior@dog"], "export@rex": ["train@rex"]}


@pytest.fixture
def params(project: Path) -> Params:
    """Of a project with a small base model."""
    params = load_params(project / "params.yaml")
    place = project / params.base.pretrained_model_name_or_path / "unet"
    place.mkdir(parents=True)
    (place / "diffusion_pytorch_model.safetensors").touch()
    return params


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lanes.VARIABLE, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(lanes, "_cores", lambda: 8)


def graph(*stale: str) -> Graph:
    return Graph.of(CHAIN, {name: ["changed"] if name in stale else [] for name in CHAIN})


def test_two_stale_subjects_share_the_cores(project: Path, params: Params) -> None:
    assert lanes_of(project, params, graph("prior@dog")) == Lanes(2, {"train": 4})
    assert lanes_of(project, params, graph("train@rex")) == Lanes(1)
    assert lanes_of(project, params, graph("export@rex")) == Lanes()
    assert lanes_of(project, params, graph()) == Lanes()


def test_one_class_is_drawn_with_all_cores_and_two_share_them(project: Path, params: Params) -> None:
    chain = {"prior@dog": [], "prior@cup": [], "train@biscuit": ["prior@dog"], "train@mug": ["prior@cup"]}
    both = Graph.of(chain, {name: ["changed"] for name in chain})
    assert lanes_of(project, params, both) == Lanes(2, {"prior": 4, "train": 4})
    one = Graph.of(chain, {name: ["changed"] if name != "prior@cup" else [] for name in chain})
    assert lanes_of(project, params, one) == Lanes(2, {"train": 4})


def test_no_more_than_fit_into_the_memory(project: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    place = project / params.base.pretrained_model_name_or_path / "unet"
    with (place / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.truncate(psutil.virtual_memory().available // 15)  # times ten it fits once, not twice
    assert lanes_of(project, params, graph("prior@dog")) == Lanes()


def test_a_base_from_the_hub_is_trained_alone(project: Path, params: Params) -> None:
    shutil.rmtree(project / params.base.pretrained_model_name_or_path)
    assert lanes_of(project, params, graph("prior@dog")) == Lanes()


def test_a_gpu_is_for_one_at_a_time(
    project: Path, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivers, "DRIVERS", (str(tmp_path),))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert lanes_of(project, params, graph("prior@dog")) == Lanes()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden
    assert lanes_of(project, params, graph("prior@dog")) == Lanes(2, {"train": 4})


def test_the_user_has_the_last_word(project: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_cores", lambda: 1)
    monkeypatch.setenv(lanes.VARIABLE, "2")
    assert lanes_of(project, params, graph("prior@dog")) == Lanes(2, {"train": 1})
    monkeypatch.setenv(lanes.VARIABLE, "1")
    assert lanes_of(project, params, graph("prior@dog")) == Lanes()
    monkeypatch.setenv(lanes.VARIABLE, "all")
    with pytest.raises(PipelineError, match=r"^DREAMBOOTH_AT_ONCE: is 'all', should be a number from 1"):
        lanes_of(project, params, graph("prior@dog"))


def test_a_run_of_several_stages_on_one_gpu_says_what_gives_each_its_own(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(personalize, "get_run_logger", lambda: logging.getLogger("run"))
    stale = Graph.load(project)
    for has_gpu, count, said in ((True, 1, False), (False, 2, False), (True, 2, True)):
        monkeypatch.setattr(personalize, "has_gpu", lambda has_gpu=has_gpu: has_gpu)
        personalize._announce(project, params, stale, Lanes(count))
        assert (one_gpu(count) in caplog.text) is said


def test_a_plan_for_several_gpus_says_that_they_are_as_many_workers(project: Path) -> None:
    done = dreambooth(project, "plan", "--gpus", "2", "--price", "3")
    assert " at 3 an hour each\n" in done.stdout
    assert " with 2 at a time, " in done.stdout
    assert one_gpu(2) in done.stdout
    assert "each with a CUDA_VISIBLE_DEVICES of its own" in one_gpu(2)
    assert "CUDA_VISIBLE_DEVICES" not in (alone := dreambooth(project, "plan", "--price", "3").stdout)
    assert " at 3 an hour\n" in alone

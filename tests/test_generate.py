"""Pictures of registered versions by the command: in the words of the version, and every mistake a line."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from registered import BISCUIT, command, load, write_export, write_project

from dreambooth.errors import ParamsError, PipelineError
from dreambooth.params import load_params
from dreambooth.registry import register
from dreambooth.versions import generation_of, predict
from flows import batch, cli
from flows.generate import draw_registered

PROMPTS = ["a photo of {} in space", "a photo of sks, in space", "a photo of zwx"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, empty_database: Path) -> Path:
    """A project with two versions of biscuit, a sks dog, that is called a zwx cat in params.yaml by now."""
    root = tmp_path_factory.mktemp("generate") / "project"
    write_project(root, empty_database, identifier="zwx")
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("class_noun: dog", "class_noun: cat"))
    for model in ("1", "2"):
        shutil.rmtree(root / "export", ignore_errors=True)
        write_export(root, tiny_model_folder, 64 * model)
        register(root, BISCUIT)
    assert load_params(root / "params.yaml").class_of(BISCUIT).class_noun == "cat"
    return root


@pytest.fixture
def fresh(tmp_path: Path, empty_database: Path) -> Path:
    """A project whose subject never ran."""
    root = tmp_path / "project"
    write_project(root, empty_database)
    return root


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run the command in this process, which has imported everything."""

    def run(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        monkeypatch.chdir(root)
        monkeypatch.setattr(sys, "argv", ["dreambooth", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return subprocess.CompletedProcess(arguments, int(done.value.code or 0), *capsys.readouterr())

    return run


def test_a_version_is_asked_in_its_own_words_and_keeps_its_pictures(root: Path) -> None:
    said: list[str] = []
    warned: list[str] = []
    pictures = {
        version: draw_registered(root, BISCUIT, PROMPTS, 1, {"seed": 7}, said.append, warned.append, version).pictures
        for version in (1, 2)
    }
    assert [path.name for path in pictures[1]] == [
        "a-photo-of-sks-dog-in-space-v1-7.png", "a-photo-of-sks-in-space-f609fe-v1-7.png", "a-photo-of-zwx-v1-7.png",
    ]  # fmt: skip
    assert all(path.is_file() for version in pictures for path in pictures[version])
    assert not {*pictures[1]} & {*pictures[2]}
    assert said == ["loading biscuit v1", "loading biscuit v2"]
    assert warned == 2 * ["'a photo of zwx' does not name biscuit; write {} where it should stand"]


@pytest.mark.parametrize(("prompts", "count", "lines"), [([], 4, 1), (PROMPTS, 0, 1), (PROMPTS, 1001, 1), ([], 0, 2)])
def test_what_nothing_can_be_drawn_of_is_refused_before_a_model_is_loaded_or_a_gpu_waited_for(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[str], count: int, lines: int
) -> None:
    said: list[str] = []
    with pytest.raises(PipelineError) as told:
        draw_registered(fresh, BISCUIT, prompts, count, {}, said.append, said.append)
    assert len(str(told.value).splitlines()) == lines
    assert said == []
    monkeypatch.setattr(batch, "gpu_of_server", lambda *_: pytest.fail("waits for a GPU"))
    monkeypatch.setattr(batch, "get_run_logger", lambda: logging.getLogger("test"))
    state = batch.generate.fn(BISCUIT, prompts, count, root=str(fresh))
    assert state.message == f"E_PIPELINE: {told.value}"


def test_the_command_says_what_takes_long_and_counts_the_pictures(root: Path) -> None:
    done = command(root, "generate", BISCUIT, "a photo of {} at home", "-n", "2", "--steps", "1")
    assert done.returncode == 0, done.stderr
    name = "a-photo-of-sks-dog-at-home-v2-steps1"
    files = [f"{name}-0.png", f"{name}-1.png", f"sheet-{name}-0.png"]
    assert done.stdout.splitlines() == [f"build/biscuit/generated/{file}" for file in files]
    assert done.stderr.startswith("loading biscuit v2\n")
    assert "draw biscuit v2: 100%" in done.stderr
    assert "2/2" in done.stderr


def test_a_size_that_no_model_draws_is_one_line_with_a_code(root: Path) -> None:
    done = command(root, "generate", BISCUIT, "a photo of {}", "--size", "100")
    assert done.returncode == 2
    assert done.stderr == "E_PARAMS: --size: should be a multiple of 8 (got 100); for example 96 or 104\n"


def test_what_the_model_refuses_is_no_traceback(root: Path) -> None:
    model = load(root, BISCUIT)
    assert generation_of(model)["identifier"] == "sks"
    with pytest.raises(ParamsError, match=r"^num_inference_steps: should be 1 to 999 \(got 1000000000\)$"):
        predict(model, ["a photo of sks dog"], {"num_inference_steps": 10**9})


@pytest.mark.parametrize("arguments", [("generate", BISCUIT, "{}"), ("promote", BISCUIT), ("versions", BISCUIT)])
def test_a_subject_without_a_version_is_run_where_no_export_lies_and_registered_where_one_does(
    fresh: Path, arguments: tuple[str, ...], call: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    for exported, verb in ((False, "run"), (True, "register")):
        if exported:
            (fresh / "export" / BISCUIT).mkdir(parents=True)
        done = call(fresh, *arguments)
        assert done.returncode != 0
        assert done.stderr.rstrip().endswith(f"; dreambooth {verb} {BISCUIT}"), done.stderr


def test_a_version_that_is_not_there_leads_to_those_that_are(
    root: Path, call: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    for arguments in (("generate", BISCUIT, "{}"), ("promote", BISCUIT)):
        done = call(root, *arguments, "--version", "9")
        assert done.returncode == 8
        assert done.stderr.startswith("E_REGISTRY: biscuit has no version 9 ")
        assert done.stderr.rstrip().endswith("; dreambooth versions biscuit")


@pytest.mark.parametrize(
    "arguments", [("generate", "nosuch", "{}"), *((one, "nosuch") for one in ("promote", "rollback", "versions"))]
)
def test_of_nobody_there_is_no_version(
    fresh: Path, arguments: tuple[str, ...], call: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    done = call(fresh, *arguments)
    assert done.returncode == 3
    assert done.stderr.startswith("E_SUBJECT: ")
    assert "'nosuch'" in done.stderr

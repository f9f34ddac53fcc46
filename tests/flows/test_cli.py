import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from toy_project import REPOSITORY, dvc, make_photos, quiet, ran

from dreambooth.errors import PipelineError
from flows.generate import draw, full_prompts, read_prompts, slugs

HEAVY = ("torch", "prefect", "dvc", "mlflow", "diffusers", "transformers", "PIL", "pandas")


def dreambooth(root: Path, *arguments: str, before: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the command as a program, and end with the heavy modules it imported as the last line of stdout."""
    program = (
        "import sys, atexit, json\n"
        f"atexit.register(lambda: print(json.dumps([m for m in {HEAVY} if m in sys.modules])))\n"
        f"{before}\n"
        "from flows.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    path = os.pathsep.join((str(Path(__file__).parent), str(REPOSITORY)))  # of this checkout, wherever it is installed
    environment = {**quiet(root.parent / "prefect"), "COLUMNS": "160", "PYTHONPATH": path}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    done = dreambooth(tmp_path, "--help")
    assert "personalise" in done.stdout.lower()
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_outside_of_a_project_the_next_step_is_named(tmp_path: Path) -> None:
    done = dreambooth(tmp_path, "status")
    assert done.returncode == 9
    assert done.stderr.startswith("E_PIPELINE: no dvc.yaml and params.yaml in ")
    assert "DREAMBOOTH_HOME" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_project_is_found_from_below_and_by_name(project: Path, tmp_path: Path) -> None:
    assert dreambooth(project / "data", "check", "rex").returncode == 0
    assert dreambooth(tmp_path, "--root", str(project), "check", "rex").returncode == 0
    assert dreambooth(tmp_path, "--root", str(tmp_path), "check", "rex").returncode == 9


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in dreambooth(tmp_path, "status", "--debug").stderr


@pytest.mark.fault(13)
def test_every_fault_of_params_is_a_line_with_a_code(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("resolution: 64", "resolution: 65").replace("seed:", "sed:"))
    done = dreambooth(project, "run")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) > 2
    assert all(line.startswith("E_PARAMS: params.yaml: ") for line in lines)


@pytest.mark.fault(9)
def test_check_says_what_is_wrong_with_each_photo(project: Path) -> None:
    (project / "data" / "subjects" / "rex" / "torn.jpg").write_bytes(b"")
    (project / "data" / "subjects" / "rex" / "notes.txt").touch()
    done = dreambooth(project, "check", "rex")
    assert done.returncode == 3
    assert "is empty (0 bytes)" in done.stdout
    assert "notes.txt" in done.stdout
    assert done.stderr.startswith("E_PHOTOS: ")
    assert "torch" not in json.loads(done.stdout.splitlines()[-1])


@pytest.mark.fault(9)
@pytest.mark.threat(4)
def test_check_takes_any_folder_and_draws_thumbnails_for_their_owner(project: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "camera", 3)
    done = dreambooth(project, "check", str(tmp_path / "camera"))
    assert done.returncode == 0, done.stderr
    assert "3 of 3 photos can be used. Next: dreambooth add ID" in " ".join(done.stdout.split())
    folder = project / ".scratch/check"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["00.png", "01.png", "02.png"]
    assert ".scratch/check/02.png" in done.stdout
    done = dreambooth(project, "check", "rex")
    assert "build/rex/check/00.png" in done.stdout
    assert (project / "build/rex/check/00.png").is_file()


def test_check_refuses_what_is_no_id(project: Path) -> None:
    done = dreambooth(project, "check", "../../etc")
    assert (done.returncode, done.stderr[:11]) == (3, "E_SUBJECT: ")


def test_add_ends_with_the_next_command(project: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "camera", 3)
    (tmp_path / "camera" / ".DS_Store").touch()
    done = dreambooth(project, "add", "tom", str(tmp_path / "camera"), "--class-noun", "cat")
    assert done.returncode == 0, done.stderr
    assert "Next: dreambooth run tom" in done.stdout
    assert "kind: object" in done.stdout
    assert ".DS_Store" in done.stdout
    assert (project / "data" / "subjects" / "tom.dvc").exists()
    assert dreambooth(project, "add", "tom", str(tmp_path / "camera"), "--class-noun", "cat").returncode == 3


def test_status_shows_what_is_out_of_date_without_torch_or_prefect(project: Path) -> None:
    done = dreambooth(project, "status")
    assert done.returncode == 0, done.stderr
    assert "prior, validate, train, evaluate, export, report" in done.stdout
    assert not {"torch", "prefect", "diffusers"} & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_run_trains_registers_and_then_is_up_to_date_in_seconds_without_torch_or_prefect(project: Path) -> None:
    fake = (
        "import flow_program; from dreambooth import registry, versions; registry.register = flow_program.register\n"
        "versions.find = flow_program.find"
    )
    done = dreambooth(project, "run", "rex", before=fake)
    assert done.returncode == 0, done.stderr
    assert "models:/rex@challenger (v1)" in done.stdout
    assert "0.300 (base) -> 0.600 (personalised)" in done.stdout
    assert "prior dog: 0 reused, 2 generated" in done.stdout
    assert "reports/rex/index.html" in done.stdout
    assert "promote: identity +0.300" in done.stdout
    assert len(ran(project)) == 6
    done = dreambooth(project, "run", "rex", before=fake)
    assert done.returncode == 0, done.stderr
    assert "Everything is up to date." in done.stdout
    assert not {"torch", "prefect", "diffusers"} & set(json.loads(done.stdout.splitlines()[-1]))
    assert ran(project) == []


@pytest.mark.slow
def test_run_exits_with_the_reason_of_a_subject_that_failed(project: Path) -> None:
    dvc(project, "repro", "prior@dog")
    (project / "fail-validate-rex").touch()
    done = dreambooth(project, "run", "rex")
    assert done.returncode == 9
    assert "E_PIPELINE: validate@rex: E_TRAIN: the loss is NaN" in done.stderr
    assert "not registered" in done.stdout


def test_a_server_that_does_not_answer_is_a_line_with_the_next_step(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    done = dreambooth(project, "run", "rex")
    assert done.returncode == 9
    assert done.stderr.splitlines()[-1].startswith("E_PIPELINE: Failed to reach API at http://127.0.0.1:9/api")
    assert "Traceback" not in done.stderr


class Painter:
    """Stands in for a registered version: a grey picture whose shade is the seed."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, object]]] = []

    def predict(self, rows: dict[str, list[str]], params: dict[str, int]) -> list[bytes]:
        import io

        self.calls.append((len(rows["prompt"]), dict(params)))
        pictures = []
        for number in range(len(rows["prompt"])):
            buffer = io.BytesIO()
            Image.new("L", (8, 8), (params["seed"] + number) % 256).save(buffer, "PNG")
            pictures.append(buffer.getvalue())
        return pictures


def test_generated_files_are_named_by_prompt_and_seed(tmp_path: Path) -> None:
    drawn = draw(Painter(), ["a photo of sks dog", "sks dog!"], 2, {"seed": 5}, tmp_path / "out")
    names = [path.name for path in drawn.pictures]
    assert names == ["a-photo-of-sks-dog-5.png", "a-photo-of-sks-dog-6.png", "sks-dog-5.png", "sks-dog-6.png"]
    assert drawn.sheet.is_file()
    with Image.open(drawn.pictures[3]) as picture:
        assert picture.getpixel((0, 0)) == 6


def test_prompts_come_from_a_file_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# places\na photo of {} in space\n\n  sks dog\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a photo of {} in space", "sks dog"]
    (tmp_path / "prompts.txt").write_text("# nothing\n")
    for name in ("prompts.txt", "missing.txt"):
        with pytest.raises(PipelineError, match=name):
            read_prompts(tmp_path / name)


def test_more_pictures_than_a_call_may_ask_for_have_consecutive_seeds(tmp_path: Path) -> None:
    painter = Painter()
    draw(painter, ["sks dog"], 70, {"seed": 0, "num_inference_steps": 2}, tmp_path)
    assert painter.calls == [
        (64, {"seed": 0, "num_inference_steps": 2}),
        (6, {"seed": 64, "num_inference_steps": 2}),
    ]


def test_braces_stand_for_the_words_of_the_subject(project: Path) -> None:
    from dreambooth.params import load_params

    params = load_params(project / "params.yaml")
    complete, nameless = full_prompts(params, "rex", ["a photo of {} in space", "sks dog", "a dog"])
    assert complete == ["a photo of sks dog in space", "sks dog", "a dog"]
    assert nameless == ["a dog"]


def test_prompts_of_the_same_letters_get_files_of_their_own() -> None:
    assert slugs(["a dog", "a dog!", "犬"]) == ["a-dog", "a-dog-no2", "picture"]

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from flow_program import register
from PIL import Image
from servers import refusing
from toy_project import REPOSITORY, dvc, make_photos, quiet, ran

from dreambooth import __version__
from dreambooth.errors import PipelineError
from flows import batch, cli
from flows.cli import _way_back
from flows.generate import draw, full_prompts, read_prompts
from flows.tables import undone_in_words, undone_stages

HEAVY = ("torch", "prefect", "dvc", "mlflow", "diffusers", "transformers", "PIL", "pandas")


def dreambooth(root: Path, *arguments: str, before: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the command as a program, and end with the heavy modules it imported as the last line of stdout."""
    program = (
        "import sys, atexit, json\n"
        f"atexit.register(lambda: print(json.dumps([m for m in {HEAVY} if m in sys.modules])))\n"
        f"{before}\n"
        "from flows.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    path = os.pathsep.join((str(Path(__file__).parent), str(REPOSITORY)))  # of this checkout, wherever it is installed
    environment = {**quiet(root.parent / "prefect"), "COLUMNS": "160", "PYTHONPATH": path, **variables}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    done = dreambooth(tmp_path, "--help")
    assert "personalise" in done.stdout.lower()
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_version_is_told_without_a_project_and_imports_nothing_heavy(tmp_path: Path) -> None:
    done = dreambooth(tmp_path, "--version")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"dreambooth {__version__}", "[]"]


def test_a_shell_completes_commands_and_imports_nothing_heavy(tmp_path: Path) -> None:
    words = {"_DREAMBOOTH_COMPLETE": "complete_bash", "COMP_WORDS": "dreambooth pr", "COMP_CWORD": "1"}
    assert dreambooth(tmp_path, **words).stdout.splitlines() == ["promote", "[]"]


def test_a_project_without_subjects_says_how_one_is_added(project: Path) -> None:
    values = yaml.safe_load((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(yaml.safe_dump(values | {"subjects": {}}))
    for command in ("run", "plan", "status"):
        done = dreambooth(project, command)
        assert done.returncode == 0, done.stderr
        told = "params.yaml has no subject yet. Next: dreambooth add ID PHOTOS --class-noun NOUN"
        assert done.stdout.splitlines()[:-1] == [told]


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
    done = dreambooth(tmp_path, "--debug", "status")
    assert done.returncode == 9
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("E_PIPELINE: no dvc.yaml")


def test_debug_is_the_value_of_an_option_where_it_stands_as_one(tmp_path: Path) -> None:
    done = dreambooth(tmp_path, "sweep", "rex", "--name", "--debug")
    assert done.stderr.startswith("E_PIPELINE: no dvc.yaml")


@pytest.mark.slow
def test_debug_reaches_the_stages(project: Path, prefect_server: str) -> None:
    told = (
        (project / "dvc.yaml").read_text().replace("python toy.py validate", "echo debug=$DREAMBOOTH_DEBUG; exit 3 #")
    )
    (project / "dvc.yaml").write_text(told)
    assert "debug=1" in dreambooth(project, "--debug", "run", "rex", PREFECT_API_URL=prefect_server).stderr
    assert "debug=1" not in dreambooth(project, "run", "rex", PREFECT_API_URL=prefect_server).stderr


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


def test_check_takes_the_folder_of_a_subject_for_the_subject_and_offers_an_id_for_a_slip(project: Path) -> None:
    by_id = dreambooth(project, "check", "rex").stdout
    assert "Next: dreambooth run rex\n" in by_id
    assert dreambooth(project, "check", "data/subjects/rex/").stdout == by_id
    assert dreambooth(project, "check", str(project / "data" / "subjects" / "rex")).stdout == by_id
    slip = dreambooth(project, "check", "rexx").stderr
    assert slip == f"E_SUBJECT: {project}/rexx is no folder, and there is no subject 'rexx'; did you mean 'rex'?\n"


def test_check_refuses_what_is_no_id(project: Path) -> None:
    done = dreambooth(project, "check", "../../etc")
    assert (done.returncode, done.stderr[:11]) == (3, "E_SUBJECT: ")


def test_photos_that_dvc_alone_knows_are_named_before_a_server_starts_with_the_commands_that_bring_them(
    project: Path,
) -> None:
    """In a fresh clone of git the folders of subjects that were added are missing."""
    for subject_id in ("rex", "biscuit"):
        dvc(project, "add", f"data/subjects/{subject_id}")
        shutil.rmtree(project / "data/subjects" / subject_id)
    told = "E_PHOTOS: {0}/data/subjects/{1} is not here, data/subjects/{1}.dvc knows it; dvc checkout data/subjects/{1}"
    for arguments in (["plan"], ["run"], ["check", "rex"]):
        done = dreambooth(project, *arguments)
        assert done.returncode == 3, arguments
        lines = done.stderr.splitlines()
        subjects = ["rex"] if arguments[-1] == "rex" else ["biscuit", "rex"]
        assert [line.partition(".dvc, or")[0] for line in lines] == [told.format(project, one) for one in subjects]
        assert not (project.parent / "prefect").exists()  # no server wrote there
    dvc(project, *lines[0].partition("; dvc ")[2].partition(", or")[0].split())
    assert dreambooth(project, "check", "rex").returncode == 0


def test_add_ends_with_the_next_command(project: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "camera", 3)
    (tmp_path / "camera" / ".DS_Store").touch()
    done = dreambooth(project, "add", "tom", str(tmp_path / "camera"), "--class-noun", "cat")
    assert done.returncode == 0, done.stderr
    assert "Next: dreambooth run tom" in done.stdout
    assert "kind: object (" in done.stdout
    assert "--kind live for animals, person for people: needs a consent" in done.stdout  # as live nobody asks for one
    assert "person: needs a consent" in " ".join(dreambooth(project, "add", "--help").stdout.split())
    assert ".DS_Store" in done.stdout
    assert (project / "data" / "subjects" / "tom.dvc").exists()
    assert dreambooth(project, "add", "tom", str(tmp_path / "camera"), "--class-noun", "cat").returncode == 3


def test_status_shows_what_is_out_of_date_without_torch_or_prefect(project: Path) -> None:
    dvc(project, "add", "data/subjects/rex")
    shutil.rmtree(project / "data/subjects/rex")
    done = dreambooth(project, "status", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "data/subjects/rex.dvc, prior, validate, train, evaluate, export, report" in done.stdout  # nothing is cut
    assert "prior, validate, train, evaluate, export, report" in done.stdout
    assert not {"torch", "prefect", "diffusers"} & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_run_trains_registers_and_then_is_up_to_date_in_seconds_without_torch_or_prefect(
    project: Path, prefect_server: str
) -> None:
    fake = (
        "import flow_program; from dreambooth import registry, versions; registry.register = flow_program.register\n"
        "versions.find, versions.find_export = flow_program.find, flow_program.find_export"
    )
    done = dreambooth(project, "run", "rex", before=fake, PREFECT_API_URL=prefect_server)
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
def test_run_exits_with_the_reason_of_a_subject_that_failed(project: Path, prefect_server: str) -> None:
    dvc(project, "repro", "prior@dog")
    (project / "fail-validate-rex").touch()
    done = dreambooth(project, "run", "rex", PREFECT_API_URL=prefect_server)
    assert done.returncode == 9
    assert "E_PIPELINE: validate@rex: E_TRAIN: the loss is NaN" in done.stderr
    assert "not registered" in done.stdout


@pytest.mark.slow
def test_a_failed_run_tells_what_there_is_of_the_run_before_from_what_it_made(
    project: Path, prefect_server: str
) -> None:
    dvc(project, "repro", "report@rex", "export@rex")
    register(project, "rex", None, print, None)
    make_photos(project / "data/subjects/rex", 4)
    (project / "fail-validate-rex").touch()
    fake = (
        "import flow_program as f; from dreambooth import versions as v; v.find, v.find_export = f.find, f.find_export"
    )
    done = dreambooth(project, "run", "rex", before=fake, PREFECT_API_URL=prefect_server)
    assert done.returncode == 9, done.stderr
    table = {line[:15].strip(): line[15:].strip() for line in done.stdout.splitlines()}
    assert table["stages"] == "validate failed; train, evaluate, export, report not run"
    assert table["time"] == "nothing came to its end"
    assert table["version"] == "v1, champion v1"
    assert table["scores"] == "of the run before"
    assert table["verdict"].startswith("of the run before: promote: identity +0.300")


@pytest.mark.slow
def test_a_failed_run_tells_the_failed_stages_from_those_that_did_not_run_and_how_to_undo_a_preset(
    project: Path, prefect_server: str
) -> None:
    (project / "params").mkdir()
    (project / "params" / "short.yaml").write_text("train:\n  max_train_steps: 7\n")
    (project / "fail-prior-dog").touch()
    run = partial(dreambooth, project, "run", "rex", "--preset", "short", PREFECT_API_URL=prefect_server)
    done = run()
    assert done.returncode == 9
    table = {line[:14].strip(): line[14:].strip() for line in done.stdout.splitlines()}
    assert table["class images"] == "failed"
    assert table["stages"] == "prior failed; train, evaluate, export, report not run"
    assert "NotReady" not in done.stderr
    assert done.stderr.count("E_TRAIN") <= 3  # the stage, its task, and the last line
    assert done.stderr.splitlines()[-2:] == [
        "params.yaml keeps the values of short; to go back: put in again what stands left of the arrows above",
        "E_PIPELINE: prior@dog: E_TRAIN: the loss is NaN at step 3; lower train.learning_rate (exit 6)",
    ]
    assert "params.yaml keeps" not in run().stderr  # nothing changed


def test_what_a_preset_wrote_is_undone_by_git_where_git_has_what_stood_there(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    before = (project / "params.yaml").read_text()
    by_hand = "to go back: put in again what stands left of the arrows above"
    assert _way_back(project, before) == by_hand
    for arguments in (["init", "--quiet"], ["add", "params.yaml"]):
        subprocess.run(["git", *arguments], check=True)
    (project / "params.yaml").write_text(f"# of a preset\n{before}")
    assert _way_back(project, before) == "to go back: git checkout params.yaml"
    assert _way_back(project, f"# of somebody\n{before}") == by_hand


def test_stages_that_have_not_come_to_their_end_failed_or_did_not_run() -> None:
    stale = ["prior@dog", "validate@rex", "train@rex", "export@rex"]
    undone = undone_stages(stale, ["validate@rex"], ["prior@dog: E_PRIOR: no"])
    assert undone == {"prior@dog": "failed", "train@rex": "not run", "export@rex": "not run"}
    assert undone_in_words(undone) == "prior failed; train, export not run"
    assert undone_stages(stale, stale, []) == {}


def test_a_server_that_does_not_answer_is_a_line_with_the_next_step_and_a_preset_is_said_to_stay(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    (project / "params").mkdir()
    (project / "params" / "short.yaml").write_text("train:\n  max_train_steps: 7\n")
    done = dreambooth(project, "run", "rex", "--preset", "short")
    assert done.returncode == 9
    kept, told = done.stderr.splitlines()[-2:]
    assert told.startswith("E_PIPELINE: Failed to reach API at http://127.0.0.1:9/api")
    assert kept.startswith("params.yaml keeps the values of short; to go back: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "PREFECT_API_AUTH_STRING as its server has it"), (404, "http://HOST:4200/api")]
)
def test_a_server_that_refuses_is_a_row_of_the_doctor_and_a_line_of_what_needs_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, status: int, remedy: str
) -> None:
    with refusing(status) as address:
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        looked = dreambooth(project, "doctor")
        forgot = dreambooth(project, "forget", "rex")
        ran = dreambooth(project, "run", "rex")
    assert looked.returncode == 1
    assert remedy in " ".join(looked.stdout.split())
    assert "libraries" in looked.stdout
    assert (forgot.returncode, ran.returncode) == (9, 9)
    assert remedy in forgot.stderr
    assert len(forgot.stderr.splitlines()) == 1
    for done in (looked, forgot, ran):
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
    drawn = draw(Painter(), ["a photo of sks dog", "sks dog"], 2, {"seed": 5}, tmp_path / "out")
    names = [path.name for path in drawn.pictures]
    assert names == ["a-photo-of-sks-dog-5.png", "a-photo-of-sks-dog-6.png", "sks-dog-5.png", "sks-dog-6.png"]
    assert drawn.sheet.is_file()
    of_a_version = draw(Painter(), ["sks dog"], 1, {"seed": 5}, tmp_path / "out", version=3)
    names = [path.name for path in (*of_a_version.pictures, of_a_version.sheet)]
    assert names == ["sks-dog-v3-5.png", "sheet-sks-dog-v3-5.png"]
    options = {"seed": 5, "guidance_scale": 2.5, "negative_prompt": "a hat"}
    other = draw(Painter(), ["sks dog", "in space"], 1, options, tmp_path / "out", version=3)
    names = [path.name for path in (other.pictures[0], other.sheet)]
    digits = hashlib.sha256(b"sks dog\0in space").hexdigest()[
        :6
    ]  # of prompts of which the name of a sheet says the first
    assert names == [
        "sks-dog-v3-guidance2.5-without-a-hat-5.png",
        f"sheet-sks-dog-and-1-more-{digits}-v3-guidance2.5-without-a-hat-5.png",
    ]
    assert all(path.is_file() for path in (*of_a_version.pictures, of_a_version.sheet))
    with Image.open(drawn.pictures[3]) as picture:
        assert picture.getpixel((0, 0)) == 6


def test_prompts_come_from_a_file_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# places\na photo of {} in space\n\n  sks dog\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a photo of {} in space", "sks dog"]
    (tmp_path / "prompts.txt").write_text("# nothing\n")
    for name in ("prompts.txt", "missing.txt"):
        with pytest.raises(PipelineError, match=name):
            read_prompts(tmp_path / name)


def test_as_many_pictures_are_asked_for_as_are_drawn_at_once_with_consecutive_seeds(tmp_path: Path) -> None:
    for size, parts in ((1, [(0, 1), (1, 1), (2, 1)]), (2, [(0, 2), (2, 1)]), (64, [(0, 3)])):
        painter = Painter()
        draw(painter, ["sks dog"], 3, {"seed": 0, "batch_size": size}, tmp_path)
        assert painter.calls == [(count, {"seed": seed, "batch_size": size}) for seed, count in parts]


def test_the_flow_takes_what_the_command_takes() -> None:
    command, flow = (set(inspect.signature(one).parameters) for one in (cli.generate, batch.generate.fn))
    assert command - {"context", "subject_id", "prompts_file"} <= flow


def test_a_picture_is_written_when_it_is_drawn_and_the_bar_counts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Painter):
        def predict(self, rows: dict[str, list[str]], params: dict[str, int]) -> list[bytes]:
            if self.calls:
                raise KeyboardInterrupt
            return super().predict(rows, params)

    with pytest.raises(KeyboardInterrupt):
        draw(Interrupted(), ["sks dog"], 4, {"seed": 7}, tmp_path, version=2, description="draw rex v2")
    assert [path.name for path in tmp_path.iterdir()] == ["sks-dog-v2-7.png"]
    said = capsys.readouterr().err
    assert "draw rex v2" in said
    assert "1/4" in said


def test_braces_stand_for_the_words_of_the_subject() -> None:
    complete, nameless = full_prompts("sks", "dog", ["a photo of {} in space", "sks dog", "a dog"])
    assert complete == ["a photo of sks dog in space", "sks dog", "a dog"]
    assert nameless == ["a dog"]


@pytest.mark.parametrize("name", ["sks", "<r-x>", "犬"])
def test_a_prompt_names_the_subject_wherever_its_word_stands_alone(name: str) -> None:
    naming = [f"a photo of {name}, in space", f"({name})", f"{name}'s ball", f"a {name}-like toy", f"{name}."]
    others = ["asksa dog", f"x{name}", f"{name}s", "a dog"]
    assert full_prompts(name, "dog", naming + others)[1] == others


def test_prompts_that_share_their_first_words_or_letters_keep_files_of_their_own(tmp_path: Path) -> None:
    long = "a photo of sks dog in a field of tall flowers under a wide evening "

    def files(prompts: list[str], negative: str | None = None) -> set[Path]:
        options = {"seed": 0} | ({"negative_prompt": negative} if negative else {})
        drawn = draw(Painter(), prompts, 1, options, tmp_path)
        return {*drawn.pictures, drawn.sheet}

    calls = [[f"{long}sky"], [f"{long}sun"], ["a dog"], ["a dog!"], ["A dog"], ["犬"], ["猫"]]
    assert len(set.union(*map(files, calls))) == 2 * len(calls)
    assert files(["a dog"]) == {tmp_path / "a-dog-0.png", tmp_path / "sheet-a-dog-0.png"}
    assert files(["a dog!"]) == files(["a dog!"])
    assert len(files(["a dog", "a cat"]) & files(["a dog", "a cow"])) == 1  # the picture of the same prompt
    vague = "blurry, dark, noisy, cropped, with "
    assert not files(["a dog"], f"{vague}text") & files(["a dog"], f"{vague}hats")

"""dvc.yaml, params.yaml and stages/ say the same: what is declared is what is read and written."""

import os
import re
import stat
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import yaml
from imports import import_closure
from processes import FORKED
from tiny_project import REPOSITORY, make_project, tiny_values

from dreambooth import drawings, evaluation
from dreambooth.params import ID_PATTERN, Section, load_params, parse_params
from stages import train

STAGES = ("prior", "validate", "train", "evaluate", "report", "export")
# They cannot change what a stage writes: how a run is called, told and checked.
WITHOUT_EFFECT = {
    "dreambooth/__init__.py",
    "dreambooth/errors.py",
    "dreambooth/hardware.py",  # says what computes
    "dreambooth/hub.py",  # why something could not be fetched
    "dreambooth/identifiers.py",  # warns of a word
    "dreambooth/interruption.py",
    "dreambooth/locks.py",
    "dreambooth/launcher.py",
    "dreambooth/mlflowstore.py",
    "dreambooth/processes.py",
    "dreambooth/params.py",  # the values are declared one by one, under params
    "dreambooth/progress.py",
    "dreambooth/trackers.py",
    "dreambooth/redaction.py",
    "dreambooth/tracking.py",
    "stages/__init__.py",
    "stages/entry.py",
}
# Nor can these change a score or a picture.
WITHOUT_SCORE = WITHOUT_EFFECT | {
    "dreambooth/bases.py",  # where the base lies; its weights are hashed
    "dreambooth/folders.py",  # hashes and manifests
    "dreambooth/grid.py",  # a sheet for people
    "dreambooth/intervals.py",  # a number in words
}
WITHOUT_PICTURE = WITHOUT_SCORE | {"dreambooth/images.py"}  # of it a drawing needs the PNG, which keeps every pixel


@cache
def declared(stage: str) -> dict[str, Any]:
    entry: dict[str, Any] = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"][stage]["do"]
    return entry


def in_terms_of_stage(path: str) -> str:
    return path.replace("${key}", "{id}").replace("${item.class_id}", "{class_id}")


def test_every_stage_is_one_file_of_the_same_name() -> None:
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    files = {path.stem for path in (REPOSITORY / "stages").glob("*.py")} - {"__init__", "entry"}
    assert set(stages) == files == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.threat(8)
def test_only_an_id_stands_in_a_command(stage: str) -> None:
    assert declared(stage)["cmd"] == f"python -m stages.{stage} ${{key}}"
    assert not re.match(ID_PATTERN, "dog; touch X #")


@pytest.mark.parametrize("stage", STAGES)
def test_folders_are_declared_as_the_stage_names_them(stage: str) -> None:
    module, entry = import_module(f"stages.{stage}"), declared(stage)
    inputs = {in_terms_of_stage(dep) for dep in entry["deps"] if not dep.endswith(".py")}
    outputs = {in_terms_of_stage(out) for out in entry["outs"] + entry.get("metrics", [])}
    assert inputs == set(module.INPUTS)
    assert outputs == set(module.OUTPUTS)


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_can_change_the_output_is_a_dependency_and_no_other(stage: str) -> None:
    modules = {dep for dep in declared(stage)["deps"] if dep.endswith(".py")}
    assert modules == import_closure(f"stages/{stage}.py", ("dreambooth", "stages"), WITHOUT_EFFECT)


@pytest.mark.parametrize(
    ("listed", "files", "without"),
    [
        (
            evaluation.MODULES,
            ("dreambooth/comparison.py", "dreambooth/scorer.py", "dreambooth/hub_encoders.py"),
            WITHOUT_SCORE,
        ),
        (drawings._CODE, ("dreambooth/drawings.py",), WITHOUT_PICTURE),
        (train.MODULES, ("stages/train.py",), WITHOUT_EFFECT),
    ],
    ids=["scores", "pictures", "weights"],
)
def test_the_version_of_code_covers_all_that_draws_scores_or_trains_and_no_more(
    listed: tuple[str, ...], files: tuple[str, ...], without: set[str]
) -> None:
    closures = [import_closure(file, ("dreambooth",), without) for file in files]
    assert {f"dreambooth/{name}.py" for name in listed} == set().union(*closures) - {"stages/train.py"}


def read_keys(stage: str, root: Path, subject: str) -> set[str]:
    """Run a stage and return the parameters that it read, as section.key or section.id.key."""
    params = load_params(root / "params.yaml")
    places = {
        id(getattr(params, name)): name for name in type(params).model_fields if name not in ("classes", "subjects")
    }
    places |= {id(entry): f"classes.{name}" for name, entry in params.classes.items()}
    places |= {id(entry): f"subjects.{name}" for name, entry in params.subjects.items()}
    seen: set[str] = set()
    original = Section.__getattribute__

    def watch(self: Section, name: str) -> Any:
        if (place := places.get(id(self))) is not None:
            if name in type(self).model_fields:
                seen.add(f"{place}.{name}")
            elif name == "model_dump":
                seen.update(f"{place}.{field}" for field in type(self).model_fields)
        return original(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", watch)
        import_module(f"stages.{stage}").run(params, subject, root)
    return seen


@pytest.mark.fault(14)
def test_every_parameter_that_a_stage_reads_is_declared(project: Path) -> None:
    undeclared = []
    for stage in ("validate", "prior", "train", "evaluate", "report", "export"):
        subject = "dog" if stage == "prior" else "biscuit"
        keys = [key.replace("${key}", subject).replace("${item.class_id}", "dog") for key in declared(stage)["params"]]
        for read in read_keys(stage, project, subject):
            if not any(read == key or read.startswith(f"{key}.") for key in keys):
                undeclared.append(f"{stage} reads {read}")
    # written into MLflow for people, and nowhere else; and who is told besides
    free = r"train reads (prior\.|base\.inference_dtype|tracking\.)"
    assert [line for line in undeclared if not re.match(free, line)] == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.fault(14)
def test_every_declared_parameter_exists(stage: str) -> None:
    values = parse_params(yaml.safe_load((REPOSITORY / "params.yaml").read_text())).model_dump()
    subject = "dog" if stage == "prior" else "biscuit"
    for key in declared(stage)["params"]:
        value: Any = values
        for part in key.replace("${key}", subject).replace("${item.class_id}", "dog").split("."):
            assert part in value, f"{stage}: {key}"
            value = value[part]


def run_stage(stage: str, subject: str, root: Path) -> None:
    import_module(f"stages.{stage}").run(load_params(root / "params.yaml"), subject, root)


def note_reads(work: Callable[[Path], None], root: Path, noted: Path, environment: dict[str, str]) -> None:
    """Be a process that works in a project, and note the files there that Python opens to read."""
    os.environ.update(environment)
    os.chdir(root)
    read: set[str] = set()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(arguments[0], int) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = os.path.relpath(os.fsdecode(arguments[0]))
            here = not path.startswith("..") and Path(path).exists()  # rmtree gives names in other folders alone
            if here and path != "params.yaml":
                read.add(path)

    sys.addaudithook(watch)
    work(root)
    noted.write_text("\n".join(read))


def files(root: Path) -> dict[str, tuple[int, ...]]:
    """Return what changes with a write, for every file, and which folders there are."""
    found = {}
    for path in root.rglob("*"):
        about = path.lstat()
        changing = () if stat.S_ISDIR(about.st_mode) else (about.st_mtime_ns, about.st_ino, about.st_size)
        found[str(path.relative_to(root))] = changing
    return found


def touched(root: Path, work: Callable[[Path], None]) -> tuple[list[str], list[str]]:
    """Return what a process reads in a project, as far as Python opens it, and what is another file after it."""
    before, noted = files(root), root.with_name("read")
    process = FORKED.Process(target=note_reads, args=(work, root, noted, dict(os.environ)))
    process.start()
    process.join()
    assert process.exitcode == 0
    after = files(root)
    return noted.read_text().splitlines(), [path for path in before | after if before.get(path) != after.get(path)]


@pytest.mark.slow
def test_a_stage_touches_only_the_folders_it_declares(tmp_path: Path, tiny_model_folder: Path) -> None:
    root = make_project(tmp_path / "project", tiny_model_folder, tiny_values())
    for stage in ("validate", "prior", "train", "evaluate", "report", "export"):
        subject, module = ("dog" if stage == "prior" else "biscuit"), import_module(f"stages.{stage}")
        read, written = touched(root, partial(run_stage, stage, subject))
        inputs = [path.format(id=subject, class_id="dog") for path in module.INPUTS]
        outputs = [path.format(id=subject) for path in module.OUTPUTS]
        free = (".scratch", "mlflow.db", "mlartifacts")
        assert set(outputs) <= set(written), stage
        assert strangers(read, [*inputs, *outputs, *free]) == [], stage
        assert strangers(written, [*outputs, *free]) == [], stage


WAYS_TO_WRITE: dict[str, Callable[[Path], Any]] = {
    "open": lambda file: file.write_text("new"),
    "append": lambda file: file.open("a").write("more"),
    "a file descriptor": lambda file: os.close(os.open(file, os.O_CREAT | os.O_WRONLY)),
    "another language": lambda file: safetensors.numpy.save_file({}, file),
    "rename": lambda file: Path("there.txt").rename(file),
    "link": lambda file: file.symlink_to("there.txt"),
    "removal": lambda file: Path("there.txt").unlink(),
    "folder": lambda file: file.mkdir(),
}


def write_elsewhere(way: str, root: Path) -> None:
    WAYS_TO_WRITE[way](Path("elsewhere.txt"))


@pytest.mark.parametrize("way", WAYS_TO_WRITE)
def test_whichever_way_a_stage_writes_elsewhere_it_is_found(way: str, tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    (root / "there.txt").touch()
    _, written = touched(root, partial(write_elsewhere, way))
    assert strangers(written, ["models/biscuit"])


def read_there(root: Path) -> None:
    Path("there.txt").read_text()


def test_what_a_stage_reads_elsewhere_is_found(tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    (root / "there.txt").touch()
    assert touched(root, read_there) == (["there.txt"], [])
    assert strangers(["there.txt"], ["models/biscuit"]) == ["there.txt"]


def strangers(paths: list[str], allowed: list[str]) -> list[str]:
    """Return the paths that lie in none of the allowed folders; a folder is filled under a hidden name beside it."""
    return [
        path
        for path in paths
        if not any(
            path == place or path.startswith((f"{place}/", f"{Path(place).parent}/.{Path(place).name}.", f"{place}-"))
            for place in allowed
        )
        and Path(path) not in {parent for place in allowed for parent in Path(place).parents}
    ]

"""Find the folder of the project: it holds dvc.yaml and params.yaml, and every path is relative to it."""

import os
from collections.abc import Sequence
from pathlib import Path

from dreambooth.errors import ParamsError, PipelineError
from dreambooth.folders import write_file
from dreambooth.params import Params, parse_params
from dreambooth.yaml12 import YamlError, load_yaml

PARAMS = "params.yaml"
MARKS = ("dvc.yaml", PARAMS)
INPUTS = (*MARKS, "data", "dreambooth", "stages")  # of the stages: what an experiment or a clone must see as it is
NO_SUBJECT = f"{PARAMS} has no subject yet. Next: dreambooth add ID PHOTOS --class-noun NOUN"


def find_root(given: str | Path | None = None) -> Path:
    """Return the project: the given folder, else DREAMBOOTH_HOME, else the nearest one at or above this folder.

    Raises:
        PipelineError: no such folder.
    """
    named = given or os.environ.get("DREAMBOOTH_HOME")
    if named:
        folder = Path(named).expanduser().absolute()
        if not _is_project(folder):
            raise PipelineError(f"{folder} is no project: it lacks {_lacks(folder)}; name the folder that holds both")
        return folder
    here = Path.cwd()
    for folder in (here, *here.parents):
        if _is_project(folder):
            return folder
    raise PipelineError(
        f"no {' and '.join(MARKS)} in {here} or above; go to the folder of the project, "
        "or name it: --root FOLDER or DREAMBOOTH_HOME"
    )


def enter() -> dict[str, str]:
    """Make the project of this machine the current folder: the pull step of prefect.yaml, before a flow is imported.

    Raises:
        PipelineError: no such folder.
    """
    root = find_root()
    os.chdir(root)
    return {"directory": str(root)}


def ids_of(given: str | Sequence[str] | None) -> list[str]:
    """Return the ids that the parameter of a flow names: one, several, or none."""
    return [given] if isinstance(given, str) else list(given or [])


def choose_subjects(params: Params, given: str | Sequence[str] | None) -> list[str]:
    """Return the given subjects, each once, or all of them when none is named.

    Raises:
        SubjectError: one of them is not in params.yaml.
    """
    wanted = ids_of(given)
    for subject_id in wanted:
        params.subject(subject_id)
    return list(dict.fromkeys(wanted)) or list(params.subjects)


def read_params_text(root: Path) -> str:
    """Return params.yaml letter by letter, with the line ends that it has."""
    return (root / PARAMS).read_bytes().decode()


def write_params_text(root: Path, text: str) -> None:
    """Replace what params.yaml says; where a link of that name stands, the file that it leads to."""
    write_file((root / PARAMS).resolve(), text.encode())


def means(text: str, params: Params) -> bool:
    """Tell whether a text is a params.yaml that says these parameters."""
    try:
        return parse_params(load_yaml(text)) == params
    except (YamlError, ParamsError):
        return False


def _is_project(folder: Path) -> bool:
    return not _lacks(folder)


def _lacks(folder: Path) -> str:
    return " and ".join(mark for mark in MARKS if not (folder / mark).is_file())

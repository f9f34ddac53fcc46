"""Where the base model of a project lies: a folder of it, or the hub."""

import json
from pathlib import Path
from typing import Any

from dreambooth.errors import ModelError
from dreambooth.folders import hidden_by_link

LOCAL_MODELS = "data/base"  # what the stages depend on, see dvc.yaml


def locate(name_or_path: str, revision: str | None, root: Path) -> Path | None:
    """Return the folder of a base model; None for one of the hub, which is not asked.

    Args:
        name_or_path: a folder, absolute or in the project, or a hub id.
        revision: commit of a hub model; required for one, because a branch moves.
        root: the project's folder.

    Raises:
        ModelError: neither a folder nor a hub id with its commit, or a folder whose changes DVC would not see.
    """
    folder = root / name_or_path
    if folder.is_dir():
        _require_seen(name_or_path, folder.absolute(), root.absolute() / LOCAL_MODELS)
        if revision is not None:
            raise ModelError(f"base.revision: {name_or_path} is a folder, which has no revision; write null")
        return folder
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/")):
        raise ModelError(
            f"base.pretrained_model_name_or_path: {name_or_path} is no folder in {root} and no hub id (owner/name)"
        )
    if revision is None:
        raise ModelError(
            f"base.revision: should be the 40-digit commit of the hub model {name_or_path}; a branch moves"
        )
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file of JSON of a base says.

    Raises:
        ModelError: it is missing, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; {path.parent} should be a pipeline in the layout of diffusers") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}); fetch the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no object of JSON; fetch the model again")
    return content


def _require_seen(name_or_path: str, folder: Path, home: Path) -> None:
    """Refuse a folder of which DVC does not see all: outside of the folder that stages depend on, or behind a link."""
    for part in (folder, *sorted(folder.rglob("*"))):
        if hidden := hidden_by_link(home, part):
            raise ModelError(f"base.pretrained_model_name_or_path: {hidden}")
    if not (folder.is_relative_to(home) and folder.resolve().is_relative_to(home.resolve())):
        raise ModelError(
            f"base.pretrained_model_name_or_path: {name_or_path} is not in {LOCAL_MODELS}, where its changes would "
            "be seen; move or copy it there"
        )

"""Where the base model of a project lies: a folder of it, or the hub."""

from pathlib import Path

from dreambooth.errors import ModelError

LOCAL_MODELS = "data/base"  # what the stages depend on, see dvc.yaml


def locate(name_or_path: str, revision: str | None, root: Path) -> Path | None:
    """Return the folder of a base model; None for one of the hub, which is not asked.

    Args:
        name_or_path: a folder, absolute or in the project, or a hub id.
        revision: commit of a hub model; required for one, because a branch moves.
        root: the project's folder.

    Raises:
        ModelError: neither a folder nor a hub id with its commit.
    """
    folder = root / name_or_path
    if folder.is_dir():
        if not folder.absolute().is_relative_to(root.absolute() / LOCAL_MODELS):
            raise ModelError(
                f"base.pretrained_model_name_or_path: {name_or_path} is not in {LOCAL_MODELS}, where its changes would "
                "be seen; move or copy it there"
            )
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

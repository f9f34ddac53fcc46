"""Serve a pipeline that is too large to be copied into the registry from where DVC keeps it.

The version holds pointer.json instead of the files: where the export lies, its content hash, and the cache of DVC.
Small parts that are of use without the pipeline may lie beside it; it names them, and drawing does not read them.
"""

import configparser
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from dreambooth.errors import ModelError
from dreambooth.folders import (
    TornFolderError,
    content_hash,
    hash_of_files,
    read_manifest,
    scratch_folder,
    sha256_of_file,
    write_file,
)

POINTER = "pointer.json"
LAID_OUT = "pipelines"  # in the scratch folder: exports as links to the files in DVC's cache
_HASH, _MD5 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}(\.dir)?")


def write_pointer(
    folder: Path,
    root: Path,
    path: str,
    export_hash: str,
    md5: str | None,
    beside: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write pointer.json for <root>/<path>.

    Args:
        folder: is made.
        root: of the project; who asks for the version looks in his own first, see `resolve`.
        path: of the export, from the root.
        export_hash: content hash of the export.
        md5: of the folder in dvc.lock, "<32 digits>.dir"; None where DVC does not know this export.
        beside: size and sha256 of the files of the export that lie beside the pointer, by name.
    """
    folder.mkdir(parents=True)
    about = {"root": str(root.absolute()), "path": path, "hash": export_hash, "md5": md5, "beside": dict(beside)}
    write_file(folder / POINTER, json.dumps(about, indent=1).encode() + b"\n")


def resolve(folder: Path, home: Path | None = None) -> Path:
    """Return the folder of the pipeline: this one, or the one that it points to, found whole.

    Args:
        folder: of a version.
        home: the project that asks, in which is looked first; None takes DREAMBOOTH_HOME. After it comes the project
            that made the version, which may be a clone that is gone, or a checkout that was moved.

    Raises:
        ModelError: neither a project nor its cache of DVC holds those files any more, or the pointer is none.
    """
    if not (folder / POINTER).is_file():
        return folder
    about = _read(folder / POINTER)
    asking = Path(home or os.environ.get("DREAMBOOTH_HOME") or about["root"]).absolute()
    roots = [root for root in dict.fromkeys((asking, Path(about["root"]).absolute())) if root.is_dir()]
    found = next((place for root in roots if (place := _found_in(root, about, roots[0]))), None)
    if found is None:
        raise ModelError(
            f"{asking / about['path']} does not hold the export {about['hash'][:12]}, and neither does the cache of "
            f"DVC ({about['md5'] or 'never run through DVC'}); check out the commit of the version, then: "
            f"dvc pull {about['path']}; or name the folder of the project: DREAMBOOTH_HOME"
        )
    return found


def resolve_whole(folder: Path, home: Path | None = None) -> tuple[Path, str]:
    """Return what `resolve` does, and the content hash of that folder, whose files were read once to know it.

    Raises:
        ModelError: see `resolve`.
        TornFolderError: there is no pointer, and the folder is not what its manifest says.
    """
    place, pointer = resolve(folder, home), folder / POINTER
    return place, _read(pointer)["hash"] if pointer.is_file() else content_hash(place)


def named_beside(pointer: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of the files that a pointer names beside itself; none for one of an older release."""
    beside: dict[str, dict[str, Any]] = _read(pointer).get("beside", {})
    return beside


def require_beside(folder: Path) -> None:
    """Refuse a folder in which files that its pointer names are missing or others; without a pointer there are none.

    Raises:
        TornFolderError: with the names.
    """
    if not (folder / POINTER).is_file():
        return
    if wrong := [name for name, entry in named_beside(folder / POINTER).items() if not _is_the(folder / name, entry)]:
        raise TornFolderError(f"{folder}: missing or changed beside {POINTER}: {', '.join(wrong)}")


def _is_the(path: Path, entry: Mapping[str, Any]) -> bool:
    return path.is_file() and sha256_of_file(path) == entry["sha256"]


def _read(path: Path) -> dict[str, Any]:
    """Return what a pointer says; names become paths, hashes names of folders, and a registry may be anybody's."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        root, place, export_hash, md5 = (about[key] for key in ("root", "path", "hash", "md5"))
        good = isinstance(root, str) and isinstance(place, str) and _HASH.fullmatch(export_hash)
        beside = about.get("beside", {}).items()
        inside = all(_is_inside(name) and {"size", "sha256"} <= entry.keys() for name, entry in beside)
        if good and inside and (md5 is None or _MD5.fullmatch(md5)):
            return dict(about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ModelError(f"{path} is no pointer to an export; register the export again: dreambooth register ID")


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def dvc_cache(root: Path) -> Path:
    """Return where DVC keeps files by their md5; `dvc cache dir` changes it in .dvc/config or config.local."""
    config = configparser.ConfigParser(interpolation=None)
    config.read([root / ".dvc/config", root / ".dvc/config.local"], encoding="utf-8")
    named = config.get("cache", "dir", fallback=None)
    return (root / ".dvc" / (named or "cache")) / "files" / "md5"


def _is_whole(folder: Path, export_hash: str) -> bool:
    """Tell whether a folder is this export: another one is told by its manifest, before its files are read."""
    try:
        told = hash_of_files(read_manifest(folder, verify=False)["files"])
        return told == export_hash and content_hash(folder) == export_hash
    except TornFolderError:
        return False


def _found_in(root: Path, about: dict[str, Any], asking: Path) -> Path | None:
    """Return where a project has the export: in its place, or in DVC's cache; None without either."""
    place: Path = root / str(about["path"])
    if _is_whole(place, about["hash"]):
        return place
    return _from_cache(root, about, asking) if about["md5"] else None


def _from_cache(root: Path, about: dict[str, Any], asking: Path) -> Path | None:
    """Lay links to the files in DVC's cache out as the folder was, for the project that asks.

    None if one is missing or damaged.
    """
    place: Path = scratch_folder(asking) / LAID_OUT / str(about["hash"])
    place.parent.mkdir(mode=0o700, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):  # several processes of one server may ask at once
        return place if _is_whole(place, about["hash"]) else _laid_out(root, about, place)


def _laid_out(root: Path, about: dict[str, Any], place: Path) -> Path | None:
    try:
        entries = json.loads(_object(root, about["md5"]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    shutil.rmtree(place, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent))
    inside = _lay_out(root, entries, temporary)
    if not inside or not _is_whole(temporary, about["hash"]):
        shutil.rmtree(temporary)
        return None
    temporary.rename(place)
    return place


def _lay_out(root: Path, entries: Any, folder: Path) -> bool:
    """Make a link for each entry of a folder of DVC; False at the first that is none, or lies outside of the folder."""
    for entry in entries:
        target = folder / entry["relpath"]
        if not target.resolve().is_relative_to(folder.resolve()) or not _MD5.fullmatch(entry["md5"]):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(_object(root, entry["md5"]).absolute())
    return True


def _object(root: Path, md5: str) -> Path:
    return dvc_cache(root) / md5[:2] / md5[2:]

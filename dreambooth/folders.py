"""Folders that are whole or not there at all, and proven so by a manifest of every file's sha256, and of its own."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs

from dreambooth.errors import MACHINE_FAULT, DreamboothError, shown

MANIFEST = "manifest.json"
GENERATION = "generation.json"  # of an export: whose it is, in which words, how it is drawn
MANIFEST_VERSION = 1
MAX_TEXT = 1 << 20
Work = Literal["upload", "download", "scores"]
WORKS: tuple[Work, ...] = get_args(Work)
"""What is done in folders that go away; what killed processes left of them `dreambooth forget` and `doctor` find."""
Cache = Literal["evaluation", "latents", "trackers"]
CACHES: tuple[Cache, ...] = get_args(Cache)
"""What a subject has in the scratch folder beside its checkpoints; `dreambooth forget` finds it."""
PLACES = ("data/subjects", "models", "export", "reports", "metrics")
"""Where a folder or file of a subject's name is written beside its place; see `leftovers`."""


class TornFolderError(DreamboothError):
    """Refuse a folder whose files are not what its manifest says."""

    code = "E_TORN"


class DiskFullError(DreamboothError):
    """Refuse to begin what the disk has no room for."""

    code = "E_DISK_FULL"
    exit_code = MACHINE_FAULT


class HomelessError(DreamboothError):
    """Refuse to guess where the files of a user without a home may lie."""

    code = "E_HOME"
    exit_code = MACHINE_FAULT


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise DiskFullError when fewer than `needed` bytes are free where `folder` lies."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskFullError(
            f"{folder}: {what} needs {needed:,} bytes, {free:,} are free; make room, or move .scratch to another disk "
            "and set DREAMBOOTH_SCRATCH to it"
        )


def free_bytes(folder: Path) -> int:
    """Return how many bytes are free where a folder lies."""
    return shutil.disk_usage(folder).free


def scratch_folder(root: Path) -> Path:
    """Return the folder of a project's caches and checkpoints: DREAMBOOTH_SCRATCH, or <root>/.scratch; made 0700."""
    return _private("DREAMBOOTH_SCRATCH", lambda: root / ".scratch")


def cache_folder() -> Path:
    """Return the folder shared by all projects of a user: DREAMBOOTH_CACHE, or the platform's cache; made 0700.

    Raises:
        HomelessError: neither is there.
    """
    return _private("DREAMBOOTH_CACHE", lambda: platformdirs.user_cache_path("dreambooth"))


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: Any) -> str:
    """Return the sha256 of a JSON value: equal values, equal keys, whatever their order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def code_hash(modules: Sequence[str] | None = None) -> str:
    """Return the sha256 of modules of this package, of all without names: other code, another result."""
    paths = sorted(Path(__file__).parent.glob("*.py"))
    return sha256_of({path.name: sha256_of_file(path) for path in paths if modules is None or path.stem in modules})


@contextmanager
def new_folder(path: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    """Fill a folder beside its place, write its manifest last, then rename it to `path`.

    Whoever looks sees the old folder, or nothing, or the whole new one. Hidden files do not count as content.

    Args:
        path: where the folder will stand; an older one there is replaced.
        about: what the manifest says beside the files, for example the inputs; no times, so that equal work gives
            equal bytes. It may still be filled while the folder is.

    Yields:
        The temporary folder to write into.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary, about)
        _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def work_folder(root: Path, work: Work, subject_id: str) -> "tempfile.TemporaryDirectory[str]":
    """Return a folder in the scratch folder that goes away; its name tells whose it is, should the process be killed.

    Args:
        root: of the project.
        work: what is done in it.
        subject_id: whose files lie there; `dreambooth forget` finds them by it.
    """
    return tempfile.TemporaryDirectory(prefix=f"{work}-{subject_id}-", dir=scratch_folder(root))


def cache_of(root: Path, cache: Cache, subject_id: str) -> Path:
    """Return the folder that a subject has in the scratch folder for this."""
    return scratch_folder(root) / cache / subject_id


def checkpoint_folder(root: Path, subject_id: str, key: str) -> Path:
    """Return the folder for the checkpoints of one training; `key` is the sha256 of what it depends on."""
    return scratch_folder(root) / "checkpoints" / f"{subject_id}-{key[:16]}"


def checkpoint_folders(root: Path) -> dict[Path, str]:
    """Return the folders with the checkpoints of all trainings, and of which subject each is."""
    found = sorted((scratch_folder(root) / "checkpoints").glob("*"))
    return {path: path.name.rpartition("-")[0] for path in found}


def scratch_of(root: Path, subject_id: str) -> list[Path]:
    """Return what a subject has in the scratch folder, with what killed processes left of its `work_folder`s."""
    folder = scratch_folder(root)
    own = [*(cache_of(root, cache, subject_id) for cache in CACHES), photo_versions(root, subject_id)]
    checkpoints = [path for path, whose in checkpoint_folders(root).items() if whose == subject_id]
    # Exactly as many letters as tempfile appends: rex must not take what is of rex-2.
    works = [path for work in WORKS for path in folder.glob(f"{work}-{subject_id}-{8 * '[a-z0-9_]'}")]
    return [*(path for path in own if path.exists()), *checkpoints, *works]


def photo_versions(root: Path, subject_id: str) -> Path:
    """Return the file that notes which folders of a subject's photos DVC was given; `flows.dvcstore` writes it."""
    return scratch_folder(root) / "photos" / f"{subject_id}.txt"


def leftovers(place: Path, name: str = "*") -> list[Path]:
    """Return the temporary files and folders `.NAME.*` that killed writers, any of ours, left beside NAME.

    An id has no dot, so that nobody's name begins with another one's and a dot.
    """
    return sorted(place.glob(f".{name}.*"))


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of a folder left beside it; only for the one process that may write it."""
    for leftover in leftovers(path.parent, path.name):
        shutil.rmtree(leftover, ignore_errors=True)


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of all files in a folder, and make both reach the disk."""
    files = {name: _describe(folder / name) for name in _content(folder)}
    manifest = json.loads(json.dumps({"version": MANIFEST_VERSION, **about, "files": files}))
    manifest["sha256"] = sha256_of(manifest)
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")


def read_manifest(folder: Path, verify: bool = True) -> dict[str, Any]:
    """Return a folder's manifest after every file was found to be what it says.

    Args:
        folder: made by `new_folder`.
        verify: False skips the hashes, for a reader that has just checked them.

    Raises:
        TornFolderError: no manifest, a missing or an additional file, or another size or hash.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise TornFolderError(f"{folder} has no {MANIFEST}; run the stage that makes it (dvc repro)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TornFolderError(f"{folder / MANIFEST} is not JSON ({error}); run the stage that makes it again") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != sha256_of(manifest):
        raise TornFolderError(f"{folder / MANIFEST} was changed (other sha256); run the stage that makes it again")
    if manifest.get("version") != MANIFEST_VERSION:
        raise TornFolderError(
            f"{folder / MANIFEST} has version {manifest.get('version')}, this program reads {MANIFEST_VERSION}; "
            "run the stage that makes it again"
        )
    faults = list(_differences(folder, manifest["files"])) if verify else []
    if faults:
        raise TornFolderError(f"{folder}: {'; '.join(faults)}; run the stage that makes it again")
    return manifest


def hidden_by_link(home: Path, folder: Path) -> str | None:
    """Say which link to a folder hides a folder of `home` from DVC, and what helps; None where there is no such link.

    DVC sees neither what such a link leads to nor where: a stage would be up to date for ever.
    """
    between = (one for one in (folder, *folder.parents) if one != home and one.is_relative_to(home))
    link = next((one for one in between if one.is_symlink() and one.is_dir()), None)
    return f"{link} is a link to a folder, behind which DVC sees no change; move or copy it there" if link else None


def content_hash(folder: Path) -> str:
    """Return one sha256 for all files of a folder and their names, from its verified manifest."""
    return hash_of_files(read_manifest(folder)["files"])


def hash_of_files(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the content hash of a folder with these files, as its manifest has them."""
    return sha256_of({name: entry["sha256"] for name, entry in files.items()})


def misnamed(folder: Path) -> list[str]:
    """Return a line for each path in a folder, however deep, whose name is no UTF-8; DVC hashes nothing beside one."""
    paths = sorted(path for path in folder.rglob("*") if any("\udc80" <= letter <= "\udcff" for letter in path.name))
    return [f"{shown(path)}: the name is no UTF-8, which DVC cannot note; rename it" for path in paths]


def read_text(path: Path) -> str:
    """Return a text that a person wrote, in UTF-8; without the mark that editors of Windows write before it.

    Raises:
        OSError: it is a pipe or a device, which may never end, or has more than MAX_TEXT bytes.
        UnicodeDecodeError: it is no UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no file", str(path))
    with path.open("rb") as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise OSError(errno.EFBIG, f"has more than {MAX_TEXT} bytes", str(path))
    return content.decode("utf-8-sig")


def write_file(path: Path, content: bytes) -> None:
    """Write a file beside its place, make it reach the disk, then rename it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_private(folder: Path) -> bool:
    """Return whether nobody but its owner may look into a folder."""
    return not folder.stat().st_mode & 0o077


def _private(variable: str, ours: Callable[[], Path]) -> Path:
    """Make a folder for its owner alone; one that the user named is left as it was, it may be shared on purpose."""
    named = os.environ.get(variable)
    try:
        path = (Path(named) if named else ours()).expanduser().absolute()
    except RuntimeError:  # a container with any user id: no HOME, no line in /etc/passwd
        raise HomelessError(
            f"{named or 'a folder for caches'}: the user {os.getuid()} has no home; set {variable} to a folder, or HOME"
        ) from None
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not named and not is_private(path):
        path.chmod(0o700)
    return path


def _content(folder: Path) -> list[str]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if name.as_posix() != MANIFEST and not any(part.startswith(".") for part in name.parts)
    )


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256_of_file(path)}


def _differences(folder: Path, files: Mapping[str, Any]) -> Iterator[str]:
    present = set(_content(folder))
    for name in sorted(present - set(files)):
        yield f"{name} is not in the manifest"
    for name, entry in files.items():
        if name not in present:
            yield f"{name} is missing"
        elif (size := (folder / name).stat().st_size) != entry["size"]:
            yield f"{name} has {size} bytes, not {entry['size']}"
        elif sha256_of_file(folder / name) != entry["sha256"]:
            yield f"{name} was changed (other sha256)"


def _replace_folder(temporary: Path, path: Path) -> None:
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        path.replace(old / path.name)
        temporary.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Find and erase what DVC keeps of one subject, in all places: objects by their hash, entries of the run cache.

And read one file as it was at a revision of git, and say where DVC notes names.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreambooth.errors import PipelineError
from dreambooth.folders import photo_versions
from dreambooth.params import names_id
from dreambooth.redaction import redact
from dreambooth.yaml12 import YamlError, load_yaml
from flows.commandline import NOTES, git, is_in_repository, notes_folder

# The folders with a folder or a file for each subject: a module may have the name of one, stages/train.py.
_FOLDERS = frozenset({"build", "models", "export", "reports"})
FOLDER_HASH = re.compile(r"\b[0-9a-f]{32}\.dir\b")


@dataclass
class Kept:
    """What DVC keeps of a subject and of nobody else."""

    objects: set[str] = field(default_factory=set)
    """md5 of files and folders, those of folders with .dir."""
    runs: set[str] = field(default_factory=set)
    """Entries of the run cache: <2 digits>/<key>/<value>."""
    left: list[str] = field(default_factory=list)
    """What could not be looked at."""


@dataclass(frozen=True)
class _Place:
    """The cache, or a remote."""

    name: str
    fs: Any
    root: str
    odb: Any

    def require_erasable(self) -> None:
        """Refuse a web server: DVC can delete nothing there, and one that does not answer looks empty.

        Raises:
            PipelineError: it is one.
        """
        if self.fs.protocol in ("http", "https"):
            raise PipelineError(
                f"{self.root} is a web server, where DVC deletes nothing; delete there what it was sent"
            )


def kept_of(root: Path, subject_id: str) -> Kept:
    """Find the objects and runs of a subject in dvc.lock, .dvc files, their git history, our notes, and the run caches.

    An object that also belongs to something else (class images, the base, another subject's photo) is left out.

    Raises:
        PipelineError: dvc.lock or a .dvc file is no YAML, or git cannot read their history: what it alone names would
            stay without a trace.
    """
    mine = _noted_photos(photo_versions(root, subject_id))
    others: set[str] = set()
    left: dict[str, str] = {}
    found = Kept()
    for one in _entries_of_project(root):
        _sort(one, subject_id, mine, others)
    with _places(root) as places:
        for place in places:
            with _noted(place, left):
                place.require_erasable()
                for name, text in _run_entries(place):
                    entry = _values(text)
                    if entry is None:  # empty or torn: DVC passes it over
                        found.runs |= {name} if names_id(text, subject_id) else set()
                        continue
                    _sort(entry, subject_id, mine, others)
                    if _is_of(entry, subject_id):
                        found.runs.add(name)
        mine |= _content(mine, places, left)
        others |= _content(others, places, left)
        found.objects = {oid for oid in mine - others if any(_may_have(place, oid, left) for place in places)}
    found.left = list(left.values())
    return found


def note_photos(root: Path, tracked: str) -> None:
    """Note which photos a .dvc file names, before and after DVC writes it anew: those before stay in the cache.

    Without a commit between two versions of the file nothing else would tell whose the first ones are.

    Args:
        root: of the project.
        tracked: data/subjects/rex.dvc; another file, or a stage, names no photos.
    """
    path = Path(tracked)
    if path.parent != Path("data/subjects") or path.suffix != ".dvc" or not (root / path).is_file():
        return
    notes = photo_versions(root, path.stem)
    named = set(FOLDER_HASH.findall((root / path).read_text(encoding="utf-8", errors="replace")))
    if new := sorted(named - _noted_photos(notes)):
        notes.parent.mkdir(exist_ok=True)
        with notes.open("a", encoding="utf-8") as file:
            file.writelines(f"{oid}\n" for oid in new)


def erase(root: Path, kept: Kept) -> list[str]:
    """Delete these objects and runs from the cache and from every remote; return what could not be reached."""
    left: dict[str, str] = {}
    with _places(root) as places:
        for place in places:
            with _noted(place, left):
                place.require_erasable()
                for oid in sorted(kept.objects):
                    _remove(place.fs, place.odb.oid_to_path(oid))
                for run in sorted(kept.runs):
                    _remove(place.fs, place.fs.join(place.root, "runs", *run.split("/")))
                if place.fs.protocol == "local":
                    for folder in _empty_keys(Path(place.root)):
                        _remove_if_empty(folder)
    return list(left.values())


def empty_keys(root: Path) -> list[Path]:
    """Return the keys of the run cache that have no entry: DVC fails at the stage that looks for one there."""
    with explained(root, "mend .dvc/config, then try again"), open_project(root) as repo:
        return _empty_keys(Path(repo.cache.legacy.path))


def read_at(root: Path, revision: str, path: str) -> str:
    """Return the text of a file at a revision, also of an output, which lies in the cache.

    Raises:
        PipelineError: it is not there, or not in the cache any more.
    """
    import dvc.api
    from dvc.exceptions import DvcException

    try:
        return str(dvc.api.read(path, repo=str(root), rev=revision, config=_with_notes(root)))
    except (DvcException, OSError) as error:
        raise PipelineError(f"{path} of {revision}: {error}; dvc exp remove it, then run it again") from None


def forget_names(root: Path) -> None:
    """Remove DVC's notes of the project, those of commands of DVC by hand as well; DVC makes them again."""
    from dvc.repo import Repo

    with explained(root, "mend .dvc/config, then try again"), Repo(str(root)) as repo:
        by_hand = Path(repo.site_cache_dir)
    for folder in (by_hand, root / NOTES):
        shutil.rmtree(folder, ignore_errors=True)


def open_project(root: Path, wait_for_lock: bool = False) -> Any:
    """Open the `Repo` of DVC of a project, to be used with `with`."""
    from dvc.repo import Repo

    return Repo(str(root), config=_with_notes(root), _wait_for_lock=wait_for_lock)


def _with_notes(root: Path) -> dict[str, Any]:
    return {"core": {"site_cache_dir": str(notes_folder(root))}}


def remotes(root: Path) -> dict[str, str | None]:
    """Return the remotes by name, each with what is wrong with it, None if it answers."""
    found: dict[str, str | None] = {}
    with explained(root, "mend .dvc/config, then try again"), open_project(root) as repo:
        for name in repo.config["remote"]:
            try:
                remote = repo.cloud.get_remote(name)
                there = remote.fs.exists(remote.path)
                found[name] = None if there else f"{remote.path} is not there yet; dvc push makes it"
            except Exception as error:  # every kind of remote has exceptions of its own
                found[name] = _in_a_line(error)
    return found


@contextmanager
def explained(root: Path, remedy: str) -> Iterator[None]:
    """Turn what DVC raises into one line with the next step."""
    from dvc.exceptions import DvcException, NotDvcRepoError

    try:
        yield
    except NotDvcRepoError:
        raise PipelineError(f"{root} has no .dvc folder; run there: dvc init (with --no-scm outside of git)") from None
    except DvcException as error:
        text = " ".join(str(error).split())
        if "is not a git repository" in text:
            remedy = "run there: git init; to stay without git: dvc config core.no_scm true"
        raise PipelineError(f"{text}{_cause(error)}; {remedy}") from None


def _cause(error: BaseException) -> str:
    """Return what DVC keeps out of its message: the line that YAML or the schema stumbled over."""
    cause = error.__cause__
    return f": {' '.join(str(cause).split())}" if cause is not None and str(cause) else ""


def being_written(root: Path) -> dict[Path, int]:
    """Return the files and folders that stages write now, each with the process; one that was killed left its name.

    Raises:
        json.JSONDecodeError: DVC's notes were torn by a crash; it says itself what to do about it.
    """
    file = root / ".dvc" / "tmp" / "rwlock"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    held = json.loads(text) if text.strip() else {}
    return {Path(path): int(who["pid"]) for path, who in held.get("write", {}).items()}


@contextmanager
def _places(root: Path) -> Iterator[list[_Place]]:
    with explained(root, "mend .dvc/config, then try again"), open_project(root, wait_for_lock=True) as repo:
        legacy, local = repo.cache.legacy, repo.cache.local
        places = [_Place("cache", local.fs, legacy.path, local)]
        for name in repo.config["remote"]:
            remote = repo.cloud.get_remote(name)
            places.append(_Place(f"remote {name}", remote.fs, remote.path, remote.odb))
        yield places


@contextmanager
def _noted(place: _Place, left: dict[str, str]) -> Iterator[None]:
    """Note what a place says instead of an answer, once."""
    try:
        yield
    except Exception as error:  # every kind of remote has exceptions of its own
        left.setdefault(place.name, f"DVC {place.name}: {_in_a_line(error)}")


def _in_a_line(error: BaseException) -> str:
    return redact(" ".join(str(error).split()) or type(error).__name__)


def read_dvc_file(path: Path) -> Any:
    """Return the values of dvc.lock or of a .dvc file.

    Raises:
        PipelineError: it is no YAML, as after a merge with conflicts.
    """
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (YamlError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} cannot be read ({error}); mend it, or git checkout it, then try again") from None


def _noted_photos(notes: Path) -> set[str]:
    return set(FOLDER_HASH.findall(notes.read_text(encoding="utf-8"))) if notes.is_file() else set()


def _entries_of_project(root: Path) -> Iterator[Mapping[str, Any]]:
    """Yield every entry of a lock file, of today and of the history of git."""
    for path in [root / "dvc.lock", *root.glob("data/subjects/*.dvc")]:
        if path.is_file():
            yield from _entries(read_dvc_file(path))
    for text in _history(root):
        yield from _entries(_values(text))


def _values(text: str) -> Mapping[str, Any] | None:
    """Return the map that a text holds, None if it holds another thing or nothing."""
    try:
        content = load_yaml(text)
    except YamlError:
        return None
    return content if isinstance(content, Mapping) else None


def _entries(content: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(content, Mapping):
        return
    if isinstance(stages := content.get("stages"), Mapping):
        yield from (entry for entry in stages.values() if isinstance(entry, Mapping))
    else:
        yield {**content, "outs": [_under_data(out) for out in _items({"outs": content.get("outs")})]}


def _under_data(out: Mapping[str, Any]) -> dict[str, Any]:
    """Return an out of data/subjects/<id>.dvc, which says its path from there."""
    return {**out, "path": f"data/subjects/{out.get('path', '')}"}


def _history(root: Path) -> Iterator[str]:
    """Yield every committed version of dvc.lock and of the .dvc files; nothing without a repository."""
    if not is_in_repository(root):
        return
    for line in git(root, "rev-list", "--all", "--objects", "--", "dvc.lock", "data/subjects").splitlines():
        sha, _, path = line.partition(" ")
        if path.endswith(("dvc.lock", ".dvc")):
            yield git(root, "cat-file", "blob", sha)


def _run_entries(place: _Place) -> Iterator[tuple[str, str]]:
    """Yield name and text of each entry of the run cache."""
    folder = place.fs.join(place.root, "runs")
    if not place.fs.exists(folder):
        return
    for path in place.fs.find(folder):
        with place.fs.open(path, "rb") as file:
            yield "/".join(place.fs.parts(path)[-3:]), file.read().decode(errors="replace")


def _empty_keys(cache: Path) -> list[Path]:
    return [key for key in sorted(cache.glob("runs/*/*")) if key.is_dir() and not any(key.iterdir())]


def _remove_if_empty(key: Path) -> None:
    """Remove the folder of a key, and the one that it lies in; another process may just write into them."""
    with contextlib.suppress(OSError):
        key.rmdir()
        key.parent.rmdir()


def _items(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return dependencies and outputs of an entry."""
    lists = [entry.get(name) for name in ("deps", "outs")]
    return [item for one in lists if isinstance(one, list) for item in one if isinstance(item, Mapping)]


def _is_of(entry: Mapping[str, Any], subject_id: str) -> bool:
    return any(_names(item, subject_id) for item in _items(entry))


def _names(item: Mapping[str, Any], subject_id: str) -> bool:
    """Tell whether a path is a subject's: data/subjects/ID, build/ID/..., metrics/ID.json."""
    parts = Path(str(item.get("path", ""))).parts
    if parts[:2] == ("build", "classes"):
        return False
    if parts[:2] == ("data", "subjects"):
        return parts[2:3] == (subject_id,)
    if parts[:1] == ("metrics",):
        return parts[1:] == (f"{subject_id}.json",)
    return len(parts) > 1 and parts[0] in _FOLDERS and parts[1] == subject_id


def _sort(entry: Mapping[str, Any], subject_id: str, mine: set[str], others: set[str]) -> None:
    for item in _items(entry):
        if md5 := item.get("md5"):
            (mine if _names(item, subject_id) else others).add(str(md5))


def _content(oids: set[str], places: list[_Place], left: dict[str, str]) -> set[str]:
    """Return the files of the folders among some objects."""
    return {md5 for oid in oids if oid.endswith(".dir") for md5 in _files_of(oid, places, left)}


def _files_of(oid: str, places: list[_Place], left: dict[str, str]) -> list[str]:
    for place in places:
        if place.name in left:
            continue
        with _noted(place, left):
            if not place.fs.exists(path := place.odb.oid_to_path(oid)):
                continue
            with place.fs.open(path, "rb") as file:
                text = file.read()
            try:
                return [str(entry["md5"]) for entry in json.loads(text)]
            except (ValueError, KeyError, TypeError):
                left[oid] = f"files that only {oid} lists, which is torn in DVC's {place.name}"
    return []


def _may_have(place: _Place, oid: str, left: dict[str, str]) -> bool:
    """Tell whether a place has an object; one that does not answer may have it."""
    if place.name not in left:
        with _noted(place, left):
            return bool(place.fs.exists(place.odb.oid_to_path(oid)))
    return True


def _remove(fs: Any, path: str) -> None:
    if fs.exists(path):
        fs.remove(path)

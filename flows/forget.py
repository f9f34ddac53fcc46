"""Erase a subject wherever this project can reach; what it cannot is said. An interrupted one is taken up again."""

import json
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from dreambooth import erasure, sweeps, versions
from dreambooth.errors import SubjectError
from dreambooth.folders import GENERATION, PLACES, leftovers, scratch_folder, scratch_of, sha256_of_file, write_file
from dreambooth.locks import AlreadyRunningError, locks_of, only_one_of
from dreambooth.params import ID_PATTERN, RESERVED_IDS, check_id, names_id
from dreambooth.pointer import LAID_OUT
from dreambooth.registry import alone
from dreambooth.tracking import PENDING, unsent
from dreambooth.yaml12 import dump_yaml
from flows import dvcstore, prefectstore, summary
from flows.check import CHECKED
from flows.copies import Copy, copies
from flows.dvcstore import Kept, being_written
from flows.entries import UnreadError, forget_entry, plain_params
from flows.experiments import experiments_of, has_commits, others_with
from flows.experiments import remove as remove_experiments
from flows.project import PARAMS

FOLDERS = ("data/subjects/{id}", "build/{id}", "models/{id}", "export/{id}", "reports/{id}")
FILES = ("data/subjects/{id}.dvc", "metrics/{id}.json")
JOURNAL = "forget-{id}.json"  # in the scratch folder
TEXTS = (PARAMS, "dvc.lock")  # which name subjects
OUT_OF_REACH = (
    "photos that dvc add or dvc repro by hand put into DVC's cache, where others took their place before a commit (dvc "
    "gc --all-commits removes what no commit names)",
    "thumbnails of photos that the subject does not have (now), until dreambooth check looks at the next folder",
    "pictures drawn to a folder of your own (dreambooth generate --out, folder of the flow generate)",
    "clones, backups, and copies of exports, pictures and cards that left this machine",
    "runs in Weights & Biases, where tracking.report_to named it: delete them there",
    "caches of DVC in other clones: there, dreambooth forget as well",
)


@dataclass
class Inventory:
    """All that is known of a subject."""

    subject_id: str
    paths: list[Path]
    kept: Kept
    places: dict[str, int]
    shared: list[Path] = field(default_factory=list)
    """What is the subject's in folders of the scratch folder that all subjects share."""
    experiments: dict[str, str] = field(default_factory=dict)
    """Commits of sweeps, by their refs."""
    idle_class: str | None = None
    """The class of the subject, if nobody else is of it."""
    out_of_reach: list[str] = field(default_factory=list)


def inventory(root: Path, subject_id: str) -> Inventory:
    """List what there is of a subject, and what an interrupted erasure has left to do.

    Raises:
        SubjectError: nothing is known of it.
        PipelineError: dvc.lock, or a file of DVC beside photos, is no YAML.
    """
    check_id(subject_id)
    paths = sorted(_paths(root, subject_id))
    experiments = experiments_of(root, subject_id)
    kept = dvcstore.kept_of(root, subject_id) if (root / ".dvc").is_dir() else Kept()
    journal, before = _read_journal(root, subject_id)
    kept = Kept(kept.objects | journal.objects, kept.runs | journal.runs, kept.left)
    held = erasure.holdings(root, subject_id)
    shared = [*_thumbnails(root, subject_id), *_pipelines(root, subject_id, held.exports)]
    copies_left = _left_copies(root)
    places = {
        "files and folders": sum(1 for path in [*paths, *shared] for _ in _files(path)),
        "copies of the project that killed runs left": sum(_knows(copy.project, subject_id) for copy in copies_left),
        "entries of params.yaml, dvc.lock": _mentions(root, subject_id),
        "experiments of sweeps": len(set(experiments.values())),
        "objects of DVC (cache and remotes)": len(kept.objects),
        "entries of the run cache": len(kept.runs),
        "versions in MLflow": len(held.versions),
        "entries of the log of promotions": held.log_entries,
        "uploads in MLflow": len(held.models),
        "runs in MLflow": len(held.runs),
        "flow runs in Prefect": prefectstore.count(subject_id),
    }
    places = {place: max(count, before.get(place, 0)) for place, count in places.items()}  # the receipt tells both
    if not any(places.values()) and not _journal(root, subject_id).exists():
        raise SubjectError(f"nothing is known of {subject_id!r} here; see {PARAMS} for the subjects there are")
    left = [*_left_in_git(root, subject_id, experiments), *OUT_OF_REACH, *kept.left]
    return Inventory(subject_id, paths, kept, places, shared, experiments, _idle_class(root, subject_id), left)


def erase(root: Path, found: Inventory, say: Callable[[str], object]) -> Path:
    """Erase all of it, what is elsewhere first, so that an interruption loses no trace; return the receipt.

    Args:
        root: of the project.
        found: by `inventory`.
        say: hears of another process that is waited for.

    Raises:
        AlreadyRunningError: a stage of the subject is computing, and would write again what is erased.
    """
    subject_id = found.subject_id
    training = only_one_of(root, "train", subject_id, f"the training of {subject_id}")
    with training, alone(root, subject_id, say):
        _refuse_beside_stages(root, subject_id)
        _refuse_beside_copies(root, subject_id)
        _write_journal(root, found)
        parcels = [path for path in found.paths if path.is_relative_to(unsent(root))]  # others would send them
        for path in [*parcels, *found.shared]:  # first: what tells whose they are, photos and versions, goes as well
            _remove(path)
        remove_experiments(root, found.experiments.items())  # before the tables that name them
        found.out_of_reach += erasure.erase(root, subject_id)
        found.out_of_reach += prefectstore.erase(subject_id)
        if (root / ".dvc").is_dir():
            left = dvcstore.erase(root, found.kept)
            found.out_of_reach += [line for line in left if line not in found.out_of_reach]
        for path in [*found.paths, *(copy.folder for copy in _left_copies(root))]:
            _remove(path)
        _forget_in_lock(root, subject_id)
        _forget_in_gitignore(root, subject_id)
        found.out_of_reach += forget_entry(root, subject_id)
        summary.write_index(root, versions.in_words(root, _others(root)))
        if (root / ".dvc").is_dir():
            dvcstore.forget_names(root)
        receipt = _write_receipt(root, found)
    for path in [*_paths(root, subject_id), *locks_of(root, subject_id)]:  # those of this erasure too
        _remove(path)
    _journal(root, subject_id).unlink(missing_ok=True)
    return receipt


def interrupted(root: Path) -> list[str]:
    """Return the subjects whose erasure was begun and is not done."""
    before, after = JOURNAL.split("{id}")
    journals = scratch_folder(root).glob(JOURNAL.format(id="*"))
    return sorted(path.name.removeprefix(before).removesuffix(after) for path in journals)


def _left_in_git(root: Path, subject_id: str, experiments: Collection[str]) -> Iterator[str]:
    """Say what old commits keep, and which experiments do that are not those of the subject's sweeps."""
    photos = "photos themselves" if has_commits(root, f"data/subjects/{subject_id}") else "photos' hashes"
    yield (
        f"the history of git: the {photos} and the subject's id stand in old commits (git filter-repo), and in those "
        "of removed experiments until git gc --prune=now"
    )
    if names := others_with(root, subject_id, experiments):
        yield f"experiments of dvc exp run, which hold work of other subjects as well: dvc exp remove {' '.join(names)}"


def _idle_class(root: Path, subject_id: str) -> str | None:
    """Return the class that nobody will be of without a subject: `dvc repro` would go on drawing images of it."""
    try:
        subjects = plain_params(root)["subjects"]
    except UnreadError:
        return None
    classes = {name: entry.get("class_id") for name, entry in subjects.items() if isinstance(entry, dict)}
    own = classes.pop(subject_id, None)
    return own if isinstance(own, str) and own not in classes.values() else None


def _paths(root: Path, subject_id: str) -> Iterator[Path]:
    for pattern in (*FOLDERS, *FILES):
        path = root / pattern.format(id=subject_id)
        if path.exists() or path.is_symlink():
            yield path
    for place in PLACES:
        yield from leftovers(root / place, subject_id)
    yield from scratch_of(root, subject_id)
    for table in sweeps.tables(root):
        if sweeps.is_about(table, subject_id):
            beside = (table, table.with_suffix(".png"), scratch_folder(root) / f"{table.stem}.log")
            yield from (path for path in beside if path.exists())
    for parcel in unsent(root).glob(f"*/{PENDING}"):
        content = json.loads(parcel.read_text(encoding="utf-8"))
        if subject_id in (content.get("name"), content.get("tags", {}).get("subject")):
            yield parcel.parent


def _thumbnails(root: Path, subject_id: str) -> Iterator[Path]:
    """Yield the thumbnails of folders that were checked which show photos of the subject: each names its photo.

    Those that name none, of an older version or torn, go with them: whom they show is not known, and they are
    drawn again by the next check.
    """
    thumbnails = sorted((scratch_folder(root) / CHECKED).glob("*.png"))
    photos = {sha256_of_file(path) for path in _photos(root, subject_id)} if thumbnails else set()
    if photos:
        yield from (path for path in thumbnails if _photo_of(path) in {None, *photos})


def _photo_of(thumbnail: Path) -> str | None:
    from dreambooth.images import read_provenance

    try:
        return read_provenance(thumbnail.read_bytes()).get("photo")
    except OSError:  # torn: no picture
        return None


def _photos(root: Path, subject_id: str) -> Iterator[Path]:
    folder = root / "data" / "subjects" / subject_id
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_file())


def _pipelines(root: Path, subject_id: str, exports: Collection[str]) -> Iterator[Path]:
    """Yield what was laid out to be served of versions of the subject: named by their exports, or saying whose it is.

    Another subject's may be in use by a server.
    """
    for place in sorted((scratch_folder(root) / LAID_OUT).glob("*")):
        name = place.name.removesuffix(".lock")
        if name in exports or (place.is_dir() and _subject_of(place) == subject_id):
            yield place


def _subject_of(pipeline: Path) -> str | None:
    try:
        content = json.loads((pipeline / GENERATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a link to what DVC has no more
        return None
    return content.get("subject") if isinstance(content, dict) else None


def _refuse_beside_stages(root: Path, subject_id: str) -> None:
    """Refuse while DVC writes what a stage of the subject makes; one that died left its name and no process."""
    try:
        written_by = being_written(root)
    except json.JSONDecodeError:  # by a crash: who wrote is unknown, and gone
        return
    place = root.resolve()  # as DVC writes it
    for written, pid in written_by.items():
        inside = written.parts[len(place.parts) :] if written.is_relative_to(place) else ()
        if subject_id in inside[:3] and psutil.pid_exists(pid):
            raise AlreadyRunningError(f"{written} is being computed: pid {pid}; wait for it, or stop it")


def _refuse_beside_copies(root: Path, subject_id: str) -> None:
    """Refuse while a run or a sweep works with what is the subject's in a copy of the project."""
    for copy in copies(root):
        if copy.user and any((copy.project / folder.format(id=subject_id)).exists() for folder in FOLDERS):
            raise AlreadyRunningError(f"{copy.project} has files of {subject_id} and is in use: {copy.user}")


def _left_copies(root: Path) -> list[Copy]:
    """Return the copies that killed runs and sweeps left; all go, whoever's: nobody continues in one."""
    return [copy for copy in copies(root) if not copy.user]


def _knows(project: Path, subject_id: str) -> bool:
    """Tell whether a copy of the project has a file, a folder or an entry of a subject."""
    if any((project / place.format(id=subject_id)).exists() for place in (*FOLDERS, *FILES)):
        return True
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in project.glob("*") if path.name in TEXTS]
    return any(names_id(text, subject_id) for text in texts)


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        yield from (one for one in path.rglob("*") if one.is_file())
    else:
        yield path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mentions(root: Path, subject_id: str) -> int:
    try:
        in_params = subject_id in plain_params(root)["subjects"]
    except UnreadError:
        in_params = names_id((root / PARAMS).read_text(encoding="utf-8", errors="replace"), subject_id)
    return int(in_params) + len(_stages(_lock(root), subject_id))


def _others(root: Path) -> list[str]:
    """Return the subjects that there still are: of params.yaml, or those with a report where that tells nothing."""
    try:
        names = list(plain_params(root)["subjects"])
    except UnreadError:
        names = [path.parent.name for path in (root / "reports").glob("*/report.json")]
    return [str(name) for name in names if re.fullmatch(ID_PATTERN, str(name)) and name not in RESERVED_IDS]


def _lock(root: Path) -> dict[str, Any]:
    """Return dvc.lock; nothing where there is none, or it has no stage."""
    file = root / "dvc.lock"
    content = dvcstore.read_dvc_file(file) if file.is_file() else None
    return content if isinstance(content, dict) and isinstance(content.get("stages"), dict) else {}


def _stages(lock: Mapping[str, Any], subject_id: str) -> list[str]:
    """Return the stages of a subject in dvc.lock."""
    return [
        name for name in lock.get("stages", ()) if name.endswith(f"@{subject_id}") and not name.startswith("prior@")
    ]


def _forget_in_lock(root: Path, subject_id: str) -> None:
    content = _lock(root)
    if not (gone := _stages(content, subject_id)):
        return
    content["stages"] = {name: entry for name, entry in content["stages"].items() if name not in gone}
    write_file(root / "dvc.lock", dump_yaml(content).encode())


def _forget_in_gitignore(root: Path, subject_id: str) -> None:
    """Take the line out that DVC wrote where the photos lay."""
    path = root / "data" / "subjects" / ".gitignore"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_file(path, "".join(line for line in lines if line.strip() != f"/{subject_id}").encode())


def _journal(root: Path, subject_id: str) -> Path:
    return scratch_folder(root) / JOURNAL.format(id=subject_id)


def _write_journal(root: Path, found: Inventory) -> None:
    """Note what only dvc.lock and the run cache tell, and all counts: an interrupted erasure finds them here."""
    content = {"objects": sorted(found.kept.objects), "runs": sorted(found.kept.runs), "places": found.places}
    write_file(_journal(root, found.subject_id), json.dumps(content).encode())


def _read_journal(root: Path, subject_id: str) -> tuple[Kept, dict[str, int]]:
    try:
        content = json.loads(_journal(root, subject_id).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Kept(), {}
    return Kept(set(content["objects"]), set(content["runs"])), content.get("places", {})


def _write_receipt(root: Path, found: Inventory) -> Path:
    """Write what was erased, how much and when, and what was out of reach; neither who nor any hash of it."""
    now = datetime.now(UTC)
    number = secrets.token_hex(4)
    known = found.subject_id
    # Wider than `names_id`: here a letter too many is hidden rather than the id shown in a name like clone_rex.
    left = [re.sub(rf"(?<![a-z0-9-]){re.escape(known)}(?![a-z0-9-])", "ID", line) for line in found.out_of_reach]
    content = {
        "receipt": number, "erased": found.places, "time": now.isoformat(timespec="seconds"), "out_of_reach": left,
    }  # fmt: skip
    path = root / "receipts" / f"{now:%Y-%m-%d}-{number}.json"
    path.parent.mkdir(exist_ok=True)
    write_file(path, json.dumps(content, indent=1).encode() + b"\n")
    return path

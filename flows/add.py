"""Add a subject to a project: its photos to data/subjects/<id>, its entries to params.yaml; all of it or nothing."""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth.consent import PERSON, RECORD, read_consent, require_lasting
from dreambooth.errors import ConsentError, ParamsError, PhotosError, PipelineError, SubjectError, shown
from dreambooth.folders import read_text
from dreambooth.identifiers import reader_at
from dreambooth.params import Params, Photos, check_id, load_params, parse_params
from dreambooth.photos import (
    CAPTION_SUFFIX,
    FOREIGN_SUFFIXES,
    PHOTO_SUFFIXES,
    PhotoReport,
    alike,
    check_photos,
    find_photos,
    require_bounded,
    require_usable,
)
from dreambooth.prompts import read_caption
from dreambooth.yaml12 import dump_yaml
from flows.commandline import DVC, last_words, run_quietly
from flows.dvcstore import note_photos
from flows.generate import slug
from flows.preflight import cut_captions, poor_identifiers, tokenizer_folder, unknown_nouns
from flows.project import PARAMS, means, read_params_text, write_params_text

IDENTIFIER, KIND = "sks", "object"  # of a new subject of which nothing else is said
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_MADE_AGAIN = (".DS_Store", "Thumbs.db", "desktop.ini")  # by systems that show folders


@dataclass(frozen=True)
class Wish:
    """What a person says about a new subject."""

    subject_id: str
    class_noun: str
    identifier: str | None = None
    """None: as its entry in params.yaml says, IDENTIFIER for a new subject."""
    kind: str | None = None
    """None: as its entry says, KIND for a new subject."""
    consent: Path | None = None
    """The record of a person's consent; it is kept beside the photos."""


@dataclass(frozen=True)
class Added:
    """What was done."""

    folder: Path
    class_id: str
    reports: list[PhotoReport]
    ignored: list[str]
    remarks: list[str]
    """Warnings about the photos together and the identifier."""
    assumed_kind: bool = False
    """Whether nobody said the kind."""


def add_subject(root: Path, wish: Wish, sources: Sequence[Path], force: bool = False) -> Added:
    """Copy and check the photos, then write params.yaml; a refusal leaves everything as it was.

    Args:
        root: the project.
        wish: who the subject is.
        sources: photos, and folders with photos.
        force: replace the photos of a subject of the same id; its entry must say what the wish says.

    Raises:
        SubjectError: the id is no id, or is taken; or what would be replaced holds more than photos.
        PhotosError: photos that cannot be used, or too few of them.
        ParamsError: the entry would not be valid, or params.yaml is not.
    """
    params = load_params(root / PARAMS)
    folder = root / "data" / "subjects" / check_id(wish.subject_id)
    if not force:
        _require_new(params, wish.subject_id, folder)
    assumed_kind = wish.kind is None and wish.subject_id not in params.subjects
    class_id = class_of_noun(params, wish.class_noun)
    entry = entry_of(params, wish, class_id)
    _require_replaceable(folder, entry["kind"])
    text = with_subject(read_params_text(root), params, wish, class_id)
    photos, ignored = collect(sources)
    cut = _cut_captions(root, params, photos, entry["identifier"], wish.class_noun)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{wish.subject_id}.", dir=folder.parent) as temporary:
        place = Path(temporary) / "photos"
        reports = _copy_and_check(photos, place, _named(sources, ignored), params.photos)
        if entry["kind"] == PERSON:
            _copy_consent(wish, place)
        with _replaced(folder, Path(temporary) / "old"):
            place.rename(folder)
            write_params_text(root, text)
    remarks = [str(remark)] if (remark := alike(reports, params.photos)) else []
    remarks += cut
    remarks += poor_identifiers(root, params, [entry["identifier"]], [wish.class_noun])
    remarks += unknown_nouns(root, params, [wish.class_noun])
    return Added(folder, class_id, reports, ignored, remarks, assumed_kind)


def collect(sources: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the photos that the sources name, and the names that are passed over.

    Raises:
        PhotosError: with every source that does not exist, or the archives where nothing else was named.
    """
    missing = [f"{source} does not exist; name photos, or folders with photos" for source in sources if not _is(source)]
    if missing:
        raise PhotosError(missing)
    photos: list[Path] = []
    ignored: list[str] = []
    for source in sources:
        if source.is_dir():
            found = find_photos(source)
            photos += found.photos
            ignored += found.ignored
        elif source.suffix.lower() in PHOTO_SUFFIXES | FOREIGN_SUFFIXES and not source.name.startswith("."):
            photos.append(source)
        else:
            ignored.append(source.name)
    packed = [source for source in sources if source.name.lower().endswith(_ARCHIVES)]
    if packed and not photos:
        raise PhotosError(
            [f"{shown(one)} is an archive; unpack it, and name the folder with the photos" for one in packed]
        )
    captions = {photo.with_suffix(CAPTION_SUFFIX).name for photo in photos}
    return photos, [name for name in ignored if name not in captions]


def new_names(photos: Sequence[Path]) -> list[str]:
    """Return a name for each photo: its own if it is safe and free, else a number, 07.jpg.

    No two have a stem in common, by which a caption finds its photo; but those that share their caption already.
    """
    names: list[str] = []
    taken: set[str] = set()
    owners: dict[str, Path] = {}
    for number, photo in enumerate(photos):
        name, own = photo.name, photo.with_suffix("")
        while (
            not _SAFE_NAME.fullmatch(name) or name.lower() in taken or owners.get(Path(name).stem.lower(), own) != own
        ):
            name = f"{number:02d}{photo.suffix.lower()}"
            number += len(photos)
        taken.add(name.lower())
        owners[Path(name).stem.lower()] = own
        names.append(name)
    return names


def class_of_noun(params: Params, class_noun: str) -> str:
    """Return the id of the class with this noun, or a free one made of the noun."""
    known = {one.class_noun.casefold(): class_id for class_id, one in params.classes.items()}
    if class_noun.casefold() in known:
        return known[class_noun.casefold()]
    wanted = slug(class_noun, 36) or "class"
    number, class_id = 1, wanted
    while class_id in params.classes:
        number += 1
        class_id = f"{wanted}-{number}"
    return class_id


def entry_of(params: Params, wish: Wish, class_id: str) -> dict[str, str]:
    """Return the entry that a wish means: what it leaves out is as in params.yaml, or the usual for a new subject."""
    before = params.subjects.get(wish.subject_id)
    identifier, kind = (before.identifier, before.kind) if before else (IDENTIFIER, KIND)
    return {"class_id": class_id, "identifier": wish.identifier or identifier, "kind": wish.kind or kind}


def with_subject(text: str, params: Params, wish: Wish, class_id: str) -> str:
    """Return params.yaml with the new entries, every other byte as it was.

    Raises:
        ParamsError: the result is not valid, or the file is written in a way that lines cannot be added to.
    """
    wanted, entry = params.model_dump(mode="json"), entry_of(params, wish, class_id)
    if contradictions := list(_contradictions(params, wish, entry)):
        raise ParamsError(contradictions)
    if class_id not in wanted["classes"]:
        wanted["classes"][class_id] = {"class_noun": wish.class_noun}
        text = _insert(text, "classes", class_id, wanted["classes"][class_id])
    if wish.subject_id not in wanted["subjects"]:
        wanted["subjects"][wish.subject_id] = entry
        text = _insert(text, "subjects", wish.subject_id, entry)
    checked = parse_params(wanted)
    if not means(text, checked):
        lines = dump_yaml({"subjects": {wish.subject_id: entry}}, flow=True).strip()
        raise ParamsError([f"{PARAMS}: lines cannot be added to `classes:` and `subjects:`; add by hand: {lines}"])
    return text


def _contradictions(params: Params, wish: Wish, entry: Mapping[str, str]) -> Iterator[str]:
    """Yield what a wish says otherwise than the entry of a subject that is there."""
    if wish.subject_id not in params.subjects:
        return
    subject, class_noun = params.subject(wish.subject_id), params.class_of(wish.subject_id).class_noun
    where = f"{PARAMS}: subjects.{wish.subject_id}"
    if subject.class_id != entry["class_id"]:
        shared = entry["class_id"] in params.classes or _others_of_class(params, wish.subject_id)
        wrong = f"subjects.{wish.subject_id}.class_id" if shared else f"classes.{subject.class_id}.class_noun"
        yield (
            f"{where}: its class noun is {class_noun}, not {wish.class_noun}; say --class-noun {class_noun!r}, or "
            f"if that is wrong, change {wrong} there"
        )
    for key, before in (("identifier", subject.identifier), ("kind", subject.kind)):
        if before != entry[key]:
            yield f"{where}.{key}: is {before}, not {entry[key]}; change it there, or leave --{key} out"


def _others_of_class(params: Params, subject_id: str) -> list[str]:
    """Return the other subjects of a subject's class."""
    class_id = params.subject(subject_id).class_id
    return [name for name, one in params.subjects.items() if one.class_id == class_id and name != subject_id]


def track_photos(root: Path, folder: Path) -> str | None:
    """Put photos under the care of DVC; return why that was not possible, None if it was."""
    name = folder.relative_to(root).as_posix()
    if not (root / ".dvc").is_dir():
        return f"{root} has no .dvc folder, so the photos have no versions; dvc init, then dvc add {name}"
    note_photos(root, f"{name}.dvc")
    done = run_quietly([*DVC, "--wait-for-lock", "add", name], root)  # not --quiet: it would say no error either
    note_photos(root, f"{name}.dvc")
    if done.returncode == 0:
        return None
    said = last_words(done)
    if "is not a git repository" in said:
        return f"the photos have no versions: {root} is no git repository; git init, then dvc add {name}"
    return f"the photos have no versions: {said}; then: dvc add {name}"


def files_for_git(root: Path, folder: Path) -> list[Path]:
    """Return what git should be given of a subject whose photos DVC has; nothing where there is no git."""
    ignored = folder.parent / ".gitignore"  # which DVC writes beside a repository alone
    return [root / PARAMS, ignored, folder.with_name(f"{folder.name}.dvc")] if ignored.is_file() else []


def _is(source: Path) -> bool:
    return source.is_dir() or source.is_file()


def _require_new(params: Params, subject_id: str, folder: Path) -> None:
    if subject_id in params.subjects:
        raise SubjectError(
            f"the subject {subject_id!r} is there already; put more photos into {folder}, "
            f"then: dreambooth run {subject_id}; or replace it: --force"
        )
    if folder.exists():
        raise SubjectError(
            f"{folder} is there already, but {PARAMS} has no subject {subject_id!r}; "
            f"add the folder itself with --force: dreambooth add {subject_id} {folder} --class-noun NOUN --force"
        )


def _require_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace a folder that holds what is no photo: it would be gone with the old photos.

    Captions go with their photos, and the consent of a person is given anew.
    """
    if not folder.is_dir() or folder.is_symlink():
        return
    others = [name for name in find_photos(folder).ignored if name not in _MADE_AGAIN]
    if lost := [name for name in others if not (kind == PERSON and name == RECORD)]:
        told = ", ".join(map(shown, lost[:5])) + (" ..." if len(lost) > 5 else "")
        raise SubjectError(f"{folder} holds what is no photo and would be lost: {told}; move it elsewhere first")


def _named(sources: Sequence[Path], ignored: Sequence[str]) -> str:
    """Say what the user named, and what of it is no photo."""
    told = ", ".join(shown(source) for source in sources[:3]) + (" ..." if len(sources) > 3 else "")
    return told + (f" (passed over: {', '.join(map(shown, ignored[:5]))})" if ignored else "")


def _cut_captions(root: Path, params: Params, photos: Sequence[Path], identifier: str, class_noun: str) -> list[str]:
    """Refuse captions of which the base would read no subject; return what is to be said of those it reads in part."""
    captions = [caption for photo in photos if (caption := photo.with_suffix(CAPTION_SUFFIX)).is_file()]
    reader = reader_at(tokenizer_folder(root, params.base)) if captions else None
    return cut_captions(params, captions, identifier, class_noun, reader) if reader else []


def _copy_and_check(photos: Sequence[Path], place: Path, named: str, limits: Photos) -> list[PhotoReport]:
    require_bounded(photos, named, limits)
    place.mkdir()
    given = dict(zip(new_names(photos), photos, strict=True))
    for name, photo in given.items():
        shutil.copyfile(photo, place / name)
        if (caption := photo.with_suffix(CAPTION_SUFFIX)).is_file():
            read_caption(caption)
            shutil.copyfile(caption, (place / name).with_suffix(CAPTION_SUFFIX))
    reports = check_photos(place, limits)
    # A message names the files where the user has them, not their copies that are gone by then.
    located = [replace(report, file=str(given[report.file].absolute())) for report in reports]
    require_usable(located, named, limits)
    return [
        replace(report, file=given[report.file].name, duplicate_of=twin and given[twin].name)
        for report in reports
        for twin in [report.duplicate_of]
    ]


def _copy_consent(wish: Wish, place: Path) -> None:
    """Put the record of a person's consent beside the photos, after it was found to hold today."""
    if wish.consent is None:
        raise ConsentError(
            f"{wish.subject_id} is a person: the photos are used only with a consent that says who, given, purpose and "
            f"until; name its file: --consent {RECORD}"
        )
    try:
        (place / RECORD).write_bytes(read_text(wish.consent).encode())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "no UTF-8")
        raise ConsentError(f"{wish.consent} cannot be read ({reason}); write a {RECORD}") from None
    consent = read_consent(wish.consent)
    assert consent is not None
    require_lasting(consent, wish.subject_id)


@contextmanager
def _replaced(folder: Path, aside: Path) -> Iterator[None]:
    """Put a folder aside while another takes its place, and back if that fails."""
    existed = folder.exists()
    if existed:
        folder.rename(aside)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            aside.rename(folder)
        raise


def _insert(text: str, section: str, key: str, entry: dict[str, str]) -> str:
    """Return the text with an entry at the end of a top-level section, after its last line that says something."""
    lines = text.splitlines(keepends=True)
    start = next((number for number, line in enumerate(lines) if re.match(rf"{section}\s*:", line)), None)
    if start is None:
        raise PipelineError(f"{PARAMS} has no line `{section}:`; add it")
    last, indent = start, "  "
    for number in range(start + 1, len(lines)):
        line = lines[number]
        if line.strip() and not line.startswith((" ", "#")):
            break
        if line.startswith(" ") and not line.lstrip().startswith("#"):
            indent = indent if last > start else line[: len(line) - len(line.lstrip())]
            last = number
    lines[start] = re.sub(r":\s*(\{\s*\}|null|~)", ":", lines[start])
    if not lines[last].endswith("\n"):
        lines[last] += "\n"
    block = dump_yaml({key: entry})
    end = "\r\n" if lines[start].endswith("\r\n") else "\n"
    indented = "".join(f"{indent}{line}{end}" for line in block.splitlines())
    return "".join([*lines[: last + 1], indented, *lines[last + 1 :]])

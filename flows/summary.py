"""Turn what lies on disk about a subject into the rows, the markdown and the picture that people read."""

import csv
import html
import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth.errors import DreamboothError
from dreambooth.folders import hash_of_files, read_manifest
from dreambooth.intervals import over_prompts
from dreambooth.params import Params

if TYPE_CHECKING:
    from dreambooth.beside import Beside

EARLIER = "of the run before"
LARGEST_PICTURE = 500_000  # bytes of PNG in an artifact of Prefect, which keeps it in its database


@dataclass(frozen=True)
class Identity:
    """How alike the pictures and the photos are: cosine similarities, see dreambooth/fidelity.py."""

    base: float
    """Of the pictures of the untouched model: the floor."""
    personalised: float
    gain: float
    low: float
    """Ends of the interval of the gain."""
    high: float
    ceiling: float
    """Of the photos among themselves."""
    prompts: int
    """That count for it."""


@dataclass(frozen=True)
class Summary:
    """What there is of one subject."""

    subject_id: str
    class_id: str
    identifier: str
    class_noun: str
    photos: int
    identity: Identity | None
    grid: Path | None
    verdict: str | None
    """Of the gate, with its reason."""
    report: Path | None
    """The page with the pictures."""
    undone: Collection[str] = ()
    """Entries of stages that have not come to their end: what they left is of an earlier run."""


def read_summary(root: Path, params: Params, subject_id: str, undone: Collection[str] = ()) -> Summary:
    """Read what the stages have left; what is missing is None."""
    subject = params.subject(subject_id)
    grid = root / "build" / subject_id / "evaluation" / "grid.png"
    page = root / "reports" / subject_id / "index.html"
    return Summary(
        subject_id,
        subject.class_id,
        subject.identifier,
        params.class_of(subject_id).class_noun,
        count_photos(root, subject_id),
        read_identity(root / "metrics" / f"{subject_id}.json"),
        grid if grid.is_file() else None,
        read_verdict(root / "reports" / subject_id / "report.json"),
        page if page.is_file() else None,
        undone,
    )


def read_identity(path: Path) -> Identity | None:
    """Read the identity scores of metrics/<subject>.json; None before the first evaluation."""
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        scores = {name: float(metrics["identity"][name]) for name in Identity.__dataclass_fields__ if name != "prompts"}
        return Identity(**scores, prompts=int(metrics["prompts"]))
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def read_verdict(path: Path) -> str | None:
    """Read the line of the gate in reports/<subject>/report.json; None before the first report."""
    try:
        line: str = json.loads(path.read_text(encoding="utf-8"))["decision"]["line"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None
    return line


def read_prompts(root: Path, subject_id: str) -> list[dict[str, str]]:
    """Return the rows of reports/<subject>/prompts.csv, empty before the first report."""
    path = root / "reports" / subject_id / "prompts.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_index(root: Path, versions: Mapping[str, str]) -> None:
    """Write reports/index.html over the reports that there are, with the registered versions of each in words."""
    from dreambooth import pages

    if (root / "reports").is_dir():
        pages.write_index(root / "reports", versions)


def refresh_index(root: Path, subjects: Iterable[str], warn: Callable[[str], object]) -> None:
    """Write reports/index.html with the versions of now; what goes wrong is told: the page is worth less than the run.

    Args:
        root: of the project.
        subjects: all of params.yaml.
        warn: is told in a line.
    """
    from dreambooth import versions

    if not (root / "reports").is_dir():  # then the registry is not asked
        return
    words = dict.fromkeys(subjects, "")
    try:
        words = versions.in_words(root, words)
    except DreamboothError as error:
        warn(f"{error.code}: {error}")
    try:
        write_index(root, words)
    except (DreamboothError, OSError, ValueError, KeyError, TypeError) as error:  # no room, or a damaged report.json
        warn(f"reports/index.html stays as it was: {type(error).__name__}: {error}")


def count_photos(root: Path, subject_id: str) -> int:
    """Count what look like photos in data/subjects/<subject>."""
    from dreambooth.photos import find_photos

    folder = root / "data" / "subjects" / subject_id
    return len(find_photos(folder).photos) if folder.is_dir() else 0


def prior_line(root: Path, class_id: str) -> str:
    """Say how many class images lie ready, in the words of the prior stage."""
    files = _manifest_files(root / "build" / "classes" / class_id)
    return f"prior {class_id}: {sum(name.endswith('.png') for name in files)} reused, 0 generated"


def export_hash(root: Path, subject_id: str) -> str | None:
    """Return the content hash of export/<subject> by its manifest alone: DVC has just compared the files."""
    files = _manifest_files(root / "export" / subject_id)
    return hash_of_files(files) if files else None


def rows(summary: Summary) -> list[tuple[str, str]]:
    """Return label and value of all that is known, for a table."""
    found = [
        ("subject", f"{summary.subject_id}: {summary.identifier} {summary.class_noun}"),
        ("photos", str(summary.photos)),
    ]
    if identity := summary.identity:
        found += [("scores", EARLIER)] if "evaluate" in summary.undone else []
        found += [
            ("identity", f"{identity.base:.3f} (base) -> {identity.personalised:.3f} (personalised)"),
            ("gain", f"{over_prompts(asdict(identity), identity.prompts)} over {identity.prompts} prompts"),
            ("floor / ceiling", f"{identity.base:.3f} (base) / {identity.ceiling:.3f} (photos among themselves)"),
        ]
    if summary.verdict:
        found.append(("verdict", f"{EARLIER}: {summary.verdict}" if "report" in summary.undone else summary.verdict))
    return found


def markdown_beside(beside: "Beside") -> str:
    """Return candidate and champion side by side: the verdict of the gate, their scores, and their pictures as data."""
    from dreambooth.beside import COLUMNS

    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (COLUMNS, *beside.rows)]
    lines.insert(1, f"|---{'|---:' * (len(COLUMNS) - 1)}|")
    sheet = [f"![{_cell(beside.title)}]({png_uri(beside.sheet)})"] if beside.sheet else []
    title, line, note = map(_cell, (beside.title, beside.line, beside.note))
    return "\n\n".join([f"## {title}", f"The gate: {line}", "\n".join(lines), note, *sheet])


def markdown(summary: Summary, more: list[tuple[str, str]]) -> str:
    """Return a table, with the pictures and curves of the report inside it as data: Prefect keeps no files."""
    lines = [f"| {_cell(label)} | {_cell(value)} |" for label, value in [*rows(summary), *more]]
    curves = [summary.report.with_name(name) for name in ("tradeoff.png", "loss.png")] if summary.report else []
    pictures = [path for path in (summary.grid, *curves) if path is not None and path.is_file()]
    shown = [f"\n\n![{path.stem} of {summary.subject_id}]({picture_uri(path)})" for path in pictures]
    return "\n".join(["| | |", "|---|---|", *lines]) + "".join(shown)


def picture_uri(path: Path) -> str:
    """Return the PNG of a file as a data URI, halved until it is small enough."""
    return png_uri(path.read_bytes())


def png_uri(content: bytes) -> str:
    """Return a PNG as a data URI, halved until it has at most LARGEST_PICTURE bytes."""
    from PIL import Image

    from dreambooth.pages import data_uri

    while len(content) > LARGEST_PICTURE:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            half = image.convert("RGB").reduce(2)
        buffer = io.BytesIO()
        half.save(buffer, "PNG", optimize=True)
        content = buffer.getvalue()
    return data_uri(content, "png")


def _manifest_files(folder: Path) -> dict[str, Any]:
    try:
        files: dict[str, Any] = read_manifest(folder, verify=False)["files"]
    except DreamboothError:
        return {}
    return files


def _cell(text: str) -> str:
    return html.escape(text).replace("|", "&#124;")

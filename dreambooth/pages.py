"""Pages that hold all they show: every picture is a data: URI, there is no script, and a policy forbids both to come.

Every text is escaped, so that a subject called <script> is a name. It loads neither torch nor a plotting library.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from dreambooth.folders import write_file

TEMPLATES = Path(__file__).parent / "templates"
SMALL = 128  # pixels; a smaller picture is shown with hard pixels, as it is
GAP = "#d0d0d0"  # of a picture that is not there
THUMBNAIL = 256  # pixels; a larger one is shrunk to this


@dataclass(frozen=True)
class Picture:
    """A picture in the page."""

    uri: str
    alt: str
    caption: str = ""
    small: bool = False


def render(template: str, **values: Any) -> str:
    """Fill a template; the policy of the page allows its own style sheet by hash, and nothing else."""
    style = _environment().get_template("report.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = _environment().get_template(template)
    return page.render(style=Markup(style), style_hash=f"sha256-{digest}", **values)


def write_index(reports: Path, versions: Mapping[str, str]) -> None:
    """Write reports/index.html: every subject with a report, its verdict, and its registered versions.

    Args:
        reports: folder with a folder a subject.
        versions: by subject, in words; blank for those of whom nobody knows.
    """
    rows = [
        {
            "link": f"{path.parent.name}/index.html",
            "versions": versions.get(path.parent.name, ""),
            **_in_index(path),
        }
        for path in sorted(reports.glob("*/report.json"))
        if not path.parent.name.startswith(".")  # of a writer that was killed, or has not ended
    ]
    write_file(reports / "index.html", render("index.html", subjects=rows).encode())


def _in_index(path: Path) -> dict[str, str]:
    """Return what a report.json says of its subject: one that is torn, or gone since, stops nobody else."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        identity = told["metrics"]["identity"]
        return {
            "subject": told["title"],
            "line": told["decision"]["line"],
            "identity": f"{identity['base']:.3f} -> {identity['personalised']:.3f}",
        }
    except (OSError, ValueError, KeyError, TypeError):  # as `flows.summary.read_verdict` does
        again = f"its report cannot be read; make it again: dvc repro report@{path.parent.name}"
        return {"subject": path.parent.name, "line": again, "identity": ""}


def picture_of(image: Image.Image, alt: str, caption: str = "") -> Picture:
    """Put a picture into a page: a small one as PNG, a large one as a JPEG of at most THUMBNAIL pixels a side."""
    small = max(image.size) <= SMALL
    buffer, shown = io.BytesIO(), image.convert("RGB")
    if small:
        shown.save(buffer, "PNG", optimize=True)
    else:
        shown.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        shown.save(buffer, "JPEG", quality=85)
    return Picture(data_uri(buffer.getvalue(), "png" if small else "jpeg"), alt, caption, small)


def file_picture(path: Path, alt: str, caption: str) -> Picture:
    """Put the picture of a PNG file into a page; a grey one that says so where it is missing or torn."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return picture_of(image, alt, caption)
    except (OSError, SyntaxError) as error:  # Pillow calls some broken PNG files a SyntaxError
        what = "missing" if isinstance(error, FileNotFoundError) else "torn"
        return picture_of(Image.new("RGB", (SMALL, SMALL), GAP), f"{alt}: {what}", f"{caption}, picture {what}")


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture as a URI that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )

"""Turn the photos of a subject into upright sRGB pictures without metadata, or refuse them before a model is loaded."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dreambooth.errors import shown
from dreambooth.folders import new_folder, sha256_of_file
from dreambooth.images import png_bytes, shrunk
from dreambooth.params import Params
from dreambooth.photos import (
    PhotoFiles,
    PhotoReport,
    Remark,
    alike,
    check_photos,
    find_photos,
    require_usable,
    subject_folder,
)
from dreambooth.prompts import read_caption
from stages.entry import main, say

INPUTS = ("data/subjects/{id}",)
OUTPUTS = ("build/{id}/instance",)
TABLE = "photos.json"


def run(params: Params, subject_id: str, root: Path) -> None:
    """Read data/subjects/<id>/, write build/<id>/instance/: 00.png, 01.png ..., photos.json, manifest."""
    params.subject(subject_id)
    folder, limits = subject_folder(root, subject_id), params.photos
    files = find_photos(folder)
    if files.ignored:
        say(f"validate {subject_id}: passed over, no photos: {', '.join(map(shown, files.ignored))}")
    sources: list[dict[str, Any]] = []
    with new_folder(root / OUTPUTS[0].format(id=subject_id), {"photos": sources}) as target:

        def prepare(report: PhotoReport, image: Image.Image) -> None:
            name = f"{len(sources):02d}.png"
            (target / name).write_bytes(png_bytes(shrunk(image, limits.prepared_side)))
            sources.append({"file": name, "original": report.file})

        reports = check_photos(folder, limits, params.base.resolution, prepare)
        remark = alike(reports, limits)
        _say_warnings(subject_id, reports, remark)
        usable = require_usable(reports, folder.relative_to(root), limits)
        _describe(sources, folder, files)
        table = _table(reports, sources, files.ignored, remark)
        (target / TABLE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    with_caption = sum(source["caption"] is not None for source in sources)
    say(
        f"validate {subject_id}: {len(usable)} photos, {len(reports) - len(usable)} dropped, "
        f"{with_caption} with a caption"
    )


def _say_warnings(subject_id: str, reports: Sequence[PhotoReport], whole: Remark | None) -> None:
    for report in reports:
        remarks = [str(remark) for remark in report.warnings]
        if report.duplicate_of is not None:
            remarks.append(f"is {shown(report.duplicate_of)} again, dropped (W_IMG_DUPLICATE)")
        for remark in remarks:
            say(f"validate {subject_id}: warning: {shown(report.file)}: {remark}")
    if whole is not None:
        say(f"validate {subject_id}: warning: {whole}")


def _describe(sources: list[dict[str, Any]], folder: Path, files: PhotoFiles) -> None:
    """Add to each prepared picture the hash of its photo and its caption."""
    for source in sources:
        source["sha256"] = sha256_of_file(folder / source["original"])
        caption = files.captions.get(source["original"])
        source["caption"] = read_caption(caption) if caption is not None else None


def _table(
    reports: Sequence[PhotoReport], sources: Sequence[Mapping[str, Any]], ignored: Sequence[str], whole: Remark | None
) -> dict[str, Any]:
    """Lay the findings out for programs and for the report: a row a file, with the name of its prepared picture."""
    names = {source["original"]: source["file"] for source in sources}
    rows = [report.as_row() | {"prepared": names.get(report.file)} for report in reports]
    return {"photos": rows, "remarks": [str(whole)] if whole else [], "ignored": list(ignored)}


if __name__ == "__main__":
    main(run)

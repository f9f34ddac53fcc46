"""Turn the photos of a subject into upright sRGB pictures without metadata, or refuse them before a model is loaded."""

import json
from dataclasses import asdict
from pathlib import Path

from dreambooth.folders import new_folder, sha256_of_file
from dreambooth.images import check_photos, find_photos, open_image, png_bytes, require_usable
from dreambooth.params import Params
from dreambooth.prompts import read_caption
from stages.entry import main, say

INPUTS = ("data/subjects/{id}",)
OUTPUTS = ("build/{id}/instance",)


def run(params: Params, subject_id: str, root: Path) -> None:
    """Read data/subjects/<id>/, write build/<id>/instance/: 00.png, 01.png ..., photos.json, manifest."""
    params.subject(subject_id)
    folder = root / INPUTS[0].format(id=subject_id)
    files = find_photos(folder)
    if files.ignored:
        say(f"validate {subject_id}: passed over, no photos: {', '.join(files.ignored)}")
    reports = check_photos(folder, params.photos)
    for report in reports:
        for remark in report.warnings + ([f"is {report.duplicate_of} again, dropped"] if report.duplicate_of else []):
            say(f"validate {subject_id}: warning: {report.file}: {remark}")
    usable = require_usable(reports, folder.relative_to(root), params.photos)
    captions = {name: read_caption(path) for name, path in files.captions.items()}
    names = {report.file: f"{number:02d}.png" for number, report in enumerate(usable)}
    sources = [
        {
            "file": name,
            "original": original,
            "sha256": sha256_of_file(folder / original),
            "caption": captions.get(original),
        }
        for original, name in names.items()
    ]
    with new_folder(root / OUTPUTS[0].format(id=subject_id), {"photos": sources}) as target:
        for original, name in names.items():
            (target / name).write_bytes(png_bytes(open_image(folder / original, params.photos)))
        table = {"photos": [asdict(report) for report in reports], "ignored": files.ignored}
        (target / "photos.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    with_caption = sum(report.file in captions for report in usable)
    say(
        f"validate {subject_id}: {len(usable)} photos, {len(reports) - len(usable)} dropped, "
        f"{with_caption} with a caption"
    )


if __name__ == "__main__":
    main(run)

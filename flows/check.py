"""Look at photos before anything is made of them: a table, and a thumbnail of each that can be used."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreambooth.errors import PhotosError, SubjectError, shown
from dreambooth.folders import misnamed, scratch_folder, sha256_of_file
from dreambooth.images import png_bytes, shrunk
from dreambooth.params import Params, check_id, load_params
from dreambooth.photos import (
    SUBJECTS,
    PhotoReport,
    Remark,
    alike,
    check_photos,
    find_photos,
    require_usable,
    subject_folder,
)
from flows.preflight import elsewhere
from flows.project import PARAMS

THUMBNAIL_SIDE = 128  # pixels
CHECKED = "check"  # in the scratch folder: thumbnails of folders that are no subject


@dataclass(frozen=True)
class Checked:
    """What was found in a folder of photos."""

    folder: Path
    subject_id: str | None
    """Whose photos they are, if the folder is that of a subject in params.yaml."""
    reports: list[PhotoReport]
    ignored: list[str]
    remark: Remark | None
    """On the whole folder."""
    thumbnails: dict[str, Path]
    """By the name of the photo."""
    refusal: SubjectError | None
    """Why the photos cannot be used, None if they can."""


def check(root: Path, what: str) -> Checked:
    """Check the photos of a subject, or of any folder; draw thumbnails without their metadata.

    Args:
        root: the project, for the limits and the thumbnails.
        what: id of a subject, or a folder; that of a subject, as a shell completes it, means the subject.

    Raises:
        SubjectError: neither; or a subject whose photos DVC knows and that are not here.
    """
    params = load_params(root / PARAMS)
    what = _id_of(root, params, what) or what
    folder, place = _folder_and_place(root, params, what)
    subject_id = what if what in params.subjects and folder == subject_folder(root, what) else None
    ignored, thumbnails = find_photos(folder).ignored, dict[str, Path]()
    shutil.rmtree(place, ignore_errors=True)

    def draw(report: PhotoReport, image: Image.Image) -> None:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = place / f"{len(thumbnails):02d}.png"
        photo = sha256_of_file(folder / report.file)  # by which `dreambooth forget` knows whose it is
        path.write_bytes(png_bytes(shrunk(image, THUMBNAIL_SIDE), {"photo": photo}))
        thumbnails[report.file] = path

    reports = check_photos(folder, params.photos, params.base.resolution, draw)
    refusal: SubjectError | None = None
    try:
        require_usable(reports, folder, params.photos)
    except SubjectError as error:
        refusal = error
    if folder.resolve().parent == (root / SUBJECTS).resolve() and (problems := misnamed(folder)):
        refusal = PhotosError([*problems, *([str(refusal)] if refusal else [])])
    return Checked(folder, subject_id, reports, ignored, alike(reports, params.photos), thumbnails, refusal)


def _id_of(root: Path, params: Params, what: str) -> str | None:
    """Return the subject that is named by its id or by the path of its folder; None for anything else."""
    if what in params.subjects:
        return what
    path = Path(what).expanduser().resolve()
    return path.name if path.parent == (root / SUBJECTS).resolve() and path.name in params.subjects else None


def _folder_and_place(root: Path, params: Params, what: str) -> tuple[Path, Path]:
    """Return the folder of the photos, and where their thumbnails go: both are erased with the subject."""
    given = Path(what).expanduser()
    try:
        folder = subject_folder(root, check_id(what))
        if not folder.is_dir():
            params.subject(what)
    except SubjectError as error:
        if given.is_dir():
            return given, scratch_folder(root) / CHECKED
        if given.exists() or len(given.parts) > 1:  # meant as a path
            fault = "is no folder" if given.exists() else "does not exist"
            raise SubjectError(f"{shown(given.absolute())} {fault}; name a folder of photos, or a subject") from None
        raise SubjectError(f"{shown(given.absolute())} is no folder, and {error}") from None
    if not folder.is_dir() and given.is_dir():
        return given, scratch_folder(root) / CHECKED
    if not folder.is_dir():
        if known := elsewhere(root, folder):
            raise PhotosError([known])
        raise SubjectError(f"neither {shown(folder)} nor the folder {shown(given.absolute())} exists; name one of them")
    return folder, root / "build" / what / "check"

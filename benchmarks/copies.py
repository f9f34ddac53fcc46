"""Does the copy detector find altered copies of photos, and leave other photos of the same subject alone?

    python -m benchmarks.copies FOLDER...

Each folder holds the photos of one subject. A photo that is saved again, mirrored, blurred or shrunk is a copy of
itself; a photo that is held against the others of its folder, or of another folder, is none. With --unmeasured the
threshold is what the photos alone say, as with an encoder whose copies nobody measured.
"""

import argparse
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from PIL import Image, ImageFilter, ImageOps

from dreambooth.encoders import Lite0Encoder
from dreambooth.evaluation import Encoders, as_photo, nearest_photos, reference
from dreambooth.images import open_photo
from dreambooth.params import Photos, load_params
from stages.entry import say

ROOT = Path(__file__).resolve().parents[1]
FOUND = 0.95  # of the altered copies


def saved_again(photo: Image.Image, quality: int) -> Image.Image:
    """Return a photo as JPEG of some quality leaves it."""
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(photo: Image.Image, share: float) -> Image.Image:
    """Cut a share of the side off at each edge, and bring the rest to the old size."""
    edge = round(share * photo.width)
    return photo.crop((edge, edge, photo.width - edge, photo.height - edge)).resize(photo.size)


def blurred(photo: Image.Image, share: float) -> Image.Image:
    """Blur by a radius in shares of the side."""
    return photo.filter(ImageFilter.GaussianBlur(share * photo.width))


ALTERED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-saved, quality 90": lambda photo: saved_again(photo, 90),
    "re-saved, quality 50": lambda photo: saved_again(photo, 50),
    "mirrored": ImageOps.mirror,
    "mirrored and re-saved": lambda photo: saved_again(ImageOps.mirror(photo), 75),
    "blurred by 0.5 % of the side": lambda photo: blurred(photo, 0.005),
    "blurred by 1 % of the side": lambda photo: blurred(photo, 0.01),
    "cropped by 5 % at each edge": lambda photo: cropped(photo, 0.05),
    "a quarter of the pixels": lambda photo: photo.resize((photo.width // 2, photo.height // 2)),
}


class Unmeasured(Lite0Encoder):
    """Lite0 without what is known of its copies, as DINO and CLIP are."""

    copy_cosine = None


def photos_of(folder: Path, limits: Photos) -> list[Image.Image]:
    """Open the photos of a folder as the evaluation sees them."""
    return [as_photo(open_photo(path, limits).image) for path in sorted(folder.iterdir()) if path.is_file()]


def flagged(pictures: list[Image.Image], photos: list[Image.Image], encoders: Encoders) -> list[bool]:
    """Tell which pictures repeat one of the photos."""
    found = nearest_photos(pictures, encoders.image.embed(pictures), reference(photos, encoders))
    return [bool(value) for value in found["copy"]]


def measure(folders: dict[str, list[Image.Image]], encoders: Encoders) -> pd.DataFrame:
    """Return one row a question: kind, expected, flagged."""
    rows: list[tuple[str, bool, bool]] = []
    for photos in folders.values():
        for kind, alter in ALTERED.items():
            rows += [(kind, True, hit) for hit in flagged([alter(photo) for photo in photos], photos, encoders)]
        for number, photo in enumerate(photos):
            others = photos[:number] + photos[number + 1 :]
            rows.append(("another photo of the subject", False, flagged([photo], others, encoders)[0]))
    for (_, one), (_, other) in itertools.permutations(folders.items(), 2):
        rows += [("a photo of another subject", False, hit) for hit in flagged(one, other, encoders)]
    return pd.DataFrame(rows, columns=["picture", "copy", "flagged"])


def main() -> None:
    """Measure, print a table, and exit with 1 if the detector misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="photos of one subject each, three or more")
    parser.add_argument("--unmeasured", action="store_true", help="by the photos alone")
    asked, limits = parser.parse_args(), load_params(ROOT / "params.yaml").photos
    folders = {str(folder): photos_of(folder, limits) for folder in asked.folders}
    table = measure(folders, Encoders(Unmeasured() if asked.unmeasured else Lite0Encoder(), None))
    shown = table.groupby("picture", sort=False).agg(pictures=("flagged", "size"), flagged=("flagged", "mean"))
    say(shown.to_string(float_format="{:.2f}".format))
    found = table.loc[table["copy"], "flagged"].mean()
    false = int(table.loc[~table["copy"], "flagged"].sum())
    say(f"altered copies found: {found:.3f} (bar: {FOUND}); other photos flagged: {false} (bar: 0)")
    raise SystemExit(found < FOUND or false > 0)


if __name__ == "__main__":
    main()

"""The views of a photo that are trained on: the middle square, others along the longer side, and their mirror images.

There are few of them and each is encoded once; a row takes one by chance.
"""

import torch
from PIL import Image, ImageOps

from dreambooth import rng
from dreambooth.families import Sizes
from dreambooth.images import to_square


def views_of(
    picture: Image.Image, resolution: int, crops: int, flip: bool, seed: int, number: int
) -> list[tuple[Image.Image, Sizes]]:
    """Return square pictures, the middle one first, each with what SDXL is told of it.

    Args:
        picture: upright, W x H pixels.
        resolution: side of the views in pixels.
        crops: how many squares besides the middle one; a square picture has no others.
        flip: whether each is mirrored too.
        seed: of the places, with the photo's number.
        number: of the photo.
    """
    room = max(picture.size) - min(picture.size)
    generator = rng.generator(seed, "crop", number)
    places = [room / 2, *(room * torch.rand(crops, generator=generator)).tolist()] if room else [0.0]
    squares = [(to_square(picture, resolution), sizes_of(picture, resolution, places[0]))]
    squares += [(_cut(picture, resolution, place), sizes_of(picture, resolution, place)) for place in places[1:]]
    return squares + ([(ImageOps.mirror(square), sizes) for square, sizes in squares] if flip else [])


def sizes_of(picture: Image.Image, resolution: int, place: float) -> Sizes:
    """Return the sizes of a square that begins `place` pixels along the longer side of a picture."""
    width, height = picture.size
    offset = round(place * resolution / min(picture.size))
    top, left = (offset, 0) if height > width else (0, offset)
    return (height, width, top, left, resolution, resolution)


def _cut(picture: Image.Image, resolution: int, place: float) -> Image.Image:
    width, height = picture.size
    side = min(width, height)
    left, top = (place, 0.0) if width > height else (0.0, place)
    box = (left, top, left + side, top + side)
    return picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)

"""The views of a photo that are trained on: the middle, others along the side that is too long, and mirror images.

There are few of them and each is encoded once; a row takes one by chance. A view is a square, or has the size of the
bucket that is nearest to the photo. Sizes are (width, height) in pixels.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps

from dreambooth import rng
from dreambooth.families import Sizes

Size = tuple[int, int]
LONGEST = 2  # sides of a bucket are within this factor of the square's, as those that SDXL was trained with


def buckets(resolution: int, whole_side: int) -> list[Size]:
    """Return sizes with about as many pixels as the square, which is the first of them.

    Of the buckets with one shorter side the one with the most pixels (NovelAI 2022, "Aspect ratio bucketing"; at 1024
    pixels those of Podell et al. 2023, appendix I, that are the largest of their height). No finer than a sixteenth of
    the square's side.

    Args:
        resolution: side of the square.
        whole_side: of the model; all sides but the square's are multiples of it.
    """
    step = math.ceil(resolution / 16 / whole_side) * whole_side
    found = [(resolution, resolution)]
    for short in range(math.ceil(resolution / LONGEST / step) * step, resolution, step):
        long = min(resolution**2 // short, LONGEST * resolution) // step * step
        if long > short:
            found += [(short, long), (long, short)]
    return found


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the bucket whose proportions are nearest to those of a picture; the first of equals."""
    return min(sizes, key=lambda bucket: abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0]))))


def views_of(
    picture: Image.Image, size: Size, crops: int, flip: bool, seed: int, number: int
) -> list[tuple[Image.Image, Sizes]]:
    """Return pictures of one size, the middle one first, each with what SDXL is told of it.

    Args:
        picture: upright, W x H pixels.
        size: of the views.
        crops: how many besides the middle one; a picture of the same proportions has no others.
        flip: whether each is mirrored too.
        seed: of the places, with the photo's number.
        number: of the photo.
    """
    wide, high = _part(picture, size)
    room = max(picture.width - wide, picture.height - high)
    generator = rng.generator(seed, "crop", number)
    places = [room / 2, *(room * torch.rand(crops, generator=generator)).tolist()] if room else [0.0]
    views = [(_cut(picture, size, place), sizes_of(picture, size, place)) for place in places]
    if not flip:
        return views
    # The mirror image of a view lies as far from the left of the mirrored picture as the view does from the right.
    begins = [room - place if wide < picture.width else place for place in places]
    mirrored = [ImageOps.mirror(view) for view, _ in views]
    return views + [(view, sizes_of(picture, size, place)) for view, place in zip(mirrored, begins, strict=True)]


def sizes_of(picture: Image.Image, size: Size, place: float) -> Sizes:
    """Return the sizes of a view that begins `place` pixels along the side of a picture that is too long."""
    wide, _ = _part(picture, size)
    offset = round(place * size[0] / wide)
    top, left = (0, offset) if wide < picture.width else (offset, 0)
    return (picture.height, picture.width, top, left, size[1], size[0])


def _cut(picture: Image.Image, size: Size, place: float) -> Image.Image:
    wide, high = _part(picture, size)
    left, top = (place, 0.0) if wide < picture.width else (0.0, place)
    return picture.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + wide, top + high))


def _part(picture: Image.Image, size: Size) -> tuple[float, float]:
    """Return width and height of the largest part of a picture that has the proportions of `size`."""
    (width, height), (wide, high) = picture.size, size
    return (height * wide / high, height) if width * high > height * wide else (width, width * high / wide)

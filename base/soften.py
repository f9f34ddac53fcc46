"""Spoil pictures a little, as a small diffusion model does: its judges should not have seen sharp ones only.

S pixels a side.
"""

import io

import numpy as np
from PIL import Image, ImageFilter

from base.compose import Pixels

BLUR_SHARE, BLUR_PX = 0.6, 1.2
"""Of pictures of 64 px: what the autoencoder of the base model leaves is about as soft."""
NOISE_SHARE, NOISE_LEVELS = 0.3, 8.0
JPEG_SHARE, JPEG_QUALITY = 0.2, (50, 95)


def soften(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Blur, add noise and recompress (S, S, 3), each with its share; four in ten pictures stay sharp.

    The blur is in pixels of a picture of 64 px and grows with S.
    """
    image = Image.fromarray(pixels)
    if rng.random() < BLUR_SHARE:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, BLUR_PX) * len(pixels) / 64))
    made = np.asarray(image)
    if rng.random() < NOISE_SHARE:
        noise = rng.normal(0, rng.uniform(0, NOISE_LEVELS), made.shape)
        made = np.clip(made + noise, 0, 255).astype(np.uint8)
    if rng.random() < JPEG_SHARE:
        file = io.BytesIO()
        Image.fromarray(made).save(file, "JPEG", quality=int(rng.integers(*JPEG_QUALITY)))
        made = np.asarray(Image.open(file).convert("RGB"))
    return made

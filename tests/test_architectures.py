"""Random pipelines for timing on a GPU have the sizes of the published ones."""

import pytest
import torch

from benchmarks.architectures import build

# UNets of Rombach et al. 2022 (860 M) and Podell et al. 2023 (2.6 B), CLIP-L, OpenCLIP bigG: as published files hold.
WEIGHTS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_every_part_has_the_published_number_of_weights(kind: str) -> None:
    with torch.device("meta"):
        parts = build(kind)
    counts = {name: sum(weight.numel() for weight in module.parameters()) for name, module in parts.items()}
    assert counts == WEIGHTS[kind]

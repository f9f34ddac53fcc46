"""The real recipe with few words and few rows, and icon packages written by hand as npm packs them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from base import icons
from base.recipe import Package

HANDS = ("alpha", "beta", "gamma")
"""gamma is the held-out one."""
FURTHER = "delta"
"""Known to the scorer alone."""
NOUNS = {"dog": ["dog-face", "poodle"], "fox": ["fox"], "apple": ["red-apple"]}
SCENES = ("in space", "on a beach")


def toy(data: dict[str, Any]) -> dict[str, Any]:
    """Shrink the values of base/params.yaml."""
    data["nouns"] = NOUNS
    data["scenes"] = {phrase: data["scenes"][phrase] for phrase in SCENES}
    data["extra_icons"] = ["giraffe"]
    data["resolution"], data["sprite_size"] = 16, 24
    data["autoencoder"] |= {
        "block_out_channels": [8, 8, 8],
        "rows": 24,
        "decoder_rows": 8,
        "batch_size": 4,
        "warmup_steps": 2,
    }
    data["text_encoder"] |= {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 16}
    data["text_encoder"] |= {"captions": 200, "steps": 60, "batch_size": 16, "learning_rate": 1e-2}
    data["denoiser"] |= {
        "block_out_channels": [32, 32],
        "attention_head_dim": 2,
        "pool": 12,
        "phases": [{"resolution": 8, "rows": 16, "batch_size": 4}, {"resolution": 16, "rows": 8, "batch_size": 4}],
        "warmup_steps": 2,
        "round_steps": 2,
    }
    data["scorer"] |= {"held_out_package": "gamma", "held_out_rows": 12, "rows": 16, "more_hands": 1}
    data["scorer"] |= {"hidden_size": 8, "width": 6, "steps": 4, "batch_size": 8, "mixed_precision": "no"}
    data["judge"] |= {"block_out_channels": [8, 16], "pool": 32, "rows": 64, "fresh_rows": 16, "batch_size": 8}
    data["quality"] |= {"prompts": 2, "seeds": 1, "candidates": 3}
    return data


def package(integrity: str = "sha512-no") -> Package:
    """Give a pin."""
    return Package(version="1.0.0", integrity=integrity, licence="MIT", attribution="nobody")


def pack(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write an archive as npm does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = icons.archive(folder, name, package())
    data = json.dumps(content).encode()
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return path


def pack_hands(folder: Path, names: list[str]) -> dict[str, Any]:
    """Draw every icon by every hand, a disc of a colour of its own; give the packages for params.yaml."""
    packages = {}
    for number, hand in enumerate(HANDS):
        bodies = {
            name: {"body": f'<circle cx="16" cy="16" r="{9 + number}" fill="#{hash_of(name):06x}"/>'} for name in names
        }
        path = pack(folder, hand, {"width": 32, "height": 32, "icons": bodies, "aliases": {}})
        packages[hand] = package(icons.integrity(path)).model_dump()
    return packages


def pack_further_hand(folder: Path) -> dict[str, Any]:
    """Draw a dog twice and a fox, under other names; give the package for the scorer's part of params.yaml."""
    body = {"body": '<rect width="20" height="20" fill="#123456"/>'}
    names = {"dog-face": ["hound-1", "hound-2"]}
    bodies = dict.fromkeys(["hound-1", "hound-2", "fox"], body)
    path = pack(folder, FURTHER, {"width": 32, "height": 32, "icons": bodies})
    return {FURTHER: package(icons.integrity(path)).model_dump() | {"names": names}}


def hash_of(name: str) -> int:
    """Give a number in [0, 2^24) that stays the same from run to run."""
    return sum((k + 1) * 977 * ord(letter) for k, letter in enumerate(name)) % (1 << 24)

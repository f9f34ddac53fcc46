"""The icon packages, without a network: a package is written by hand and npm is away."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from base import icons, recipe
from base.recipe import Package, Recipe

ICONS = {
    "width": 32,
    "height": 32,
    "icons": {"dog": {"body": "<path d='M0 0'/>"}, "wide": {"body": "<g/>", "width": 64}},
    "aliases": {"hound": {"parent": "dog"}},
}


def pack(folder: Path, package: Package) -> Path:
    """Write an archive as npm does."""
    path = icons.archive(folder, "toy", package)
    content = json.dumps(ICONS).encode()
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return path


def package(integrity: str = "sha512-no") -> Package:
    """Give a pin."""
    return Package(version="1.0.0", integrity=integrity, licence="MIT", attribution="nobody")


def test_missing_npm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons.shutil, "which", lambda _: None)
    with pytest.raises(icons.IconError, match="npm is not installed"):
        icons.download("toy", package(), tmp_path)


def test_package_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    pack(tmp_path, package())
    with pytest.raises(icons.IconError, match="should have sha512-no"):
        icons.download("toy", package(), tmp_path)


def test_pinned_package_that_is_there_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path, package())
    monkeypatch.setattr(icons.shutil, "which", lambda _: None)
    assert icons.download("toy", package(icons.integrity(path)), tmp_path) == path
    assert icons.read(path) == ICONS


def test_svg_follows_aliases_and_knows_its_size() -> None:
    assert icons.svg(ICONS, "hound") == icons.svg(ICONS, "dog")
    assert 'viewBox="0 0 64 32"' in (icons.svg(ICONS, "wide") or "")
    assert icons.svg(ICONS, "cat") is None


def test_subjects_are_held_out(values: Recipe) -> None:
    full = recipe.load()
    for subject in full.subjects.values():
        assert f"{subject.package}:{subject.icon}" in full.held_out
        assert subject.icon in full.nouns[subject.class_noun]
        assert full.packages[subject.package].licence in {"Apache-2.0", "MIT"}
        assert len(subject.contexts) == 5

"""The icon packages, without a network: a package is written by hand and npm is away."""

from pathlib import Path

import pytest
from toy_recipe import pack, pack_further_hand, package

from base import icons, recipe, sprites
from base.recipe import FurtherPackage, Recipe

ICONS = {
    "width": 32,
    "height": 32,
    "icons": {"dog": {"body": "<path d='M0 0'/>"}, "wide": {"body": "<g/>", "width": 64}},
    "aliases": {"hound": {"parent": "dog"}},
}


def test_missing_npm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons.shutil, "which", lambda _: None)
    with pytest.raises(icons.IconError, match="npm is not installed"):
        icons.download("toy", package(), tmp_path)


def test_package_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    pack(tmp_path, "toy", ICONS)
    with pytest.raises(icons.IconError, match="should have sha512-no"):
        icons.download("toy", package(), tmp_path)


def test_pinned_package_that_is_there_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path, "toy", ICONS)
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
        package = full.all_packages[subject.package]
        assert {f"{subject.package}:{own}" for own in sprites.names_of(subject.icon, package)} <= set(full.held_out)
        assert subject.icon in full.nouns[subject.class_noun]
        assert package.licence in {"Apache-2.0", "MIT"}
        assert len(subject.contexts) == 5


def test_a_further_package_has_names_of_its_own(values: Recipe, tmp_path: Path) -> None:
    further = {name: FurtherPackage(**pin) for name, pin in pack_further_hand(tmp_path).items()}
    drawn = sprites.draw(values, tmp_path, further)
    assert [(sprite.icon, sprite.word) for sprite in drawn.table] == [
        ("dog-face", "dog"), ("dog-face", "dog"), ("fox", "fox"),
    ]  # fmt: skip


def test_names_differ_by_hyphens_or_are_listed() -> None:
    pin = FurtherPackage(**package().model_dump(), names={"fox": ["fox-1", "fox-2"]})
    assert sprites.names_of("fox", pin) == ["fox-1", "fox-2"]
    assert sprites.names_of("red-apple", pin) == ["red-apple", "redapple"]
    assert sprites.names_of("red-apple", package()) == ["red-apple"]


def test_an_icon_that_no_package_draws_is_a_mistake(values: Recipe, tmp_path: Path) -> None:
    further = {name: FurtherPackage(**pin) for name, pin in pack_further_hand(tmp_path).items()}
    with pytest.raises(icons.IconError, match="red-apple"):
        sprites.check(values, sprites.draw(values, tmp_path, further))

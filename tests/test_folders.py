"""A folder is whole, or it is not there."""

import json
import os
from pathlib import Path

import pytest

from dreambooth.folders import (
    HomelessError,
    TornFolderError,
    cache_folder,
    content_hash,
    new_folder,
    read_manifest,
    scratch_folder,
    sha256_of,
    write_file,
)


def signed(manifest: dict[str, object]) -> str:
    return json.dumps(manifest | {"sha256": sha256_of(manifest)})


def make(folder: Path, text: str = "one") -> Path:
    with new_folder(folder, {"inputs": {"a": 1}}) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub/a.txt").write_text(text)
        (temporary / "b.txt").write_text("two")
    return folder


def test_a_folder_appears_with_its_manifest(tmp_path: Path) -> None:
    manifest = read_manifest(make(tmp_path / "x"))
    assert list(manifest["files"]) == ["b.txt", "sub/a.txt"]
    assert manifest["inputs"] == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_error_while_it_is_filled_leaves_the_old_one_alone(tmp_path: Path) -> None:
    before = content_hash(make(tmp_path / "x"))

    def fail() -> None:
        with new_folder(tmp_path / "x", {}) as temporary:
            (temporary / "b.txt").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert content_hash(tmp_path / "x") == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    before = content_hash(make(tmp_path / "x"))
    assert content_hash(make(tmp_path / "x", "other")) != before
    assert (tmp_path / "x/sub/a.txt").read_text() == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_equal_content_makes_equal_bytes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "x"), make(tmp_path / "y")
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "b.txt").write_text("twO"), "b.txt was changed"),
        (lambda folder: (folder / "b.txt").write_text("tw"), "b.txt has 2 bytes, not 3"),
        (lambda folder: (folder / "b.txt").unlink(), "b.txt is missing"),
        (lambda folder: (folder / "c.txt").write_text(""), "c.txt is not in the manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not JSON"),
        (
            lambda folder: (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": {}})),
            "manifest.json was changed",
        ),
        (lambda folder: (folder / "manifest.json").write_text(signed({"version": 0, "files": {}})), "has version 0"),
    ],
)
@pytest.mark.fault(41)
def test_any_damage_is_found_and_named(tmp_path: Path, damage: object, said: str) -> None:
    folder = make(tmp_path / "x")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(TornFolderError, match=said):
        read_manifest(folder)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"one")
    write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.threat(25)
def test_the_scratch_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scratch_folder(tmp_path).stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("DREAMBOOTH_SCRATCH", str(tmp_path / "elsewhere"))
    assert scratch_folder(tmp_path) == tmp_path / "elsewhere"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a user that nothing is known of but a number, as in a container with any user id."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)


@pytest.mark.usefixtures("homeless")
@pytest.mark.fault(42)
def test_a_user_without_a_home_needs_a_folder_for_caches_and_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    for named, said in (("", "a folder for caches"), ("~/caches", "~/caches")):
        monkeypatch.setenv("DREAMBOOTH_CACHE", named)
        with pytest.raises(HomelessError, match=f"^{said}: the user 54321 has no home; set DREAMBOOTH_CACHE"):
            cache_folder()


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
@pytest.mark.fault(42)
def test_files_and_folders_follow_the_umask(tmp_path: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    before = os.umask(mask)
    try:
        write_file(tmp_path / "file", b"1")
        with new_folder(tmp_path / "folder", {}) as folder:
            (folder / "a").write_text("1")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == file_mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == folder_mode

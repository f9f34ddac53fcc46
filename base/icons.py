"""Download the pinned icon packages with npm and read the drawings in them."""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from base import recipe
from base.recipe import Package

SCOPE = "@iconify-json"


class IconError(RuntimeError):
    """A package cannot be downloaded, or is not the pinned one."""


def archive(folder: Path, name: str, package: Package) -> Path:
    """Name the file in which npm puts a package."""
    return folder / f"iconify-json-{name}-{package.version}.tgz"


def integrity(path: Path) -> str:
    """Give the digest of a file as npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def verify(path: Path, name: str, package: Package) -> None:
    """Refuse a package that is not the pinned one.

    Raises:
        IconError: The digest differs.
    """
    if (found := integrity(path)) != package.integrity:
        raise IconError(f"{path}: {name} {package.version} should have {package.integrity}, has {found}; delete it")


def download(name: str, package: Package, folder: Path) -> Path:
    """Fetch one package with ``npm pack`` unless it is there, and verify it.

    Raises:
        IconError: npm is missing or fails, or the package is not the pinned one.
    """
    path = archive(folder, name, package)
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise IconError("npm is not installed; the drawings are npm packages: install Node.js, then run again")
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [npm, "pack", f"{SCOPE}/{name}@{package.version}"], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise IconError(f"npm pack {SCOPE}/{name}@{package.version} failed: {done.stderr.strip()[-500:]}")
    verify(path, name, package)
    return path


def read(path: Path) -> dict[str, Any]:
    """Read ``icons.json`` of a package."""
    with tarfile.open(path) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise IconError(f"{path}: no icons.json in it")
        data: dict[str, Any] = json.load(member)
    return data


def svg(icons: dict[str, Any], icon: str) -> str | None:
    """Give one drawing as an SVG document, or None where the package lacks it.

    An alias is followed to its drawing; the packages used here have no aliases that turn or flip.
    """
    name = icons.get("aliases", {}).get(icon, {}).get("parent", icon)
    found = icons["icons"].get(name)
    if found is None:
        return None
    width, height = (found.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{found["body"]}</svg>'
    )


def main() -> None:
    """Download every package."""
    for name, package in recipe.load().all_packages.items():
        download(name, package, recipe.SCRATCH / "icons")


if __name__ == "__main__":
    main()

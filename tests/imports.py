"""Which modules of this repository a module imports, by its text, directly and through others."""

import ast
from collections.abc import Collection
from pathlib import Path

from tiny_project import REPOSITORY


def import_closure(file: str, packages: Collection[str], without: Collection[str]) -> set[str]:
    """Return the files that a file imports, itself among them.

    Args:
        file: path in the repository.
        packages: only modules of these.
        without: files that are passed over, and what they import.
    """
    found, todo = {file}, [file]
    while todo:
        new = _imports_of(REPOSITORY / todo.pop(), packages) - found - set(without)
        found |= new
        todo += new
    return found


def _imports_of(path: Path, packages: Collection[str]) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {name.replace(".", "/") + ".py" for name in names if name.split(".")[0] in packages}
    return {file for file in files if (REPOSITORY / file).is_file()}

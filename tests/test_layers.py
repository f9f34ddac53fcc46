import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("dreambooth", "stages", "flows")  # each may import itself and those before it
ROOMS = ("mlflowstore", "tracking", "versions", "aliases", "registry", "erasure", "serving", "promotion", "health")
MLFLOW = {f"dreambooth/{name}.py" for name in ROOMS}
FORBIDDEN = {
    "dreambooth": {"prefect", "dvc", "typer"},
    "stages": {"prefect", "dvc", "typer", "mlflow"},
    "flows": {"torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "mlflow"},
}
MODULES = sorted(path.relative_to(ROOT).as_posix() for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module or ""


def importers_of(package: str) -> set[str]:
    return {module for module in MODULES if package in {name.split(".")[0] for name in imported(ROOT / module)}}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    layer = module.split("/")[0]
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    packages = {name.split(".")[0] for name in imported(ROOT / module)}
    assert not packages & above
    assert not packages & FORBIDDEN[layer]


def test_mlflow_is_imported_by_the_rooms_of_the_registry_alone() -> None:
    importers = {
        module for module in MODULES if any(name.split(".")[0] == "mlflow" for name in imported(ROOT / module))
    }
    assert importers <= MLFLOW


def test_dvc_is_imported_by_two_modules_alone() -> None:
    assert importers_of("dvc") == {"flows/graph.py", "flows/dvcstore.py"}


def test_every_module_opens_with_one_sentence() -> None:
    for module in MODULES:
        text = ast.get_docstring(ast.parse((ROOT / module).read_text(encoding="utf-8")))
        assert text, module
        assert text.splitlines()[0].endswith((".", ":")), f"{module}: the first line should be a sentence"


@pytest.mark.parametrize("layer", LAYERS)
def test_the_tree_of_the_readme_names_every_module(layer: str) -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where things are")[1].split("```")[1]
    lines = tree[tree.index(f"\n{layer}/") + 1 :].splitlines()
    block = lines[:1] + list(itertools.takewhile(lambda line: line.startswith("  "), lines[1:]))
    words = {word.removesuffix(".py") for word in re.findall(r"[\w.]*\w", "\n".join(block))}
    modules = {path.stem for path in (ROOT / layer).glob("*.py")} - {"__init__"}
    assert modules <= words

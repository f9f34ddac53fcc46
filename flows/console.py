"""What the commands print with, and how they show a path."""

from pathlib import Path

from rich.console import Console

out, err = Console(), Console(stderr=True)


def say(text: str) -> None:
    """Print a line as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def shown(path: Path) -> str:
    """Shorten a path to what a person here would type."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

"""What the commands print with, and how they show a path."""

from pathlib import Path

from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

out, err = Console(), Console(stderr=True)
WIDEST = 400  # letters of a table that no terminal may narrow


def say(text: str) -> None:
    """Print a line as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning as it is."""
    err.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def print_whole(table: Table) -> None:
    """Print a table of which nothing is cut, nor broken into strips, whatever the width of the terminal."""
    wide = out.measure(table, options=out.options.update(max_width=WIDEST)).maximum
    options = out.options.update(width=max(out.width, wide), max_width=max(out.width, wide))
    for segments in Segment.split_lines(out.render(table, options)):
        line = Text.assemble(*((one.text, one.style or "") for one in segments))
        line.rstrip()  # else a terminal shows the blanks of a short line as empty lines
        out.print(line, soft_wrap=True)


def from_here(path: Path) -> str:
    """Shorten a path to what a person here would type."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

"""Progress bars with an ETA that also read well where there is no terminal."""

import sys
from typing import Any

from tqdm import tqdm

_LOG_INTERVAL = 5.0  # seconds between two lines in a log


def progress_bar(total: int, description: str | None, unit: str, initial: int = 0, delay: float = 0.0) -> "tqdm[Any]":
    """Return a bar on stderr: live on a terminal, a line every few seconds in a log.

    Args:
        total: units of work.
        description: its name; None hides it.
        unit: in the singular.
        initial: units that were done before.
        delay: seconds until it is shown; what mostly ends sooner needs none.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        delay=delay,
        disable=description is None,
        dynamic_ncols=terminal,
        ncols=None if terminal else 80,
        mininterval=0.1 if terminal else _LOG_INTERVAL,
        ascii=None if terminal else " =",
    )

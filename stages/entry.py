"""What every stage does when it is called as a program: read its id and the parameters, run, explain a mistake."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from dreambooth.errors import DreamboothError
from dreambooth.interruption import die_with_parent
from dreambooth.params import Params, check_id, load_params

Run = Callable[[Params, str, Path], None]


def main(run: Run) -> None:
    """Run a stage in the current folder with the id on the command line; exit with the code of a user's mistake."""
    die_with_parent()
    try:
        if len(sys.argv) != 2:
            raise SystemExit(f"usage: python -m {run.__module__ if run.__module__ != '__main__' else 'stages.NAME'} ID")
        root = Path.cwd()
        run(load_params(root / "params.yaml"), check_id(sys.argv[1]), root)
    except DreamboothError as error:
        if os.environ.get("DREAMBOOTH_DEBUG"):
            raise
        sys.stderr.writelines(f"{error.code}: {line}\n" for line in str(error).splitlines())
        raise SystemExit(error.exit_code) from None


def say(line: str) -> None:
    """Print a line that a log should have at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()

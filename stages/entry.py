"""What every stage does when it is called as a program: read its id and the parameters, run, explain a mistake."""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from dreambooth.consent import require_consent
from dreambooth.errors import MACHINE_FAULT, DreamboothError, machine_fault, wants_traceback
from dreambooth.interruption import deaf_once_answered, die_with_starter
from dreambooth.params import check_id, load_params
from dreambooth.redaction import redact, redact_logs

Run = Callable[..., None]


def main(run: Run, options: Sequence[str] = ()) -> None:
    """Run a stage in the current folder with the id on the command line; exit with the code of a user's mistake.

    Args:
        run: takes the parameters, the id, the project's folder, and each of the options as a path or None.
        options: names that may follow the id: --resume-from PATH for resume_from.
    """
    die_with_starter()
    redact_logs()
    parser = argparse.ArgumentParser(prog=f"python -m stages.{Path(sys.argv[0]).stem}", allow_abbrev=False)
    parser.add_argument("id")
    for name in options:
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path)
    given = vars(parser.parse_args())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    with deaf_once_answered():
        try:
            root, params, key = Path.cwd(), load_params(Path("params.yaml")), check_id(given.pop("id"))
            require_consent(params, key, root)
            run(params, key, root, **given)
        except DreamboothError as error:
            _show_traceback(error)
            sys.stderr.writelines(f"{error.code}: {line}\n" for line in redact(str(error)).splitlines())
            raise SystemExit(error.exit_code) from None
        except (OSError, RuntimeError, MemoryError) as error:
            if not (told := machine_fault(error)):
                raise
            _show_traceback(error)
            sys.stderr.write(f"{redact(told)}\n")
            raise SystemExit(MACHINE_FAULT) from None


def _show_traceback(error: Exception) -> None:
    """Write where an error came from, if that is asked for, before the line that is for everybody."""
    if wants_traceback():
        sys.stderr.write(redact("".join(traceback.format_exception(error))))


def say(line: str) -> None:
    """Print a line that a log should have at once."""
    sys.stdout.write(redact(line) + "\n")
    sys.stdout.flush()

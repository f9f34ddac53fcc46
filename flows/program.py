"""Flows as programs: a fault as the state of a run, its states in this process, a command line, and an exit code."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar

from httpx import HTTPError, HTTPStatusError, TransportError
from prefect import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.states import Failed

from dreambooth.errors import MACHINE_FAULT, DreamboothError, PipelineError, first_line, machine_fault
from dreambooth.params import load_params
from dreambooth.redaction import redact
from flows.dvcrun import pauses
from flows.project import PARAMS, choose_subjects, find_root

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

T = TypeVar("T")
_MOST = 1000  # characters of what a run says of its failures
_SIGN_IN = "; it wants a password: PREFECT_API_AUTH_STRING as its server has it, or PREFECT_API_KEY of Prefect Cloud"
_ONE_THAT_STAYS = "; run it again, or start a server that stays: prefect server start, and name it in PREFECT_API_URL"
_REFUSALS = {401: _SIGN_IN, 403: _SIGN_IN, 404: "; no API is there; its address ends with /api: http://HOST:4200/api"}


def failed(error: DreamboothError, what: str = "") -> "State[Any]":
    """Return the state of a run, or of a task about `what`, that ended with an error of its user, without secrets."""
    return Failed(message=redact(f"{what and f'{what}: '}{error.code}: {error}"))


def ended(states: "Sequence[State[Any]]") -> Any:
    """Return what a flow ends as, by its tasks: where some failed, with a line of each instead of their number."""
    lines = [str(one.message or one.name).splitlines()[0] for one in states if one.is_failed()]
    return Failed(message=brief(lines), data=list(states)) if lines else list(states)


def brief(lines: Sequence[str]) -> str:
    """Return lines as one that a webhook may carry, without secrets."""
    return shorten(redact("; ".join(lines)), _MOST, placeholder=" ...")


def has_server() -> bool:
    """Whether a server of Prefect is there that stays when this process ends."""
    return bool(PREFECT_API_URL.value())


def is_away(error: BaseException) -> bool:
    """Tell whether an error says that the server of Prefect does not answer, or has no time: what may pass."""
    if isinstance(error, HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, TransportError) or (
        isinstance(error, RuntimeError) and "Failed to reach API" in str(error)
    )


def patiently(ask: Callable[[], T], patience: float = 600.0, sleep: Callable[[float], object] = time.sleep) -> T:
    """Ask a server of Prefect again while it is away, so that a flow waiting for other runs survives an outage.

    Args:
        ask: what may be asked twice.
        patience: seconds.
        sleep: how to wait; a test passes its own.
    """
    for pause in pauses(patience):
        try:
            return ask()
        except (HTTPError, RuntimeError) as error:
            if not is_away(error):
                raise
        sleep(pause)
    return ask()


def left(create: Callable[..., object], content: object, key: str, description: str | None = None) -> None:
    """Leave an artifact in the run; a server that does not take it for a minute costs the artifact, not the run."""
    try:
        patiently(lambda: create(content, key=key, description=description), patience=60)
    except (HTTPError, RuntimeError) as error:
        if not is_away(error):
            raise
        get_run_logger().warning("the artifact %s was not kept: %s", key, error)


@contextmanager
def reached(remedy: str = "; or work without one: prefect config unset PREFECT_API_URL") -> Iterator[None]:
    """Turn a server of Prefect that does not answer, or refuses, into one line with the next step."""
    try:
        yield
    except (HTTPError, RuntimeError) as error:
        told = "; start that server: prefect server start" if is_away(error) else _of_refusal(error)
        if not told:
            raise
        if is_away(error) and not has_server():
            raise PipelineError(f"{first_line(error)} (a temporary server of Prefect){_ONE_THAT_STAYS}") from None
        raise PipelineError(f"{first_line(error)} ({PREFECT_API_URL.value()}, PREFECT_API_URL){told}{remedy}") from None


def _of_refusal(error: BaseException) -> str:
    """Say what a server that answers would have; empty where it is a fault of ours."""
    return _REFUSALS.get(error.response.status_code, "") if isinstance(error, HTTPStatusError) else ""


def states_of(run: "Callable[[], State[Any]]") -> "list[State[Any]]":
    """Run a flow in this process and return the states of its tasks.

    Raises:
        PipelineError: the flow could not begin, or the server that PREFECT_API_URL names does not answer, or refuses.
    """
    with reached():
        state = run()
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        raise result
    if not isinstance(result, list):
        told = state.message or f"the flow ended as {state.name}"
        error = PipelineError(re.sub(r"^E_[A-Z_]+: ", "", told))
        if code := re.match(r"E_[A-Z_]+", told):  # of what `failed` was told
            error.code, error.exit_code = code[0], _exit_code_of(code[0])
        raise error
    return result


def _exit_code_of(code: str) -> int:
    kinds: list[type[DreamboothError]] = [DreamboothError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind.exit_code for kind in kinds if kind.code == code), PipelineError.exit_code)


def subjects_named(module: str, description: str | None) -> list[str]:
    """Return the subjects that the command line of a flow names, which may be none."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("subject", nargs="*", help="in params.yaml; all of it if none is named")
    return list(parser.parse_args().subject)


def project_of(subjects: Sequence[str]) -> Path:
    """Return the project that is to run subjects, before a server of Prefect starts for them.

    Raises:
        DreamboothError: there is none, its params.yaml is not valid, or has no such subject.
    """
    root = find_root()
    choose_subjects(load_params(root / PARAMS), subjects)
    return root


def exit_code(run: Callable[[], Sequence[str]]) -> int:
    """Run a program that returns a line for each failure; write them to stderr and return the code of the process.

    What the machine lacks is a line too, as in the command and in the stages.
    """
    try:
        failures, code = run(), PipelineError.exit_code
    except DreamboothError as error:
        failures, code = [f"{error.code}: {line}" for line in str(error).splitlines()], error.exit_code
    except (OSError, RuntimeError, MemoryError) as error:
        if not (told := machine_fault(error)):
            raise
        failures, code = [told], MACHINE_FAULT
    for failure in failures:
        sys.stderr.write(f"{redact(failure)}\n")
    return code if failures else 0

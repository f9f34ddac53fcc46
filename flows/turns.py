"""Take turns on the GPU: a slot of the server's limit `gpu`, or of this process where the server has no limit.

A limit counts on all machines together, so each machine names its own: DREAMBOOTH_GPU_SLOT, docs/decisions/0102.
A slot is lent for LEASE seconds and kept by asking for it again and again, so that the slot of a killed process comes
free by itself. A server that is away for a while loses no work: docs/decisions/0065.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Literal
from uuid import UUID

from httpx import HTTPError, HTTPStatusError, Response
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound

from dreambooth.errors import PipelineError
from flows.program import is_away

VARIABLE = "DREAMBOOTH_GPU_SLOT"
GPU = "gpu"  # the name of the limit where the variable says none
LEASE = 60.0  # seconds, the least that Prefect allows
RENEWAL = 15.0  # seconds: three may fail before the lease has run out
PAUSE = 5.0  # seconds between two questions for a slot
LOCKED, GONE = 423, 410  # HTTP: all slots are taken; this lease has run out
Turn = Literal["server", "none"] | threading.Semaphore


def limit_name() -> str:
    """Return the name of the limit on the server that gives out the GPU of this machine."""
    return os.environ.get(VARIABLE) or GPU


def without_limit() -> str:
    """Say what it means that the server has no limit for this machine, and how it gets one."""
    name = limit_name()
    return (
        f"the server has no limit `{name}` ({VARIABLE}): subjects that are trained at the same time share one GPU, or "
        f"the cores; once: prefect gcl create {name} --limit 1"
    )


def has_limit() -> bool:
    """Say whether the server gives out the GPU of this machine; else each process does so for itself."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(limit_name())
        except ObjectNotFound:
            return False
    return True


def gpu(
    turn: Turn, say: Callable[[str], object], stopped: threading.Event | None = None
) -> AbstractContextManager[Any]:
    """Return what waits for a turn; the slot of a process that was killed is free again after LEASE seconds.

    Args:
        turn: the server, what this process counts its own stages with, or none, which waits for nothing.
        say: hears of a server that is away.
        stopped: ends the waiting for the server.

    Raises:
        PipelineError: it was stopped before its turn came.
    """
    if turn == "server":
        return _slot(limit_name(), say, stopped or threading.Event())
    return nullcontext() if turn == "none" else turn


def gpu_of_server(say: Callable[[str], object]) -> AbstractContextManager[Any]:
    """Return what waits for a turn that the server gives; nothing waits where it gives out no GPU of this machine."""
    return gpu("server" if has_limit() else "none", say)


class _AwayError(Exception):
    """The server does not answer now."""


@contextmanager
def _slot(name: str, say: Callable[[str], object], stopped: threading.Event) -> Iterator[None]:
    """Wait for a slot of the server and keep it; neither a lost slot nor a silent server ends the block."""
    lease, done = _wait_for(name, say, stopped), threading.Event()
    keeper = threading.Thread(target=_keep, args=(name, lease, done), name="gpu slot", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join(LEASE)


def _wait_for(name: str, say: Callable[[str], object], stopped: threading.Event) -> UUID:
    """Return the lease of a slot, however long that takes."""
    silent = False
    while not stopped.is_set():
        try:
            if lease := _ask(name):
                return lease
            silent = False
        except _AwayError as error:
            if not silent:
                say(f"no turn on the GPU: {error}; asking again until the server gives one")
            silent = True
        stopped.wait(PAUSE)
    raise PipelineError("the run was stopped while it waited for its turn on the GPU; run it again")


def _keep(name: str, lease: UUID | None, done: threading.Event) -> None:
    """Renew a lease until `done`, take a new one when it has run out, and give it back."""
    while not done.wait(RENEWAL):
        with suppress(_AwayError):  # it may be back the next time
            lease = (lease and _renewed(lease)) or _ask(name)
    if lease is not None:
        with suppress(_AwayError):  # then it runs out
            _call(lambda client: client.release_concurrency_slots_with_lease(lease))


def _ask(name: str) -> UUID | None:
    """Return the lease of a slot, None if all are taken."""
    answer = _call(
        lambda client: client.increment_concurrency_slots_with_lease([name], 1, "concurrency", LEASE), LOCKED
    )
    return UUID(answer.json()["lease_id"]) if answer else None


def _renewed(lease: UUID) -> UUID | None:
    """Return the lease, None if it has run out."""
    return lease if _call(lambda client: client.renew_concurrency_lease(lease, LEASE), GONE) else None


def _call(ask: Callable[[SyncPrefectClient], Response], no: int = 0) -> Response | None:
    """Ask the server; None if it says `no`.

    A new client each time: one that has reached the server before would itself try again for minutes.

    Raises:
        _AwayError: it does not answer.
        HTTPStatusError: it refuses.
    """
    try:
        with get_client(sync_client=True) as client:
            return ask(client)
    except (HTTPError, RuntimeError) as error:
        if isinstance(error, HTTPStatusError) and error.response.status_code == no:
            return None
        if not is_away(error):
            raise
        raise _AwayError(str(error)) from None

"""The GPU of each machine is given out by a limit of its own on one server of Prefect."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from toy_project import REPOSITORY, prefect, quiet
from waiting import await_true

from dreambooth.errors import PipelineError
from flows import turns

pytestmark = pytest.mark.slow
ONE, TWO, NONE = "gpu-of-box-one", "gpu-of-box-two", "gpu-of-box-three"
# A process that takes its turn, says so, and keeps it until its input ends; it says each refusal too.
PROGRAM = """
import sys
from flows import turns

def ask(name, server=turns._ask):
    lease = server(name)
    if lease is None:
        print("refused", flush=True)
    return lease

turns.PAUSE, turns._ask = 0.2, ask
print(turns.has_limit(), flush=True)
with turns.gpu("server", print):
    print("entered", flush=True)
    sys.stdin.read()
"""


class Machine:
    """A process on a machine that is named by its limit; `said` is what it has printed."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def is_in(self) -> bool:
        return "entered" in self.said

    def leave(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line.strip())


@pytest.fixture
def environment(prefect_home: Path, prefect_server: str) -> Iterator[dict[str, str]]:
    """The server has a limit of one slot for each of two machines, and none that is called gpu."""
    found = {**quiet(prefect_home), "PREFECT_API_URL": prefect_server, "PYTHONPATH": str(REPOSITORY)}
    for name in (ONE, TWO):
        prefect(found, "gcl", "create", name, "--limit", "1")
    yield found
    for name in (ONE, TWO):
        prefect(found, "gcl", "delete", name)


@contextmanager
def machine(environment: dict[str, str], limit: str) -> Iterator[Machine]:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command,
        env=environment | {"DREAMBOOTH_GPU_SLOT": limit},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Machine(process)
        finally:
            process.kill()


def test_a_machine_waits_for_its_own_gpu_and_for_that_of_no_other(environment: dict[str, str]) -> None:
    with machine(environment, ONE) as first:
        await_true(first.is_in, 60)
        with machine(environment, ONE) as second, machine(environment, TWO) as elsewhere:
            await_true(elsewhere.is_in, 60)  # the first one still has its own
            elsewhere.leave()
            await_true(lambda: second.said.count("refused") >= 2, 60)
            assert not second.is_in()
            first.leave()
            await_true(second.is_in, 60)
            second.leave()
    assert first.said == elsewhere.said == ["True", "entered"]
    assert set(second.said) == {"True", "refused", "entered"}


def test_a_stop_ends_the_wait_for_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, refused = threading.Event(), threading.Event()
    monkeypatch.setattr(turns, "_ask", lambda name: refused.set())
    threading.Thread(target=lambda: refused.wait(60) and stopped.set(), daemon=True).start()
    with (
        pytest.raises(PipelineError, match="stopped while it waited for its turn"),
        turns.gpu("server", print, stopped),
    ):
        pass


def test_without_a_name_the_limit_is_gpu_and_what_the_server_lacks_is_said_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for given, name in (("", "gpu"), (NONE, NONE)):
        monkeypatch.setenv("DREAMBOOTH_GPU_SLOT", given)
        assert turns.limit_name() == name
        assert turns.without_limit().endswith(f"once: prefect gcl create {name} --limit 1")
    monkeypatch.delenv("DREAMBOOTH_GPU_SLOT")
    assert turns.limit_name() == "gpu"


def test_a_run_whose_limit_the_server_lacks_says_how_it_gets_one(project: Path, environment: dict[str, str]) -> None:
    """It gives out turns itself, as without a name: two runs on this machine would share its GPU."""
    named = environment | {"DREAMBOOTH_GPU_SLOT": NONE, "DREAMBOOTH_AT_ONCE": "1"}
    (project / "fail-prior-dog").touch()  # the rest of the work is of no interest here
    command = [sys.executable, "-m", "flows.personalize", "rex"]
    done = subprocess.run(command, cwd=project, env=named, capture_output=True, text=True, check=False)
    assert "prior@dog: E_TRAIN" in done.stderr
    assert f"prefect gcl create {NONE} --limit 1" in done.stderr

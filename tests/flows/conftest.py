"""A toy project that DVC and Prefect run for real, in a temporary folder."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_project import make_toy_project, post, quiet
from waiting import await_server, free_port


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a project of two dogs, biscuit and rex, none of whose stages ever ran."""
    return make_toy_project(tmp_path / "a project", {"biscuit": "dog", "rex": "dog"})


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def prefect_server(prefect_home: Path) -> Iterator[str]:
    """Start a server on a free port; yield its API's address."""
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = (prefect_home / "server.log").open("w")
    with log, subprocess.Popen(command, env=quiet(prefect_home), stdout=log, stderr=log) as server:
        try:
            await_server(f"http://127.0.0.1:{port}/api/health", server, prefect_home / "server.log")
            yield f"http://127.0.0.1:{port}/api"
        finally:
            server.terminate()


@pytest.fixture
def automations_for_now(prefect_server: str) -> Iterator[None]:
    """Take the automations of a test off the shared server again: they would look at every run of the tests after it.

    Its SQLite is locked for minutes when they do so beside two workers with three runs each.
    """
    yield
    for one in post(prefect_server, "automations/filter", {}):
        request = urllib.request.Request(f"{prefect_server}/automations/{one['id']}", method="DELETE")
        urllib.request.urlopen(request, timeout=150).close()

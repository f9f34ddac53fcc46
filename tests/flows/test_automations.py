"""The automations on a real server, and a real webhook that they call."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from toy_project import REPOSITORY, await_true, post, quiet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that keeps what is posted to it."""
    received: list[dict[str, str]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Keep quiet."""

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/secret-path", received
        server.shutdown()
        thread.join()


def test_one_command_applies_them_twice_the_same_and_a_failed_run_is_told(
    project: Path, prefect_home: Path, prefect_server: str, webhook: tuple[str, list[dict[str, str]]]
) -> None:
    address, received = webhook
    environment = {**quiet(prefect_home), "PREFECT_API_URL": prefect_server, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "flows.cli", "automations"]
    for more in ({"DREAMBOOTH_WEBHOOK": address}, {}):
        done = subprocess.run(command, cwd=project, env=environment | more, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    found = [one for one in post(prefect_server, "automations/filter", {}) if one["name"].startswith("dreambooth: ")]
    assert sorted(one["name"] for one in found) == [
        "dreambooth: end runs whose worker died", "dreambooth: start crashed runs again", "dreambooth: tell people",
    ]  # fmt: skip
    assert "secret-path" not in json.dumps(found)

    program = "from flows.retrain import retrain; retrain(subject='tom', return_state=True)"
    failing = [sys.executable, "-c", program]
    subprocess.run(failing, cwd=project, env=environment, check=True, capture_output=True)
    await_true(lambda: received, 120)
    assert received[0]["flow"] == "retrain"
    assert received[0]["state"] == "Failed"
    assert "there is no subject 'tom'" in received[0]["message"]


def test_without_a_server_the_command_says_how_to_name_one(project: Path, prefect_home: Path) -> None:
    environment = {**quiet(prefect_home), "PREFECT_API_URL": "http://127.0.0.1:9/api", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "flows.cli", "automations"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "E_PIPELINE" in done.stderr
    assert "PREFECT_API_URL=http://HOST:4200/api" in done.stderr
    assert "Traceback" not in done.stderr

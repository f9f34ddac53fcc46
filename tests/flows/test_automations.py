"""The automations on a real server, and a real webhook that they call."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from toy_project import REPOSITORY, SHIPPED, post, quiet
from waiting import await_true

from flows.automations import SILENCE

JITTER = 1.3  # by which a worker of Prefect lengthens the time between two questions, at most


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


def test_a_lost_heartbeat_ends_no_run_and_a_dead_worker_is_replaced_within_75_seconds() -> None:
    from prefect.settings import Settings

    pool = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["definitions"]["pool"]
    every = float(pool["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert 2 * every < SILENCE
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHIPPED.items():
            patch.setenv(name, value)
        settings = Settings()
    looks = settings.server.events.proactive_granularity.total_seconds()
    assert SILENCE + looks + JITTER * settings.worker.query_seconds <= 75


def test_a_run_by_hand_is_as_alive_as_one_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["definitions"]["pool"]
    on_workers: dict[str, str] = pool["job_variables"]["env"]
    monkeypatch.delenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", raising=False)
    program = "import flows.personalize; from prefect.settings import get_current_settings; "
    program += "print(get_current_settings().flows.heartbeat_frequency)"  # set before prefect was imported
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == on_workers["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]


def test_the_page_for_operators_sets_what_these_tests_run_with() -> None:
    page = (REPOSITORY / "docs/operations.md").read_text()
    assert [name for name, value in SHIPPED.items() if f"export {name}={value}  " not in page] == []


@pytest.mark.slow
@pytest.mark.usefixtures("automations_for_now")
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


@pytest.mark.slow
@pytest.mark.usefixtures("automations_for_now")
def test_a_run_is_started_three_times_at_most_also_where_it_crashes_before_it_begins(
    project: Path, prefect_home: Path, prefect_server: str
) -> None:
    environment = {**quiet(prefect_home), "PREFECT_API_URL": prefect_server, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-m", "flows.cli", "automations"], cwd=project, env=environment, check=True)
    flow = post(prefect_server, "flows/", {"name": "personalize"})["id"]
    deployment = post(prefect_server, "deployments/", {"name": "for-nobody", "flow_id": flow})["id"]

    def start() -> str:
        return str(post(prefect_server, f"deployments/{deployment}/create_flow_run", {})["id"])

    def goes_through(run: str, *states: str) -> None:
        for one in states:
            body = {"state": {"type": one, "name": one.capitalize()}, "force": True}
            post(prefect_server, f"flow_runs/{run}/set_state", body)

    def state_of(run: str) -> str:
        return str(post(prefect_server, "flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})[0]["state_name"])

    def await_retry(run: str) -> None:
        await_true(lambda: state_of(run) == "AwaitingRetry", 60)

    early, late, other = start(), start(), start()
    goes_through(early, "PENDING", "RUNNING", "CRASHED")
    await_retry(early)
    goes_through(early, "PENDING", "CRASHED")  # its checkout is gone
    for _ in range(2):
        goes_through(late, "PENDING", "RUNNING", "CRASHED")
        await_retry(late)
    goes_through(late, "PENDING", "RUNNING", "CRASHED")
    goes_through(other, "PENDING", "RUNNING", "CRASHED")
    await_retry(other)  # events are looked at one after the other, so those before were
    assert [state_of(run) for run in (early, late)] == ["Crashed", "Crashed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "arguments", "said"),
    [
        ("http://127.0.0.1:9/api", [], "start that server: prefect server start"),
        ("", [], "name it: PREFECT_API_URL=http://HOST:4200/api"),
        ("http://127.0.0.1:9/api", ["--webhook", "example.org"], r"should be an address .* \(got 'example.org'\)"),
    ],
)
def test_without_a_server_that_stays_or_an_address_the_command_says_so(
    project: Path, prefect_home: Path, url: str, arguments: list[str], said: str
) -> None:
    environment = {**quiet(prefect_home), "PREFECT_API_URL": url, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "flows.cli", "automations", *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 9
    assert re.fullmatch(rf"E_PIPELINE: .*{said}.*\n", done.stderr)

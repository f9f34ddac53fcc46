import http.client
import http.server
import json
import logging
import math
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_registry import environment, mlflow
from waiting import await_true, free_port

from dreambooth import mlflowstore, tracking
from dreambooth.errors import RegistryError
from dreambooth.tracking import open_run, resend
from dreambooth.versions import find

KEY = "a1b2c3"


@pytest.fixture
def root(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a path that has to be quoted, far from the current folder."""
    folder = tmp_path / "my project 100%"
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_REGISTRY_URI", "DREAMBOOTH_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A picture to keep."""
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    return tmp_path / "grid.png"


@pytest.fixture
def dead_port() -> int:
    return free_port()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator["Server"]:
    """A server that answers everything with `server.status`, or with nothing while that is 0."""
    running = Server()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{running.server_address[1]}")
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.release.set()
    running.shutdown()
    running.server_close()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status = 500
        self.requests: list[str] = []
        self.release = threading.Event()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.server.status == 0:
            self.server.release.wait()
            return
        self.send_response(self.server.status if self.path.startswith("/api") else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


def stored_run(root: Path, key: str = KEY) -> Any:
    client, experiment = mlflowstore.connect(root)
    found = client.search_runs([experiment], f"tags.`dreambooth.key` = '{key}'")
    assert len(found) == 1
    return found[0]


def curve(root: Path, name: str, key: str = KEY) -> list[tuple[int, float]]:
    history = mlflowstore.connect(root)[0].get_metric_history(stored_run(root, key).info.run_id, name)
    return sorted((point.step, point.value) for point in history)


def test_parameters_curves_pictures_and_files_arrive(root: Path, tmp_path: Path, grid: Path) -> None:
    table = tmp_path / "loss.csv"
    table.write_text("step,loss\n")
    with open_run(root, key=KEY, name="train biscuit", tags={"subject": "biscuit"}) as run:
        run.params({"train.learning_rate": 5e-6, "train.seeds": [1, 2]})
        for step in range(1200):
            run.metrics({"loss": step / 2, "grad_norm": 1.0}, step)
        run.metrics({"total": 3})
        run.file(grid, "pictures")
        run.file(table, "tables")
        table.unlink()  # it was taken as it was
    stored = stored_run(root)
    assert stored.info.run_name == "train biscuit"
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"train.learning_rate": "5e-06", "train.seeds": "[1, 2]"}
    assert stored.data.tags["subject"] == "biscuit"
    assert curve(root, "loss") == [(step, step / 2) for step in range(1200)]
    assert curve(root, "total") == [(0, 3.0)]
    kept = root / "mlartifacts" / stored.info.run_id / "artifacts"
    with Image.open(kept / "pictures/grid.png") as picture:
        assert picture.size == (4, 4)
    assert (kept / "tables/loss.csv").read_text() == "step,loss\n"
    assert not list((root / ".scratch/unsent").iterdir())
    assert not list(Path.cwd().iterdir())  # no ./mlruns, no ./mlflow.db


def test_stages_of_one_model_share_one_run(root: Path) -> None:
    with open_run(root, key=KEY, name="biscuit") as run:
        run.metrics({"loss": 1.0}, 1)
    with open_run(root, key=KEY, name="biscuit", tags={"stage": "evaluate"}) as run:
        run.metrics({"identity": 0.5})
    assert stored_run(root).data.metrics == {"loss": 1.0, "identity": 0.5}
    assert stored_run(root).data.tags["stage"] == "evaluate"


def test_a_parameter_that_changed_becomes_a_tag(root: Path) -> None:
    for guidance in (7.5, 5.0):
        with open_run(root, key=KEY, name="biscuit") as run:
            run.params({"guidance_scale": guidance, "seed": 1})
    assert stored_run(root).data.params == {"guidance_scale": "7.5", "seed": "1"}
    assert stored_run(root).data.tags["changed.guidance_scale"] == "5.0"


def test_runs_of_one_process_do_not_mix(root: Path) -> None:
    with open_run(root, key="one", name="one") as one, open_run(root, key="two", name="two") as two:
        for step in range(10):
            one.metrics({"loss": 1}, step)
            two.metrics({"loss": 2}, step)
    assert curve(root, "loss", "one") == [(step, 1) for step in range(10)]
    assert curve(root, "loss", "two") == [(step, 2) for step in range(10)]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError(), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(75), "KILLED")]
)
def test_the_status_says_how_it_ended(root: Path, error: BaseException, status: str) -> None:
    def train() -> None:
        with open_run(root, key=KEY, name="biscuit") as run:
            run.metrics({"loss": 1}, 1)
            raise error

    with pytest.raises(type(error)):
        train()
    assert stored_run(root).info.status == status
    assert curve(root, "loss") == [(1, 1)]


def test_values_that_mlflow_does_not_take_are_made_fit(root: Path) -> None:
    with open_run(root, key=KEY, name="biscuit", tags={"a?b": "x" * 9000}) as run:
        run.params({"prompts": "y" * 9000, "none": None})
        run.metrics({"loss": math.nan, "norm": math.inf, "none": None, "a<b": 1}, 3)
    data = stored_run(root).data
    assert math.isnan(data.metrics["loss"])
    assert data.metrics["norm"] == sys.float_info.max
    assert data.metrics["a_b"] == 1
    assert "none" not in data.metrics
    assert data.params["prompts"].endswith("... (9000 characters)")
    assert data.tags["a_b"].startswith("xxx")


@pytest.mark.fault(28)
def test_a_dead_server_costs_one_warning_and_the_next_run_sends_the_rest(
    root: Path, dead_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, grid: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{dead_port}")
    start = time.monotonic()
    with open_run(root, key=KEY, name="train biscuit", tags={"subject": "biscuit"}) as run:
        run.params({"seed": 1})
        run.metrics({"loss": math.nan, "norm": 2.0}, 1)
        run.file(grid, "pictures")
    assert time.monotonic() - start < 10
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    for part in ("train biscuit", "Connection refused", "2 metrics", "1 files", "***@127.0.0.1", "unsent"):
        assert part in line
    assert "secret" not in line
    assert resend(root)  # still dead: it waits on
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with open_run(root, key="another", name="train rex"):
        pass
    stored = stored_run(root)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"seed": "1"}
    assert curve(root, "norm") == [(1, 2.0)]
    assert (root / "mlartifacts" / stored.info.run_id / "artifacts/pictures/grid.png").exists()
    assert not list((root / ".scratch/unsent").iterdir())


@pytest.fixture
def ssh_port() -> Iterator[int]:
    """A port on which somebody greets as a server of SSH does, and not as one of HTTP."""

    class Greeter(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Greeter) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "address", ["localhost:500O", "a b:5000", "[::1", "127.0.0.1:{ssh_port}", "me:WORD/x@127.0.0.1:{ssh_port}"]
)
def test_an_address_that_is_none_of_mlflow_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, ssh_port: int, address: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address.format(ssh_port=ssh_port)}")
    line = r"^cannot find biscuit in http://.*: MLFLOW_TRACKING_URI names no HTTP server: "
    with pytest.raises(RegistryError, match=line) as refused:
        find(root, "biscuit")
    assert "\n" not in str(refused.value)
    assert "WORD" not in str(refused.value)


def test_what_is_sent_twice_stands_there_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "connect", lambda root: (_ for _ in ()).throw(OSError(111, "Connection refused")))
        with open_run(root, key=KEY, name="biscuit") as run:
            run.metrics({"loss": 1}, 1)
    (pending,) = (root / ".scratch/unsent").glob("*/pending.json")
    kept = pending.parent.with_name("copy")
    shutil.copytree(pending.parent, kept)
    assert resend(root) == []
    assert curve(root, "loss") == [(1, 1)]
    assert json.loads(json.dumps(curve(root, "loss"))) == [[1, 1]]


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.fault(28)
def test_a_server_that_says_no_is_named_and_not_asked_again(
    root: Path, server: Server, status: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.05)
    server.status = status
    with open_run(root, key=KEY, name="train biscuit") as run:
        run.metrics({"loss": 1}, 1)
        time.sleep(1)
    assert len([path for path in server.requests if path.startswith("/api")]) == 1
    assert f"HTTP {status}; set MLFLOW_TRACKING_USERNAME" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.fault(28)
def test_a_server_with_errors_is_asked_again_a_few_times(
    root: Path, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    with open_run(root, key=KEY, name="train biscuit") as run:
        run.metrics({"loss": 1}, 1)
    assert 3 <= len([path for path in server.requests if path.startswith("/api")]) <= 6
    assert "too many 500 error responses" in caplog.text


@pytest.mark.fault(28)
def test_a_server_that_never_answers_stalls_nothing(
    root: Path, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    server.status = 0
    start = time.monotonic()
    with open_run(root, key=KEY, name="train biscuit") as run:
        for step in range(10_000):
            run.metrics({"loss": 1.0}, step)
        assert time.monotonic() - start < 10  # a single request that waits for its answer takes as long
    assert time.monotonic() - start < 20
    assert "no answer in time" in caplog.text
    assert "10000 metrics" in caplog.text


def test_who_is_told_to_stop_does_not_wait_until_mlflow_gives_up(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "KILLED_SECONDS", 0.5)
    server.status = 0
    runs: list[tracking.Run] = []

    def train() -> None:
        with open_run(root, key=KEY, name="train biscuit") as run:
            runs.append(run)
            run.metrics({"loss": 1}, 1)
            raise SystemExit(75)

    with pytest.raises(SystemExit):
        train()
    assert runs[0]._thread.is_alive()  # it waits for its answer, for CONNECT_SECONDS: less than CLOSE_SECONDS


def test_the_backlog_of_an_outage_is_bounded(
    root: Path, dead_port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{dead_port}")
    monkeypatch.setattr(tracking, "MAX_BUFFERED", 100)
    with open_run(root, key=KEY, name="train biscuit") as run:
        for step in range(150):
            run.metrics({"loss": 1}, step)
    assert "50 metrics of 'train biscuit' were dropped" in caplog.text


def test_whoever_trains_sends_no_request_itself(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch, grid: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.05)
    senders: list[int] = []
    begun, send = threading.Event(), http.client.HTTPConnection.send

    def watch(connection: http.client.HTTPConnection, content: Any) -> None:
        senders.append(threading.get_ident())
        begun.set()
        send(connection, content)

    monkeypatch.setattr(http.client.HTTPConnection, "send", watch)
    with open_run(root, key=KEY, name="biscuit", tags={"subject": "biscuit"}) as run:
        run.params({"seed": 1})
        run.file(grid, "pictures")
        assert begun.wait(60)
        for step in range(2000):
            run.metrics({"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0}, step)
    assert server.requests
    assert threading.get_ident() not in senders


def test_tracking_can_be_switched_off(root: Path, monkeypatch: pytest.MonkeyPatch, grid: Path) -> None:
    monkeypatch.setenv("DREAMBOOTH_TRACKING", "off")
    with open_run(root, key=KEY, name="biscuit") as run:
        run.params({"a": 1})
        run.metrics({"loss": 1}, 1)
        run.file(grid, "pictures")
    assert not (root / ".scratch").exists()


def test_the_environment_names_store_and_experiment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mlflowstore.tracking_uri(root) == f"sqlite:///{root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    client, experiment = mlflowstore.connect(root)
    assert client.get_experiment(experiment).name == "mine"
    assert client.get_experiment(experiment).artifact_location == (root / "mlartifacts").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert mlflowstore.tracking_uri(root) == "http://127.0.0.1:5000"


def test_a_clone_that_uses_the_database_of_its_home_keeps_the_files_there_too(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "first made by a clone")
    client, experiment = mlflowstore.connect(clone)
    assert client.get_experiment(experiment).artifact_location == (root / "mlartifacts").as_uri()


def test_a_key_that_is_no_hash_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="should be a hash"), open_run(root, key="a' OR 'a", name="biscuit"):
        pass


def test_importing_it_does_not_import_mlflow() -> None:
    program = "import sys, dreambooth.tracking, dreambooth.registry; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_three_processes_may_meet_a_new_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DREAMBOOTH_TRACKING")
    program = """
import sys
from pathlib import Path
from dreambooth.tracking import open_run
with open_run(Path(sys.argv[1]), key=sys.argv[2], name=sys.argv[2]) as run:
    run.metrics({"loss": 1}, 1)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen([*command, key], stderr=subprocess.PIPE, text=True) for key in ("a", "b", "c")]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    for key in ("a", "b", "c"):
        assert curve(tmp_path, "loss", key) == [(1, 1)], errors


@pytest.mark.slow
def test_metrics_arrive_when_the_server_comes_back(
    root: Path,
    dead_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    grid: Path,
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.5)
    monkeypatch.setattr(tracking, "MAX_PAUSE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{dead_port}")
    store = tmp_path / "server"
    store.mkdir()
    command = ["server", "--port", str(dead_port), "--workers", "1", "--backend-store-uri", "sqlite:///mlflow.db"]
    with open_run(root, key=KEY, name="train biscuit") as run:
        run.metrics({"loss": 1.0, "nan": math.nan}, 1)
        await_true(lambda: run._error)
        with mlflow(command, dead_port, "/health", environment(store) | {"MLFLOW_TRACKING_URI": ""}, store):
            run.metrics({"loss": 2.0}, 2)
            run.file(grid, "pictures")
            run.close()
            stored = stored_run(root)
            assert curve(root, "loss") == [(1, 1.0), (2, 2.0)]
            assert math.isnan(stored.data.metrics["nan"])
            files = mlflowstore.connect(root)[0].list_artifacts(stored.info.run_id, "pictures")
            assert [entry.path for entry in files] == ["pictures/grid.png"]
    assert "did not take" not in caplog.text

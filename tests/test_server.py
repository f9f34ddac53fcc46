"""A real MLflow server over HTTP: uploads that are cut, checkouts that register at once, a thousand versions."""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from registered import BISCUIT, load, write_evaluation, write_export, write_project
from test_registry import environment, mlflow
from waiting import free_port

from dreambooth import aliases, mlflowstore
from dreambooth.errors import RegistryError
from dreambooth.params import load_params
from dreambooth.promotion import promote, rollback
from dreambooth.registry import register
from dreambooth.versions import find, rows

pytestmark = pytest.mark.slow
SMALL = 100_000  # bytes: more than any question to MLflow, less than the weights


class Proxy(threading.Thread):
    """Hand bytes on between clients and a server, count the requests, and cut connections that upload too much."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.target, self.limit, self.requests = port, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # closed at the end
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Hand on both directions of one connection until both have ended."""
        with client, socket.create_connection(("127.0.0.1", self.target)) as server:
            answers = threading.Thread(target=self._pump, args=(server, client, False), daemon=True)
            answers.start()
            self._pump(client, server, True)
            answers.join()

    def _pump(self, source: socket.socket, sink: socket.socket, is_upload: bool) -> None:
        passed = 0
        try:
            while data := source.recv(65536):
                passed += len(data)
                self.requests += data.count(b" HTTP/1.1\r\n") if is_upload else 0
                if is_upload and self.limit and passed > self.limit:
                    break
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Path]]:
    """A server behind a proxy, and its folder."""
    from mlflow.tracking import MlflowClient

    store, port = tmp_path_factory.mktemp("server"), free_port()
    MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")
    command = ["server", "--port", str(port), "--workers", "1", "--backend-store-uri", "sqlite:///mlflow.db"]
    with mlflow(command, port, "/health", environment(store) | {"MLFLOW_TRACKING_URI": ""}, store):
        proxy = Proxy(port)
        proxy.start()
        yield proxy, store
        proxy.listener.close()


@pytest.fixture
def proxy(server: tuple[Proxy, Path], monkeypatch: pytest.MonkeyPatch) -> Proxy:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server[0].port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    return server[0]


@pytest.fixture
def root(tmp_path: Path, tiny_model_folder: Path) -> Path:
    (tmp_path / "nothing").touch()
    write_project(tmp_path / "project", tmp_path / "nothing")
    (tmp_path / "project" / "mlflow.db").unlink()
    write_export(tmp_path / "project", tiny_model_folder, "1" * 64)
    write_evaluation(tmp_path / "project", "1" * 64, 0.5)
    return tmp_path / "project"


def all_of(root: Path, name: str = BISCUIT) -> list[int]:
    return [int(one.version) for one in mlflowstore.connect(root)[0].search_model_versions(f"name = '{name}'")]


@pytest.mark.fault(29)
def test_an_upload_that_is_cut_registers_nothing_and_its_repetition_once(root: Path, proxy: Proxy) -> None:
    proxy.limit = SMALL
    try:
        with pytest.raises(RegistryError, match=r"cannot register biscuit .*repeat this alone: dreambooth register"):
            register(root, BISCUIT)
    finally:
        proxy.limit = 0
    assert find(root, BISCUIT) is None
    assert register(root, BISCUIT).created
    assert not register(root, BISCUIT).created
    assert all_of(root) == [1]
    assert load(root, BISCUIT).predict({"prompt": "a photo of sks dog"})[0].startswith(b"\x89PNG")
    params = load_params(root / "params.yaml")
    assert promote(root, params, BISCUIT).champion == 1
    with pytest.raises(RegistryError, match="no champion before version 1"):
        rollback(root, params, BISCUIT)
    assert rows(root, BISCUIT)[0].faults == ()


def test_two_checkouts_that_register_at_once_make_one_version(
    root: Path, tmp_path: Path, proxy: Proxy, tiny_model_folder: Path
) -> None:
    """They share no lock: only what the server tells them."""
    for folder in (root, tmp_path / "clone"):
        if folder != root:
            shutil.copytree(root, folder)
        shutil.rmtree(folder / "export")
        write_export(folder, tiny_model_folder, "7" * 64, subject="rex")
    program = "import sys; from pathlib import Path; from dreambooth.registry import register; "
    program += "print(register(Path(sys.argv[1]), 'rex').version)"
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
        for folder in (root, tmp_path / "clone")
    ]
    assert {one.communicate(timeout=300)[0].split()[-1] for one in running} == {"1"}
    assert all_of(root, "rex") == [1]
    assert find(root, "rex", alias="challenger") is not None
    assert aliases.history(aliases.read_log(mlflowstore.connect(root)[0], "rex"), "challenger") == [1]


def test_status_asks_as_little_of_a_thousand_versions_as_of_one(
    root: Path, proxy: Proxy, server: tuple[Proxy, Path]
) -> None:
    register(root, BISCUIT)
    command = [sys.executable, "-m", "flows.cli", "status"]
    few = _requests(command, root, proxy)
    _repeat_version(server[1] / "mlflow.db", 1000)
    assert len(all_of(root)) == 1000
    assert _requests(command, root, proxy) <= few + 1  # all of the same files: which of them is the challenger
    assert rows(root, BISCUIT, limit=20)[0].version == 1000


def _requests(command: list[str], root: Path, proxy: Proxy) -> int:
    if not (root / ".dvc").exists():
        from dvc.repo import Repo

        Repo.init(str(root), no_scm=True).close()
        shutil.copy(Path(__file__).parent / "flows" / "toy.dvc.yaml", root / "dvc.yaml")
    before = proxy.requests
    done = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return proxy.requests - before


def _repeat_version(database: Path, count: int) -> None:
    """Write the rows of versions 2 to `count` as MLflow wrote those of version 1."""
    connection = sqlite3.connect(database, timeout=60)
    for table in ("model_versions", "model_version_tags"):
        cursor = connection.execute(f"SELECT * FROM {table} WHERE name = ? AND version = 1", [BISCUIT])
        names = [column[0] for column in cursor.description]
        found: list[tuple[Any, ...]] = cursor.fetchall()
        at = names.index("version")
        copies = [(*row[:at], number, *row[at + 1 :]) for row in found for number in range(2, count + 1)]
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(names))})", copies)
    connection.commit()
    connection.close()

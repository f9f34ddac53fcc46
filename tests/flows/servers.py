"""Servers of MLflow and Prefect that can be killed and started again on the same port and database, and refusals."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from toy_project import kill_tree, quiet
from waiting import await_server, free_port

LEASES = "prefect.server.concurrency.lease_storage.filesystem"


class Server:
    """A program that serves on a port of its own."""

    def __init__(self, command: list[str], health: str, environment: dict[str, str], folder: Path) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(self.port)]
        self._health, self._environment, self._folder = health, environment, folder
        folder.mkdir(exist_ok=True)

    def start(self) -> None:
        """Start it, also once more; `await_it` says when it answers."""
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def await_it(self) -> None:
        await_server(self.address + self._health, self._process, self._folder / "log")

    def kill(self) -> None:
        """End it at once, as a power failure would."""
        kill_tree(self._process.pid)
        self._process.wait()


def prefect_with_leases(folder: Path) -> Server:
    """A server that keeps who has which slot in files, as docs/operations.md sets it."""
    environment = {**quiet(folder), "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES}
    return Server(["prefect", "server", "start"], "/api/health", environment, folder)


def mlflow_with_database(folder: Path) -> Server:
    """A server of one process."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # starts uvicorn by name
    command = ["mlflow", "server", "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    return Server(command, "/health", environment, folder)


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Run servers until the block ends."""
    for one in servers:
        one.start()
    try:
        for one in servers:
            one.await_it()
        yield
    finally:
        for one in servers:
            one.kill()


@contextmanager
def refusing(status: int) -> Iterator[str]:
    """Answer whatever is asked with one status; yield the address."""

    class Refusing(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":  # as DVC sends files; unread it would be a request
                while size := int(self.rfile.readline(), 16):
                    self.rfile.read(size + 2)
                self.rfile.readline()
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - the names of its base

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

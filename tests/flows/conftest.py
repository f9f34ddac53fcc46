"""A toy project that DVC and Prefect run for real, in a temporary folder."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from toy_project import REPOSITORY, await_health, make_photos, quiet

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep DVC's and our caches out of the home of whoever tests."""
    folder = tmp_path_factory.mktemp("caches")
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "DREAMBOOTH_CACHE"):
        monkeypatch.setenv(name, str(folder / name))
    monkeypatch.setenv("DVC_TEST", "true")  # asks nobody for a newer version
    monkeypatch.delenv("DREAMBOOTH_HOME", raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a project of two dogs, biscuit and rex, none of whose stages ever ran."""
    from dvc.repo import Repo

    root = tmp_path / "a project"
    root.mkdir()
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["subjects"] = {name: {"class_id": "dog", "identifier": "sks", "kind": "live"} for name in ("biscuit", "rex")}
    params["classes"] = {"dog": {"class_noun": "dog"}}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    shutil.copy(HERE / "toy.py", root / "toy.py")
    shutil.copy(HERE / "toy.dvc.yaml", root / "dvc.yaml")
    for number, name in enumerate(params["subjects"]):
        make_photos(root / "data" / "subjects" / name, 3, seed=number)
    Repo.init(str(root), no_scm=True).close()
    return root


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def prefect_server(prefect_home: Path) -> Iterator[str]:
    """Start a server on a free port; yield its API's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = (prefect_home / "server.log").open("w")
    with log, subprocess.Popen(command, env=quiet(prefect_home), stdout=log, stderr=log) as server:
        try:
            await_health(f"http://127.0.0.1:{port}/api/health", prefect_home / "server.log")
            yield f"http://127.0.0.1:{port}/api"
        finally:
            server.terminate()

"""What the tests of the flows do with a toy project: draw photos, call dvc, read which stages ran."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
# What docs/operations.md sets for server and worker, so that a dead worker is found out soon: docs/decisions/0063.
SHIPPED = {
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "5",
    "PREFECT_WORKER_QUERY_SECONDS": "5",
}


def make_toy_project(root: Path, subjects: dict[str, str]) -> Path:
    """Make a project of these subjects and their classes, none of whose stages ever ran."""
    from dvc.repo import Repo

    root.mkdir()
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["subjects"] = {
        name: {"class_id": class_id, "identifier": "sks", "kind": "live"} for name, class_id in subjects.items()
    }
    params["classes"] = {class_id: {"class_noun": class_id} for class_id in subjects.values()}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (root / params["base"]["pretrained_model_name_or_path"]).mkdir(parents=True)
    shutil.copytree(REPOSITORY / "data/prompts", root / "data/prompts")
    shutil.copy(HERE / "toy.py", root / "toy.py")
    shutil.copy(HERE / "toy.dvc.yaml", root / "dvc.yaml")
    for number, name in enumerate(subjects):
        make_photos(root / "data" / "subjects" / name, 3, seed=number)
    Repo.init(str(root), no_scm=True).close()
    return root


def make_photos(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Draw photos that no perceptual hash takes for one another."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        picture = Image.new("RGB", (96, 96), "white")
        corner = 8 * ((3 * number + seed) % 8)
        draw = ImageDraw.Draw(picture)
        draw.ellipse((corner, 4 + 9 * number, corner + 24 + 8 * number, 40 + 9 * number), fill=(200, 40 * number, 20))
        draw.rectangle((70 - 20 * number, 60, 90 - 20 * number, 60 + 10 * number + 5), fill="navy")
        paths.append(folder / f"photo {number}.png")
        picture.save(paths[-1])
    return paths


def git(folder: Path, *arguments: str) -> str:
    """Run git as the runs do."""
    from flows import commandline

    return commandline.git(folder, *commandline.ROBOT, *arguments)


def make_origin(root: Path) -> Path:
    """Put a project into git, with a folder beside it as the DVC remote; return the bare repository beside it."""
    (root / ".gitignore").write_text("/build\n/models\n/metrics\n/reports\n/export\n/.scratch\n*.db\nran.log\n")
    (root / ".dvc/config").write_text("")
    git(root, "init", "--quiet", "--initial-branch", "main")
    dvc(root, "remote", "add", "--default", "store", str(root.parent / "remote"))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "toy")
    origin = root.parent / "origin.git"
    git(root.parent, "clone", "--quiet", "--bare", str(root), str(origin))
    return origin


def dvc(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the dvc command as a person would, in the environment of these tests."""
    from flows.commandline import child_environment

    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env=child_environment(root),
        capture_output=True,
        text=True,
        check=True,
    )


def ran(root: Path) -> list[str]:
    """Return which stages ran since the last call."""
    log = root / "ran.log"
    stages = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return stages


def quiet(prefect_home: Path) -> dict[str, str]:
    """Return an environment in which prefect keeps to one folder and reports nothing."""
    return {
        **os.environ,
        **SHIPPED,
        "PREFECT_HOME": str(prefect_home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def post(api: str, path: str, body: dict[str, Any]) -> Any:
    """Ask the server of Prefect."""
    request = urllib.request.Request(
        f"{api}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    for _ in range(9):
        try:
            with urllib.request.urlopen(request, timeout=150) as answer:  # it waits a minute for its database itself
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code != 503:  # its database is locked for a moment; Prefect's own client tries again as well
                raise
            time.sleep(2)
    pytest.fail(f"the server answers {path} with 503")


def prefect(environment: dict[str, str], *arguments: str, folder: Path = REPOSITORY) -> str:
    """Run the prefect command as a person would."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def worker(
    environment: dict[str, str], log: Path, name: str, pool: str = "dreambooth", limit: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker in a process group of its own; with `limit`, resuming a suspended run at once ends it (0100)."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "worker", "start", "--pool", pool, "--name", name]
    command += ["--type", "process", "--install-policy", "never", *(["--limit", str(limit)] if limit else [])]
    with (
        log.open("a") as out,
        subprocess.Popen(
            command, cwd=log.parent, env=environment, stdout=out, stderr=out, start_new_session=True
        ) as process,
    ):
        try:
            yield process
        finally:
            kill_tree(process.pid)


def kill_tree(pid: int) -> None:
    """End a process and all below it at once, as a power failure would."""
    try:
        parent = psutil.Process(pid)
        below = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(below, 30)

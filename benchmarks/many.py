"""What do commands cost that have nothing to do? `plan` over 1,000 subjects, `status` and `retrain` over 50 unchanged.

    python -m benchmarks.many [--planned 1000] [--unchanged 50] [--folder FOLDER]

The projects have the dvc.yaml and the code of this repository; what the stages of the unchanged subjects would have
made is a manifest and a small file each, committed to DVC and registered in MLflow. A retraining asks a Prefect server
of its own. CPU seconds are those of the command alone; wall seconds mean something on a quiet machine only.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import usage
from benchmarks.recipe import ROOT
from benchmarks.usage import CommandError
from dreambooth import mlflowstore
from dreambooth.folders import content_hash, new_folder
from dreambooth.versions import HASH_TAG
from dreambooth.yaml12 import dump_yaml, load_yaml

CLASSES = 5
OUTPUTS = ("build/{}/instance", "models/{}", "build/{}/evaluation", "reports/{}", "export/{}")
RETRAIN = "from flows.retrain import retrain; state = retrain(return_state=True); print(state.name, state.message)"


def make_project(root: Path, count: int, environment: dict[str, str]) -> list[str]:
    """Make a project of so many subjects whose stages never ran; return their ids."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("dreambooth", "stages", "data/prompts", "data/classes"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    shutil.copy(ROOT / "dvc.yaml", root)
    subjects = [f"subject-{number:04d}" for number in range(count)]
    values = load_yaml((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["classes"] = {f"class-{number}": {"class_noun": "dog"} for number in range(CLASSES)}
    values["subjects"] = {
        name: {"class_id": f"class-{number % CLASSES}", "identifier": "sks", "kind": "live"}
        for number, name in enumerate(subjects)
    }
    base = root / values["base"]["pretrained_model_name_or_path"]
    base.mkdir(parents=True)
    (base / "model.txt").write_text("a base model")
    (root / "params.yaml").write_text(dump_yaml(values), encoding="utf-8")
    for name in subjects:
        folder = root / "data/subjects" / name
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{number}.png").write_bytes(f"{name} {number}".encode())
    dvc(root, environment, "init", "--no-scm")
    return subjects


def dvc(root: Path, environment: dict[str, str], *arguments: str) -> None:
    """Run the dvc command in a project."""
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "--quiet"], cwd=root, env=environment, check=True)


def pretend(root: Path, subjects: list[str], environment: dict[str, str]) -> None:
    """Write what the stages would have made, and register the exports."""
    (root / "metrics").mkdir()
    folders = [f"build/classes/class-{number}" for number in range(CLASSES)]
    for name in subjects:
        folders += [output.format(name) for output in OUTPUTS]
        (root / "metrics" / f"{name}.json").write_text("{}")
    for place in folders:
        with new_folder(root / place, {"what": place}) as folder:
            (folder / "file.txt").write_text(place)
    dvc(root, environment, "commit", "--force")
    client, _ = mlflowstore.connect(root)
    for name in subjects:
        client.create_registered_model(name)
        client.create_model_version(name, "none", tags={HASH_TAG: content_hash(root / "export" / name)})


@contextmanager
def prefect_server(environment: dict[str, str], log: Path) -> Iterator[str]:
    """Start a server on a free port; yield the address of its API."""
    port = usage.free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as server:
        try:
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2):
                        break
                except OSError:
                    if server.poll() is not None:
                        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                        raise CommandError(f"the server of Prefect ended with {server.returncode}:\n{last}") from None
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/api"
        finally:
            server.terminate()


def say(what: str, cost: usage.Usage) -> None:
    """Print a line."""
    sys.stdout.write(f"{what}: {cost.wall:.1f} s, {cost.cpu:.1f} s of CPU, {cost.memory:.0f} MB\n")
    sys.stdout.flush()


def measure(folder: Path, planned: int, unchanged: int) -> None:
    """Make the projects and time the commands."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DVC_SITE_CACHE_DIR": str(folder / "dvc"),
        "DVC_NO_ANALYTICS": "1",
    }
    environment.pop("DREAMBOOTH_HOME", None)
    dreambooth = [sys.executable, "-m", "flows.cli"]
    log = folder / "log"
    many, few = folder / "planned", folder / "unchanged"
    if planned and not many.exists():
        make_project(many, planned, environment)
    if unchanged and not few.exists():
        pretend(few, make_project(few, unchanged, environment), environment)
    if planned:
        say(f"plan, {planned} subjects that never ran", usage.run([*dreambooth, "plan"], many, environment, log))
    if unchanged:
        say(f"plan, {unchanged} unchanged", usage.run([*dreambooth, "plan"], few, environment, log))
        say(f"status, {unchanged} unchanged", usage.run([*dreambooth, "status"], few, environment, log))
        with prefect_server(environment, folder / "server.log") as api:
            asked = environment | {"PREFECT_API_URL": api}
            say(f"retrain, {unchanged} unchanged", usage.run([sys.executable, "-c", RETRAIN], few, asked, log))


def main() -> None:
    """Measure in a temporary folder, or in one that is kept and used again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planned", type=int, default=1000, help="subjects of the plan; 0 leaves it out")
    parser.add_argument("--unchanged", type=int, default=50, help="subjects of the retraining; 0 leaves it out")
    parser.add_argument("--folder", type=Path, help="keep the projects here")
    given = parser.parse_args()
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
        measure(given.folder.absolute(), given.planned, given.unchanged)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), given.planned, given.unchanged)


if __name__ == "__main__":
    main()

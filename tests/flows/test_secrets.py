"""A secret of the environment reaches neither the log of a flow, nor a database, nor a cache."""

import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import REPOSITORY, quiet

CANARY = "canary-51c2d8e0"


@pytest.mark.slow
@pytest.mark.threat(17)
def test_what_a_stage_tells_is_cleaned_in_logs_and_databases(project: Path, tmp_path: Path) -> None:
    for stage in ("prior-dog", "validate-biscuit", "train-biscuit"):
        (project / f"tells-{stage}").touch()
    (project / "fail-evaluate-biscuit").touch()
    home = tmp_path / "prefect"
    environment = {**quiet(home), "PYTHONPATH": str(REPOSITORY), "HF_TOKEN": CANARY, "MLFLOW_TRACKING_PASSWORD": CANARY}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.personalize", "biscuit"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr[-2000:]
    said = done.stdout + done.stderr
    assert CANARY not in said
    assert "signed in with *** at https://***@hub" in said
    files = [path for folder in (project, home) for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []

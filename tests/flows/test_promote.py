"""The flow of promotions: one subject that is refused does not stop the others, and is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import quiet

# A gate whose verdict stands in the name of the subject; everything else is real.
PROGRAM = """
import sys
from pathlib import Path
from dreambooth import promotion
from dreambooth.errors import GateError
from dreambooth.promotion import Promotion

calls = []

def promote(root, params, subject_id, version=None, force=None, rescore=None, trained=None, say=None):
    calls.append(subject_id)
    if subject_id == "rex":
        raise GateError("keep: identity +0.000")
    return Promotion(subject_id, 2, 1, "promote", "promote: identity +0.100")

promotion.promote = promote
from flows.promote import run
import json
print(json.dumps([run([], Path(sys.argv[1])), calls]))
"""


@pytest.mark.slow
def test_a_refusal_is_told_tried_once_and_stops_nobody(project: Path, prefect_home: Path, prefect_server: str) -> None:
    told = {"title": "biscuit", "decision": {"line": "-"}, "metrics": {"identity": {"base": 0.4, "personalised": 0.5}}}
    (project / "reports/biscuit").mkdir(parents=True)
    (project / "reports/biscuit/report.json").write_text(json.dumps(told))
    command = [sys.executable, "-c", PROGRAM, str(project)]
    environment = {**quiet(prefect_home), "PREFECT_API_URL": prefect_server}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failures, calls = json.loads(done.stdout.splitlines()[-1])
    assert failures == ["E_GATE: keep: identity +0.000"]
    assert calls == ["biscuit", "rex"]
    assert "biscuit/index.html" in (project / "reports/index.html").read_text()

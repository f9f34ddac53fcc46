import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from toy_project import dvc, make_toy_project, post, prefect, quiet, ran
from waiting import await_true

from dreambooth import mlflowstore, tracking
from dreambooth.interruption import is_alive
from flows import lanes
from flows.graph import Graph

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ENTRIES = ("validate", "train", "evaluate", "report", "export")
ALL = [
    "prior@dog",
    *(f"{entry}@{subject}" for subject in ("biscuit", "rex") for entry in ENTRIES),
]


@pytest.fixture
def environment(prefect_home: Path, prefect_server: str) -> dict[str, str]:
    return {**quiet(prefect_home), "PREFECT_API_URL": prefect_server}


def personalize(root: Path, environment: dict[str, str], *subjects: str) -> tuple[dict[str, Any], str]:
    """Return what the flow did, and its log."""
    command = [sys.executable, str(HERE / "flow_program.py"), str(root), *subjects]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def newest_run(server: str) -> dict[str, Any]:
    """Return the run begun last; the server is shared, and other tests leave runs that a clock will begin."""
    begun = {"flows": {"name": {"any_": ["personalize"]}}, "flow_runs": {"start_time": {"is_null_": False}}}
    newest: dict[str, Any] = post(server, "flow_runs/filter", {**begun, "sort": "START_TIME_DESC", "limit": 1})[0]
    return newest


def test_flow_runs_what_is_stale_in_order_and_registers_then_does_nothing(
    project: Path, environment: dict[str, str], prefect_server: str
) -> None:
    outcome, log = personalize(project, environment)
    done = ran(project)
    assert sorted(done) == sorted(ALL)
    assert done.index("prior@dog") < done.index("train@biscuit") < done.index("export@biscuit")
    assert outcome["failures"] == []
    assert {run["stage"]: run["outcome"] for run in outcome["runs"]} == dict.fromkeys(ALL, "ran")
    assert [version["created"] for version in outcome["versions"]] == [True, True]
    assert "train@rex: never ran" in log
    dvc(project, "repro")
    assert ran(project) == []

    again, log = personalize(project, environment)
    assert again["runs"] == []
    assert [version["created"] for version in again["versions"]] == [False, False]
    assert "prior dog: 2 reused, 0 generated" in log
    assert ran(project) == []

    newest_first = post(prefect_server, "artifacts/filter", {"sort": "CREATED_DESC"})  # the server is shared
    artifacts = {one["key"]: one["data"] for one in reversed(newest_first)}
    assert "data:image/png;base64,iVBOR" in artifacts["subject-biscuit"]
    assert "0.300 (base) -&gt; 0.600" in artifacts["subject-biscuit"]
    assert "promote: identity +0.300" in artifacts["subject-biscuit"]
    assert "reports/biscuit/index.html" in artifacts["subject-biscuit"]
    assert "in space" in artifacts["prompts-rex"]
    assert "rex: sks dog" in artifacts["personalize"]
    index = (project / "reports/index.html").read_text()
    assert 'href="biscuit/index.html"' in index
    assert 'href="rex/index.html"' in index


@pytest.mark.fault(39)
def test_a_run_that_is_called_crashed_though_it_finished_is_repeated_without_work(
    project: Path, environment: dict[str, str], prefect_server: str
) -> None:
    first, _ = personalize(project, environment, "rex")
    ran(project)
    run = newest_run(prefect_server)
    assert run["state"]["type"] == "COMPLETED"
    crashed = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}
    post(prefect_server, f"flow_runs/{run['id']}/set_state", crashed)
    again, _ = personalize(project, environment, "rex")
    assert again["failures"] == []
    assert again["runs"] == []
    assert [version["created"] for version in again["versions"]] == [False]
    assert again["versions"][0]["export_hash"] == first["versions"][0]["export_hash"]
    assert ran(project) == []
    newest = newest_run(prefect_server)
    assert newest["state"]["type"] == "COMPLETED"
    assert newest["id"] != run["id"]


@pytest.mark.fault(39)
def test_flow_executes_nothing_after_dvc_repro(project: Path, environment: dict[str, str]) -> None:
    dvc(project, "repro")
    ran(project)
    outcome, _ = personalize(project, environment, "rex")
    assert outcome["runs"] == []
    assert [version["name"] for version in outcome["versions"]] == ["rex"]
    assert ran(project) == []


@pytest.mark.fault(38)
def test_a_failed_subject_does_not_stop_the_other_and_the_flow_is_failed(
    project: Path, environment: dict[str, str], prefect_server: str
) -> None:
    (project / "fail-train-rex").touch()
    outcome, log = personalize(project, environment)
    reason = "train@rex: E_TRAIN: the loss is NaN at step 3; lower train.learning_rate (exit 6)"
    assert outcome["failures"] == [reason]
    assert [version["name"] for version in outcome["versions"]] == ["biscuit"]
    assert "Traceback" not in log
    assert {stage.name for stage in Graph.load(project).stale} == {f"{entry}@rex" for entry in ENTRIES[1:]}
    newest = newest_run(prefect_server)
    assert newest["state"]["type"] == "FAILED"
    assert newest["state"]["message"] == reason

    (project / "fail-train-rex").unlink()
    ran(project)
    outcome, _ = personalize(project, environment)
    assert outcome["failures"] == []
    assert sorted(ran(project)) == ["evaluate@rex", "export@rex", "report@rex", "train@rex"]


@pytest.mark.fault(38)
def test_of_twenty_subjects_three_fail_and_are_named_and_the_next_run_touches_those_three(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """One stage each, photos to export, so that it takes a minute and not ten; DVC, Prefect and processes are real."""
    subjects = [f"s{number:02d}" for number in range(20)]
    bad = {"s03", "s11", "s19"}
    project = make_toy_project(tmp_path / "twenty", dict.fromkeys(subjects, "dog"))
    graph = yaml.safe_load((project / "dvc.yaml").read_text())
    export = graph["stages"]["export"]
    export["do"]["deps"] = ["data/subjects/${key}"]
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"export": export}}))
    for one in bad:
        (project / f"fail-export-{one}").touch()
    outcome, _ = personalize(project, environment)
    assert sorted(ran(project)) == [f"export@{one}" for one in subjects]
    assert [line.partition(": the loss")[0] for line in sorted(outcome["failures"])] == [
        f"export@{one}: E_TRAIN" for one in sorted(bad)
    ]
    assert {version["name"] for version in outcome["versions"]} == set(subjects) - bad
    for one in bad:
        (project / f"fail-export-{one}").unlink()
    outcome, _ = personalize(project, environment)
    assert outcome["failures"] == []
    assert sorted(ran(project)) == [f"export@{one}" for one in sorted(bad)]
    assert {version["name"] for version in outcome["versions"] if version["created"]} == bad


@pytest.mark.threat(24)
def test_what_would_take_days_is_said_before_the_first_stage(project: Path, environment: dict[str, str]) -> None:
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["train"]["max_train_steps"] = 1_000_000
    (project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for one in ("prior-dog", "validate-rex"):
        (project / f"fail-{one}").touch()
    _, log = personalize(project, environment, "rex")
    hours = re.search(r"plan: ([\d.]+) h with 1 at a time", log)
    assert hours is not None, log
    assert float(hours[1]) > 24
    assert hours.start() < log.index("Running stage")


@pytest.mark.fault(28)
def test_a_registration_that_fails_is_told_by_the_run_and_can_be_repeated_alone(
    project: Path, environment: dict[str, str], prefect_server: str
) -> None:
    dvc(project, "repro")
    (project / "fail-register-biscuit").touch()
    outcome, _ = personalize(project, environment)
    reason = "register biscuit: E_REGISTRY: the store is down; dreambooth register later"
    assert outcome["failures"] == [reason]
    assert newest_run(prefect_server)["state"]["message"] == reason
    assert [version["name"] for version in outcome["versions"]] == ["rex"]
    assert ran(project)
    (project / "fail-register-biscuit").unlink()
    outcome, _ = personalize(project, environment)
    assert outcome["failures"] == []
    assert "biscuit" in [version["name"] for version in outcome["versions"] if version["created"]]
    assert ran(project) == []


@pytest.mark.fault(28)
def test_what_a_training_could_not_send_is_sent_by_the_next_run_that_registers(
    project: Path, environment: dict[str, str], empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That run may have no training that would send it."""
    dvc(project, "repro")
    shutil.copyfile(empty_database, project / "mlflow.db")
    with monkeypatch.context() as patch:
        patch.delenv("DREAMBOOTH_TRACKING")
        patch.setattr(tracking, "connect", lambda root: (_ for _ in ()).throw(OSError(111, "Connection refused")))
        with tracking.open_run(project, key="a" * 64, name="train biscuit") as run:
            run.metrics({"loss": 1.0}, 1)
    (parcel,) = tracking.unsent(project).iterdir()
    personalize(project, environment)
    assert not parcel.exists()
    client, experiment = mlflowstore.connect(project)
    found = {run.info.run_name: run.info.status for run in client.search_runs([experiment])}
    assert found["train biscuit"] == "FINISHED"


def test_gpu_stages_take_turns_without_a_limit_on_the_server(project: Path, environment: dict[str, str]) -> None:
    text = (project / "toy.py").read_text()
    check = (
        '    if stage == "train":\n'
        '        Path("training").touch(exist_ok=False)\n'
        "        time.sleep(4)\n"
        '        Path("training").unlink()\n'
    )
    (project / "toy.py").write_text(text.replace('    sys.stderr.write("\\r', check + '    sys.stderr.write("\\r'))
    outcome, _ = personalize(project, environment | {"DREAMBOOTH_AT_ONCE": "1"})
    assert outcome["failures"] == []


def test_without_a_gpu_four_subjects_are_trained_side_by_side_with_a_share_of_the_cores(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """Each training waits for the others: it ends only if all four are let in. The class images have all cores."""
    project = make_toy_project(tmp_path / "four", dict.fromkeys(("ann", "ben", "cem", "dora"), "dog"))
    text = (project / "toy.py").read_text()
    meet = (
        '    if stage == "prior": assert "OMP_NUM_THREADS" not in os.environ\n'
        '    if stage == "train":\n'
        '        Path(f"training-{key}").write_text(os.environ["OMP_NUM_THREADS"])\n'
        "        late = time.monotonic() + 120\n"
        "        while len(list(Path().glob('training-*'))) < 4:\n"
        "            assert time.monotonic() < late, 'not all four are let in'\n"
        "            time.sleep(0.1)\n"
    )
    (project / "toy.py").write_text(text.replace('    sys.stderr.write("\\r', meet + '    sys.stderr.write("\\r'))
    environment = {name: value for name, value in environment.items() if name != "OMP_NUM_THREADS"}
    outcome, log = personalize(project, environment | {"DREAMBOOTH_AT_ONCE": "4"})
    assert outcome["failures"] == []
    assert "with 4 at a time" in log
    share = str(max(1, lanes._cores() // 4))
    assert {path.read_text() for path in project.glob("training-*")} == {share}


@pytest.mark.parametrize("limit", ["gpu", "gpu-of-box-two"])
def test_a_stage_that_has_its_turn_from_the_server_gets_every_core(
    project: Path, environment: dict[str, str], limit: str
) -> None:
    text = (project / "toy.py").read_text()
    tell = '    Path(f"threads-{stage}-{key}").write_text(os.environ.get("OMP_NUM_THREADS", "all"))\n'
    (project / "toy.py").write_text(text.replace('    sys.stderr.write("\\r', tell + '    sys.stderr.write("\\r'))
    environment = {name: value for name, value in environment.items() if name != "OMP_NUM_THREADS"}
    prefect(environment, "gcl", "create", limit, "--limit", "1")
    named = {} if limit == "gpu" else {"DREAMBOOTH_GPU_SLOT": limit}
    try:
        outcome, _ = personalize(project, environment | named | {"DREAMBOOTH_AT_ONCE": "2"})
    finally:
        prefect(environment, "gcl", "delete", limit)
    assert outcome["failures"] == []
    assert {path.read_text() for path in project.glob("threads-*")} == {"all"}


def test_cancelling_leaves_no_process_behind(project: Path, environment: dict[str, str]) -> None:
    (project / "slow-prior-dog").touch()
    command = [sys.executable, str(HERE / "flow_program.py"), str(project), "rex"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as flow:
        await_true(lambda: (project / "started-prior-dog").exists())
        below = psutil.Process(flow.pid).children(recursive=True)
        assert {os.getpgid(process.pid) for process in below} == {os.getpgid(flow.pid)}
        flow.send_signal(signal.SIGTERM)
        flow.wait(30)
    assert not [process for process in below if is_alive(process)]


@pytest.mark.fault(38)
def test_flow_runs_without_a_server_and_exits_with_the_code_of_the_failure(project: Path, prefect_home: Path) -> None:
    (project / "fail-prior-dog").touch()
    environment = {**quiet(prefect_home), "PYTHONPATH": str(HERE.parents[1])}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.personalize", "biscuit"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert "Starting temporary server" in done.stderr
    assert "\nE_PIPELINE: prior@dog: E_TRAIN: the loss is NaN" in done.stderr
    assert done.returncode == 9
    (project / "data/prompts/bundled/live.csv").unlink()
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert "\nE_EVALUATE: " in done.stderr  # the flow could not begin
    assert done.returncode == 7


@pytest.mark.parametrize("module", ["flows.personalize", "flows.promote", "flows.serve"])
def test_what_a_command_line_asks_in_vain_is_said_before_a_server_starts(
    project: Path, prefect_home: Path, module: str
) -> None:
    environment = {**quiet(prefect_home), "PYTHONPATH": str(HERE.parents[1])}
    environment.pop("PREFECT_API_URL", None)

    def call(argument: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", module, argument]
        return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)

    asked = call("--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.startswith(f"usage: python -m {module}")
    unknown = call("tom")
    assert "Starting" not in unknown.stderr
    if module != "flows.serve":  # which takes no subject
        assert unknown.stderr.startswith("E_SUBJECT: there is no subject 'tom'")
        assert unknown.returncode == 3


def test_a_cron_deployment_yields_scheduled_runs(environment: dict[str, str], prefect_server: str) -> None:
    program = (
        "from flows.personalize import personalize;personalize.to_deployment(name='by-cron', cron='0 3 * * *').apply()"
    )
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=HERE.parents[1], check=True)
    wanted = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "deployments": {"name": {"any_": ["by-cron"]}}}
    await_true(lambda: len(post(prefect_server, "flow_runs/filter", wanted)) > 0)

"""Secrets stay in the environment: no parameter, no log, no file holds one."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_project import REPOSITORY

from dreambooth.errors import ParamsError
from dreambooth.params import Params, parse_params
from dreambooth.redaction import SECRET_NAME, looks_secret, redact, redact_logs, secrets_of

CANARY = "canary-7f3e9a51"
HUB_TOKEN = "hf_" + "abcDEF" * 5
ENVIRONMENT = {
    name: f"{CANARY}-{number}"
    for number, name in enumerate(
        ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PREFECT_API_KEY"]
    )
}


@pytest.mark.threat(17)
@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"token {CANARY}-0!", "token ***!"),
        (f"https://me:{CANARY}-1@hub/x", "https://***@hub/x"),
        ("postgresql://user:pw@db/mlflow is down", "postgresql://***@db/mlflow is down"),
        ("postgresql://mlflow:ab/cdSECRET@127.0.0.1:1/db", "postgresql://***@127.0.0.1:1/db"),
        ("mysql://user:p@ssSECRET@host is down", "mysql://***@host is down"),
        ("redis://:SECRET/1@host", "redis://***@host"),
        ("postgresql://mlflow:12/cdSECRET@host/db", "postgresql://***@host/db"),
        ("https://me:ab/cdSECRET@host/x", "https://***@host/x"),
        ("http://h:5000/#/models/x@champion", "http://h:5000/#/models/x@champion"),
        ("http://[::1]:5000/#/models/rex@champion", "http://[::1]:5000/#/models/rex@champion"),
        ("http://h:5000,models:/rex@champion", "http://h:5000,models:/rex@champion"),
        ('{"a":"http://h:4200","m":"a@b.c"}', '{"a":"http://h:4200","m":"a@b.c"}'),
        (f"401 for {HUB_TOKEN}", "401 for ***"),
        ("a photo of sks dog", "a photo of sks dog"),
        ("mail me@home.example", "mail me@home.example"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(monkeypatch: pytest.MonkeyPatch, text: str, clean: str) -> None:
    for name, secret in ENVIRONMENT.items():
        monkeypatch.setenv(name, secret)
    assert redact(text) == clean


def test_paths_and_short_values_are_no_secrets() -> None:
    assert secrets_of({"TOKEN_FILE": "/run/secrets/x", "HF_TOKEN": "abc", "NAME": "long enough"}) == []


@pytest.mark.threat(17)
def test_every_log_record_loses_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{CANARY}-0")
    before = logging.getLogRecordFactory()
    heard = io.StringIO()
    handler, logger = logging.StreamHandler(heard), logging.getLogger("of.a.library")
    logger.addHandler(handler)
    try:
        redact_logs()
        redact_logs()
        logger.warning("signed in with %s", f"{CANARY}-0")
        logger.warning("%d files", 3)
        try:
            raise ValueError(f"no such token: {CANARY}-0")
        except ValueError:
            logger.exception("it failed")
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)
    assert CANARY not in heard.getvalue()
    assert "signed in with ***" in heard.getvalue()
    assert "ValueError: no such token: ***" in heard.getvalue()
    assert "3 files" in heard.getvalue()


@pytest.mark.threat(17)
@pytest.mark.parametrize("secret", [HUB_TOKEN, "https://me:pass@hub.example/model"])
def test_a_secret_is_no_parameter_and_is_not_repeated(params_values: dict[str, Any], secret: str) -> None:
    params_values["prior"]["negative_prompt"] = secret
    with pytest.raises(ParamsError, match=r"prior\.negative_prompt: looks like a secret") as refused:
        parse_params(params_values)
    assert secret not in str(refused.value)
    params_values["train"]["learning_rate"] = HUB_TOKEN
    with pytest.raises(ParamsError) as refused:
        parse_params(params_values)
    assert HUB_TOKEN not in str(refused.value)


@pytest.mark.threat(17)
def test_no_parameter_is_there_to_hold_one() -> None:
    fields = [
        f"{section}.{name}"
        for section, field in Params.model_fields.items()
        for name in getattr(field.annotation, "model_fields", {})
    ]
    assert len(fields) > 50
    assert [name for name in fields if SECRET_NAME.search(name)] == []
    assert not looks_secret((REPOSITORY / "params.yaml").read_text())


ALL_STAGES = """
import logging, os, sys
from pathlib import Path
from dreambooth.params import load_params
from dreambooth.redaction import redact_logs
from stages import evaluate, export, prior, report, train, validate
redact_logs()
logging.basicConfig(level=logging.DEBUG, filename="debug.log")
params, root = load_params(Path("params.yaml")), Path.cwd()
logging.warning("the environment is %s", dict(os.environ))
for stage, key in [(validate, "biscuit"), (prior, "dog"), (train, "biscuit"), (evaluate, "biscuit"),
                   (report, "biscuit"), (export, "biscuit")]:
    stage.run(params, key, root)
"""


@pytest.mark.slow
@pytest.mark.threat(17)
def test_no_file_of_a_run_holds_a_secret_of_the_environment(project: Path, tmp_path: Path) -> None:
    """Photos to export with tracking, logs at their loudest; then every byte of project and cache is looked at."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), "DREAMBOOTH_CACHE": str(tmp_path / "c")}
    environment.pop("DREAMBOOTH_TRACKING", None)
    done = subprocess.run(
        [sys.executable, "-c", ALL_STAGES], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert CANARY not in done.stdout + done.stderr
    files = [path for folder in (project, tmp_path / "c") for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"mlflow.db", "index.html", "README.md", "debug.log", "manifest.json"} <= names
    assert "the environment is" in (project / "debug.log").read_text()
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []

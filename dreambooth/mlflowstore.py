"""Reach the store of MLflow: its address, a client that is ready, its pages, and why it failed in words."""

import http.client
import os
import re
import sqlite3
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dreambooth.folders import scratch_folder
from dreambooth.redaction import redact

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY_TAG = "dreambooth.key"
CONNECT_SECONDS = 10.0
DATABASE_SECONDS = 60.0  # for another process to leave it
_DRIVERS = {"psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}  # of SQLAlchemy's default for an address

# Read by MLflow when it is imported or calls a server; whoever sets them in the environment wins.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a stage's last words say what became of it
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def tracking_uri(root: Path) -> str:
    """Return where runs go: MLFLOW_TRACKING_URI, or the database of the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.absolute() / 'mlflow.db'}"


def experiment_name() -> str:
    """Return MLFLOW_EXPERIMENT_NAME, or dreambooth."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "dreambooth"


def database_file(uri: str) -> Path | None:
    """Return the file of a local database, None for anything else."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def connect(root: Path) -> "tuple[MlflowClient, str]":
    """Return a client and the id of the experiment, both ready.

    The first migration of a database crashes when two processes start it at once, so it is done under a lock.

    Raises:
        OSError: it is no address, no server answers within CONNECT_SECONDS, its driver is missing, or the database
            cannot be opened or filled.
        MlflowException: the store refuses.
    """
    uri = tracking_uri(root)
    if "://" not in uri and not uri.startswith("databricks"):
        raise OSError("MLFLOW_TRACKING_URI is no address such as http://HOST:5000, sqlite:////FILE or postgresql://...")
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    elif file := database_file(uri):
        _check_database(file)
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with FileLock(scratch_folder(root) / "mlflow.lock", timeout=5 * DATABASE_SECONDS):
            client = MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)
            return client, _experiment(client, uri)
    except ModuleNotFoundError as error:  # MLflow brings none
        package = _DRIVERS.get(str(error.name), error.name)
        raise OSError(f"the driver of this database is not installed: pip install {package}") from error
    except SQLAlchemyError as error:  # of the first migration, which MLflow does not put into words of its own
        raise OSError(str(error.__cause__ or error)) from error


def ensure_run(client: "MlflowClient", experiment: str, key: str, name: str) -> str:
    """Return the id of the run with this key; make it if there is none.

    Args:
        client: from `connect`.
        experiment: from `connect`.
        key: hash of what the run works on: the stages of one model share one run.
        name: of a new run.
    """
    query = f"tags.`{KEY_TAG}` = '{key}'"
    found = client.search_runs([experiment], query, max_results=1, order_by=["attributes.start_time ASC"])
    run = found[0] if found else client.create_run(experiment, tags={KEY_TAG: key}, run_name=name)
    return str(run.info.run_id)


def paged(search: Callable[..., Any], *arguments: Any, **named: Any) -> Iterator[Any]:
    """Yield all that a search of MLflow finds: a single call returns the first page only.

    Args:
        search: a method of the client that takes `page_token`.
        arguments: of the search.
        named: of the search; `max_results` is the size of a page.
    """
    token = None
    while True:
        page = search(*arguments, **named, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def flat_metrics(content: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of metrics/<id>.json by their path, such as identity.by_kind.recontextualisation.base."""
    found: dict[str, float] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            found |= flat_metrics(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = float(value)
    return found


def explain(error: BaseException) -> str:
    """Return why MLflow failed in half a line, without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    cause = re.search(r"\[Errno -?\d+\] ([^'\")\]>]+)|(Read timed out|timed out)|(too many \d+ error responses)", text)
    status = http_status(error)
    if cause:
        text = next(part for part in cause.groups() if part).strip(" :")
    elif status in (401, 403):
        text = f"HTTP {status}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    text = redact(text)  # before it is cut: half a token has no shape
    return text if len(text) <= 400 else text[:397] + "..."


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of MLflow stands for, None for any other error."""
    status = getattr(error, "get_http_status_code", None)
    return int(status()) if status else None


def _experiment(client: "MlflowClient", uri: str) -> str:
    """Return the id of the experiment; its files lie in mlartifacts/ beside a local database.

    Not in the project's folder: that may be a clone, which uses the database of its home and goes away.
    """
    from mlflow.exceptions import MlflowException

    name = experiment_name()
    if (known := client.get_experiment_by_name(name)) is not None:
        return str(known.experiment_id)
    file = database_file(uri)
    location = (file.absolute().parent / "mlartifacts").as_uri() if file else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # made by another machine a moment ago
        if (known := client.get_experiment_by_name(name)) is None:
            raise
        return str(known.experiment_id)


def _check_server(uri: str) -> None:
    """Raise OSError when nobody answers, or nobody can: MLflow itself would try for minutes."""
    try:
        with urllib.request.urlopen(re.sub(r"//[^/]*@", "//", uri), timeout=CONNECT_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # an answer
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # MLflow has settings of its own for certificates
            raise
    except (http.client.HTTPException, ValueError) as error:  # a port in letters, a blank, a server of something else
        why = "write / and @ of a password as %2F and %40" if "@" in uri else error  # the error would quote it
        raise OSError(f"MLFLOW_TRACKING_URI names no HTTP server: {why}") from None


def _check_database(file: Path) -> None:
    """Raise OSError when the file is no database, or cannot be opened: MLflow itself would try for minutes."""
    try:
        with closing(sqlite3.connect(file, timeout=DATABASE_SECONDS)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        raise OSError(f"{file}: {error}; dreambooth doctor looks at it") from None

"""Register exports as versions of an MLflow model: whole or not at all, and the same export only once.

A version is made only after its files were uploaded, listed, compared with the manifest, and loaded once.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from dreambooth import __version__
from dreambooth.errors import ModelError, RegistryError
from dreambooth.folders import TornFolderError, content_hash, read_manifest, scratch_folder
from dreambooth.params import check_id
from dreambooth.tracking import connect, database_file, ensure_run, explain, hide_password, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel
    from mlflow.tracking import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"
HASH_TAG = "dreambooth.export_hash"
MODEL_TAG = "dreambooth.model_id"
MOVE_TAG = "dreambooth.alias"  # .0001, .0002 ...: the log of alias moves, never rewritten
LOCK_SECONDS = 3600.0
# What the shipped code of dreambooth imports to draw pictures; pinned to what the export was made with.
SERVED_WITH = (
    "accelerate", "diffusers", "mlflow", "numpy", "pandas", "pillow", "platformdirs", "pydantic", "pyyaml",
    "safetensors", "scipy", "torch", "tqdm", "transformers",
)  # fmt: skip


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model that is whole."""

    name: str
    version: int
    created: bool
    """False when it was there before."""
    export_hash: str
    """Content of export/<id> that it was made from."""


@dataclass(frozen=True)
class Export:
    """An export folder whose files were found to be what its manifest says."""

    subject: str
    folder: Path
    files: Mapping[str, Any]
    hash: str
    manifest: Mapping[str, Any]
    generation: Mapping[str, Any]


def register(root: Path, subject_id: str) -> RegisteredVersion:
    """Make export/<id> a version of the model <id> and point `challenger` to it; do nothing twice.

    An upload that was cut short is taken up again in its place. A version whose files are gone gets them back.

    Raises:
        TornFolderError: the export is not what its manifest says.
        RegistryError: the store cannot be reached, refuses, or holds other files than were sent.
    """
    export = _read_export(root, check_id(subject_id))
    remedy = f"the export stays as it is, repeat this alone: dreambooth register {subject_id}"
    with _explained(root, f"register {subject_id}", remedy), _alone(root, subject_id):
        client, experiment = connect(root)
        version, model = _version_with(client, export) or (None, _begun(client, experiment, export))
        model = model or _new_place(client, experiment, export)
        if version is None or _faults(client, model, export):
            _upload(client, root, model, export)
            _verify(client, root, model, export)
        registered = version or _new_version(client, root, model, export)
        move_alias(client, subject_id, CHALLENGER, int(registered.version))
    return RegisteredVersion(subject_id, int(registered.version), version is None, export.hash)


def find(root: Path, subject_id: str, version: int | None = None, alias: str | None = None) -> RegisteredVersion | None:
    """Return a version of a subject: this one, the one with this alias, or the newest; None if there is none."""
    file = database_file(tracking_uri(root))
    if file is not None and not file.exists():
        return None  # nothing was registered yet; asking MLflow would make the database
    with _explained(root, f"find {subject_id}", "try again when it answers"):
        found = _find(_client(root), check_id(subject_id), version, alias)
    if found is None:
        return None
    return RegisteredVersion(subject_id, int(found.version), False, found.tags.get(HASH_TAG, ""))


def versions(root: Path, subject_id: str) -> list[str]:
    """Return the versions of a subject in words, the newest first: "v2 @champion"; none where nothing is registered."""
    file = database_file(tracking_uri(root))
    if file is not None and not file.exists():
        return []
    with _explained(root, f"list the versions of {subject_id}", "try again when it answers"):
        client = _client(root)
        found = client.search_model_versions(f"name = '{check_id(subject_id)}'", order_by=["version_number DESC"])
        aliases = client.get_registered_model(subject_id).aliases if found else {}
        named = {int(number): f" @{alias}" for alias, number in sorted(aliases.items())}
        return [f"v{one.version}{named.get(int(one.version), '')}" for one in found]


def load(root: Path, subject_id: str, version: int | None = None) -> "PyFuncModel":
    """Load a version to draw with: this one, else the champion, else the challenger, else the newest.

    The result's `predict({"prompt": "..."}, params={"seed": 1})` returns PNG bytes, see `dreambooth.serving`.

    Raises:
        RegistryError: there is none, or it cannot be loaded.
    """
    choices = [(version, None)] if version else [(None, CHAMPION), (None, CHALLENGER), (None, None)]
    found = next((hit for number, alias in choices if (hit := find(root, subject_id, number, alias))), None)
    if found is None:
        which = f"version {version}" if version else "version"
        raise RegistryError(
            f"{subject_id} has no {which} in {hide_password(tracking_uri(root))}; dreambooth register {subject_id}"
        )
    remedy = f"its files come back when the same export is registered again: dreambooth register {subject_id}"
    with _explained(root, f"load version {found.version} of {subject_id}", remedy):
        client = _client(root)
        source = client.get_model_version_download_uri(subject_id, str(found.version))
        with _downloaded(root, source) as folder:
            return load_folder(folder)


def move_alias(client: "MlflowClient", name: str, alias: str, version: int) -> None:
    """Point an alias to a version; what it pointed to before is written down first, and never rewritten."""
    model = client.get_registered_model(name)
    before = model.aliases.get(alias)
    if before is not None and int(before) == version:
        return
    number = 1 + max((int(tag.rsplit(".", 1)[1]) for tag in model.tags if tag.startswith(f"{MOVE_TAG}.")), default=0)
    entry = {"alias": alias, "from": before and int(before), "to": version, "time": int(time.time())}
    client.set_registered_model_tag(name, f"{MOVE_TAG}.{number:04d}", json.dumps(entry))
    client.set_registered_model_alias(name, alias, str(version))


def _read_export(root: Path, subject_id: str) -> Export:
    folder = root / "export" / subject_id
    if not folder.is_dir():
        raise RegistryError(f"{folder} does not exist; dreambooth run {subject_id} makes it")
    manifest = read_manifest(folder)
    if "generation.json" not in manifest["files"]:
        raise RegistryError(f"{folder} has no generation.json; dreambooth run {subject_id} makes the export again")
    generation = json.loads((folder / "generation.json").read_text(encoding="utf-8"))
    return Export(subject_id, folder, manifest["files"], content_hash(folder), manifest, generation)


@contextmanager
def _alone(root: Path, subject_id: str) -> Iterator[None]:
    """Let one process at a time register a subject."""
    lock = FileLock(scratch_folder(root) / f"register-{subject_id}.lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise RegistryError(
            f"another process has been registering {subject_id} for {LOCK_SECONDS:.0f} s ({lock.lock_file}); end it"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(root: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn what MLflow, the network and a damaged store raise into one line with the next step."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError, TornFolderError, ModelError) as error:
        where = hide_password(tracking_uri(root))
        raise RegistryError(f"cannot {what} in {where}: {explain(error)}; {remedy}") from error


def _client(root: Path) -> "MlflowClient":
    return connect(root)[0]


def _find(client: "MlflowClient", name: str, version: int | None, alias: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        if version is not None:
            found = [client.get_model_version(name, str(version))]
        elif alias is not None:
            found = [client.get_model_version_by_alias(name, alias)]
        else:
            found = client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"], max_results=1)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the second: no such alias
            return None
        raise
    return next((hit for hit in found if hit.status == "READY"), None)


def _version_with(client: "MlflowClient", export: Export) -> "tuple[ModelVersion, LoggedModel] | None":
    """Return the version that was made from the same bytes with the place of its files, or None."""
    query = f"name = '{export.subject}' and tags.`{HASH_TAG}` = '{export.hash}'"
    for version in client.search_model_versions(query, order_by=["version_number DESC"]):
        model = _logged_model(client, version.tags.get(MODEL_TAG))
        if version.status == "READY" and model is not None:
            return version, model
    return None


def _logged_model(client: "MlflowClient", model_id: str | None) -> "LoggedModel | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_logged_model(model_id) if model_id else None
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):  # somebody deleted it
            return None
        raise


def _begun(client: "MlflowClient", experiment: str, export: Export) -> "LoggedModel | None":
    """Return the place where an upload of the same bytes was begun, or None."""
    found = client.search_logged_models([experiment], filter_string=f"tags.`{HASH_TAG}` = '{export.hash}'")
    return next((model for model in found if model.name == export.subject), None)


def _new_place(client: "MlflowClient", experiment: str, export: Export) -> "LoggedModel":
    run_id = ensure_run(client, experiment, export.manifest.get("model", export.hash), export.subject)
    return client.create_logged_model(
        experiment, name=export.subject, source_run_id=run_id, tags={HASH_TAG: export.hash}, model_type="dreambooth"
    )


def _upload(client: "MlflowClient", root: Path, model: "LoggedModel", export: Export) -> None:
    """Put the export, the code that draws with it, and its requirements together, and send them."""
    import mlflow.pyfunc

    from dreambooth import serving

    _require_space(root, export)
    with tempfile.TemporaryDirectory(prefix="upload-", dir=scratch_folder(root)) as staging:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
            mlflow.pyfunc.save_model(
                path=f"{staging}/model",
                python_model=serving.__file__,
                artifacts={serving.ARTIFACT: str(export.folder)},
                code_paths=[str(Path(__file__).parent)],
                signature=serving.signature(export.folder),
                pip_requirements=[f"{name}=={installed_version(name).partition('+')[0]}" for name in SERVED_WITH],
            )
        client.log_model_artifacts(model.model_id, f"{staging}/model")


def _require_space(root: Path, export: Export) -> None:
    copies = 2 if database_file(tracking_uri(root)) else 1
    needed = copies * sum(entry["size"] for entry in export.files.values())
    free = shutil.disk_usage(scratch_folder(root)).free
    if free < needed:
        raise RegistryError(
            f"{scratch_folder(root)}: registering {export.subject} needs {needed} bytes, {free} are free; make room"
        )


def _faults(client: "MlflowClient", model: "LoggedModel", export: Export) -> list[str]:
    """Compare the names and sizes of what lies in MLflow with the manifest."""
    folder = f"artifacts/{export.folder.name}"
    present = dict(_listing(client, model.model_id, folder))
    sizes = {f"{folder}/{name}": entry["size"] for name, entry in export.files.items()}
    return [
        f"{name} has {present.get(name, 'no')} bytes, not {size}"
        for name, size in sizes.items()
        if present.get(name) != size
    ]


def _listing(client: "MlflowClient", model_id: str, folder: str) -> Iterator[tuple[str, int]]:
    for entry in client.list_logged_model_artifacts(model_id, folder):
        if entry.is_dir:
            yield from _listing(client, model_id, entry.path)
        else:
            yield entry.path, int(entry.file_size)


def _verify(client: "MlflowClient", root: Path, model: "LoggedModel", export: Export) -> None:
    """Refuse an upload with another list of files, another size, another sha256, or that does not load."""
    faults = _faults(client, model, export)
    try:
        if not faults:
            with _downloaded(root, model.artifact_location) as folder:
                load_folder(folder)  # hashes every file
    except Exception as error:  # whatever it is, nobody else should meet it first
        faults = [hide_password(" ".join(str(error).split()) or type(error).__name__)]
    if faults:
        raise RegistryError(
            f"{export.folder} arrived damaged in {hide_password(model.artifact_location)}: {'; '.join(faults)}; "
            f"no version was made, try again: dreambooth register {export.subject}"
        )


@contextmanager
def _downloaded(root: Path, source: str) -> Iterator[Path]:
    """Yield a local folder with the files of a version: the stored one, or a copy that goes away."""
    from mlflow.artifacts import download_artifacts

    uri = tracking_uri(root)
    if urlsplit(source).scheme in ("", "file"):
        yield Path(download_artifacts(artifact_uri=source, tracking_uri=uri))
        return
    with tempfile.TemporaryDirectory(prefix="download-", dir=scratch_folder(root)) as target:
        yield Path(download_artifacts(artifact_uri=source, dst_path=target, tracking_uri=uri))


def load_folder(folder: Path) -> "PyFuncModel":
    """Load a model folder of MLflow with the code of this package, not the copy that lies in it."""
    import mlflow.pyfunc

    before = list(sys.path)
    try:
        return mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)
    finally:
        sys.path[:] = before


def _new_version(client: "MlflowClient", root: Path, model: "LoggedModel", export: Export) -> "ModelVersion":
    from mlflow.entities import LoggedModelStatus
    from mlflow.exceptions import MlflowException

    metrics = _metrics(root, export)
    _complete_run(client, root, model.source_run_id, export, metrics)
    try:
        client.create_registered_model(export.subject, description=export.generation["instance_prompt"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    # The artifact location and the run are named here, else MLflow would look them up in its default store.
    return client.create_model_version(
        export.subject,
        model.artifact_location,
        run_id=model.source_run_id,
        model_id=model.model_id,
        tags=_version_tags(root, model, export, metrics),
        description=export.generation["instance_prompt"],
    )


def _version_tags(root: Path, model: "LoggedModel", export: Export, metrics: Mapping[str, float]) -> dict[str, str]:
    tags = {
        HASH_TAG: export.hash,
        MODEL_TAG: model.model_id,
        "dreambooth.fingerprint": export.manifest.get("model"),
        "dreambooth.base": export.manifest.get("base"),
        "dreambooth.subject": export.subject,
        "dreambooth.class_noun": export.generation["class_noun"],
        "dreambooth.identifier": export.generation["identifier"],
        "dreambooth.version": __version__,
        "git.commit": _git_commit(root),
    }
    values = {f"metric.{name}": f"{value:.6g}" for name, value in metrics.items()}
    return {name: str(value) for name, value in tags.items() if value is not None} | values


def _metrics(root: Path, export: Export) -> dict[str, float]:
    """Return the numbers of metrics/<id>.json, flat, if they were measured on this export; else nothing."""
    evaluation = root / "build" / export.subject / "evaluation"
    try:
        about = read_manifest(evaluation, verify=False)
        content = json.loads((root / "metrics" / f"{export.subject}.json").read_text(encoding="utf-8"))
    except (TornFolderError, FileNotFoundError, json.JSONDecodeError):
        return {}
    return dict(_flat(content)) if about.get("model") == export.manifest.get("model") else {}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def _complete_run(
    client: "MlflowClient", root: Path, run_id: str, export: Export, metrics: Mapping[str, float]
) -> None:
    """Give the run of the model its scores and its grid, where the evaluation went to another store or to none."""
    from mlflow.entities import Metric

    known = client.get_run(run_id).data.metrics
    now = int(time.time() * 1000)
    missing = [Metric(name, value, now, 0) for name, value in metrics.items() if name not in known]
    if missing:
        client.log_batch(run_id, metrics=missing)
    grid = root / "build" / export.subject / "evaluation" / "grid.png"
    if metrics and grid.exists() and grid.name not in {entry.path for entry in client.list_artifacts(run_id)}:
        client.log_artifact(run_id, str(grid))


def _git_commit(root: Path) -> str | None:
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no repository
    return result.stdout.strip()

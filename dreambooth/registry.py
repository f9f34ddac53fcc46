"""Register exports as versions of an MLflow model: whole or not at all, and the same export only once.

A version is made only after its files were uploaded, listed, compared with the manifest, and loaded once.
"""

import json
import logging
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from dreambooth import __version__
from dreambooth.aliases import move, settle
from dreambooth.errors import RegistryError, shown
from dreambooth.folders import (
    GENERATION,
    MANIFEST,
    TornFolderError,
    hash_of_files,
    read_manifest,
    require_space,
    scratch_folder,
    sha256_of,
    work_folder,
)
from dreambooth.locks import only_one_of
from dreambooth.mlflowstore import connect, database_file, ensure_run, flat_metrics, paged, tracking_uri
from dreambooth.params import METHODS_OF_FORMAT, check_id
from dreambooth.pointer import POINTER, require_beside, resolve_whole, write_pointer
from dreambooth.redaction import redact
from dreambooth.versions import (
    CHALLENGER,
    CONSENT_TAG,
    EVALUATION_TAG,
    FINGERPRINT_TAG,
    HASH_TAG,
    MD5_TAG,
    METRIC_PREFIX,
    MODEL_TAG,
    SIZE_TAG,
    RegisteredVersion,
    downloaded,
    explained,
    load_folder,
    made_of,
    recorded_md5,
    size_faults,
    stored_sizes,
)

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

_log = logging.getLogger(__name__)
SCORES = ("evaluation.json", "prompts.csv", "class_images.csv", "scores.csv")  # what the gate reads of an evaluation
ALONE = ("README.md", GENERATION, *METHODS_OF_FORMAT)  # parts of an export that are of use without its pipeline
# What the shipped code of dreambooth imports to draw pictures; pinned to what the export was made with.
SERVED_WITH = (
    "accelerate", "diffusers", "filelock", "mlflow", "numpy", "pandas", "peft", "pillow", "platformdirs", "pydantic",
    "ruamel.yaml", "safetensors", "scipy", "tokenizers", "torch", "tqdm",
    "transformers",
)  # fmt: skip


def require_plain_path(root: Path) -> None:
    """Refuse a project, or a scratch folder, in whose path MLflow takes %41 for an A: it would find no file there.

    Raises:
        RegistryError: with the folder.
    """
    for folder in (root.absolute(), scratch_folder(root)):
        if (decoded := unquote(str(folder))) != str(folder):
            raise RegistryError(
                f"{folder}: MLflow reads it as {shown(decoded)}, so that nothing can be registered or loaded there; "
                "rename it without % before two hexadecimal digits"
            )


@dataclass(frozen=True)
class Export:
    """An export folder whose files were found to be what its manifest says."""

    subject: str
    folder: Path
    files: Mapping[str, Any]
    hash: str
    manifest: Mapping[str, Any]
    generation: Mapping[str, Any]
    md5: str | None
    """Of the folder in dvc.lock; None where DVC does not know these files."""
    max_logged_bytes: int | None
    """A larger export stays where DVC keeps it; None for any size."""

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return _size(self.files)

    @property
    def is_pointed_to(self) -> bool:
        """Whether the version points to it, and holds no copy of the whole."""
        return self.max_logged_bytes is not None and self.size > self.max_logged_bytes

    @property
    def beside(self) -> Mapping[str, Any]:
        """The files that lie beside a pointer: whole parts that are of use alone, the smallest first, as they fit."""
        parts = [{name: one for name, one in self.files.items() if name.partition("/")[0] == part} for part in ALONE]
        chosen: dict[str, Any] = {}
        for part in sorted(parts, key=_size):
            if self.max_logged_bytes is None or _size(chosen) + _size(part) <= self.max_logged_bytes:
                chosen |= part
        return chosen

    @property
    def logged(self) -> Mapping[str, Any]:
        """The files of which the version holds a copy."""
        return self.beside if self.is_pointed_to else self.files


def _size(files: Mapping[str, Any]) -> int:
    return sum(entry["size"] for entry in files.values())


def register(
    root: Path,
    subject_id: str,
    max_logged_bytes: int | None = None,
    say: Callable[[str], object] = _log.warning,
    remedy: str | None = None,
) -> RegisteredVersion:
    """Make export/<id> a version of the MLflow model <id> and point `challenger` to it; do nothing twice.

    An upload that was cut short is taken up again in its place. A version whose files are gone gets them back. A newer
    evaluation of the same export is added to its version.

    Args:
        root: of the project.
        subject_id: of the subject.
        max_logged_bytes: a larger export stays where DVC keeps it, and the version points there, with the small parts
            beside that are of use alone; None copies all.
        say: hears of another process that is waited for.
        remedy: what to do once MLflow answers; None where the project stays: register this alone.

    Raises:
        TornFolderError: the export is not what its manifest says.
        RegistryError: the store cannot be reached, refuses, or holds other files than were sent; or MLflow would look
            for the files elsewhere.
    """
    require_plain_path(root)
    export = _read_export(root, check_id(subject_id), max_logged_bytes)
    remedy = remedy or f"the export stays as it is, repeat this alone: dreambooth register {subject_id}"
    with explained(root, f"register {subject_id}", remedy), alone(root, subject_id, say):
        client, experiment = connect(root)
        version, model = _version_with(client, export) or (None, _begun(client, experiment, export))
        model = model or _new_place(client, experiment, export)
        if version is None or _faults(client, model, export):
            _upload(client, root, model, export)
            _verify(client, root, model, export)
        registered = version or _only_one(client, export, _new_version(client, root, model, export))
        if export.md5 and registered.tags.get(MD5_TAG) != export.md5:  # the same files, made anew
            client.set_model_version_tag(subject_id, registered.version, MD5_TAG, export.md5)
        _add_evaluation(client, root, registered, export)
        _challenge(client, subject_id, int(registered.version))
    return RegisteredVersion(subject_id, int(registered.version), version is None, export.hash, export.md5)


def alone(root: Path, subject_id: str, say: Callable[[str], object]) -> AbstractContextManager[None]:
    """Let one process at a time of a project change what is registered of a subject; `say` hears who is waited for.

    A promotion holds it while it draws both models again: `forget` takes it too, and nothing may be drawn of a subject
    after that.
    """
    what = f"a registration, promotion, rollback or erasure of {subject_id}"
    return only_one_of(root, "register", subject_id, what, say)


def _read_export(root: Path, subject_id: str, max_logged_bytes: int | None) -> Export:
    folder = root / "export" / subject_id
    if not folder.is_dir():
        raise RegistryError(f"{folder} does not exist; dreambooth run {subject_id} makes it")
    manifest = read_manifest(folder)
    if GENERATION not in manifest["files"]:
        raise RegistryError(f"{folder} has no {GENERATION}; dreambooth run {subject_id} makes the export again")
    generation = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
    return Export(
        subject=subject_id,
        folder=folder,
        files=manifest["files"],
        hash=hash_of_files(manifest["files"]),
        manifest=manifest,
        generation=generation,
        md5=recorded_md5(root, f"export/{subject_id}"),
        max_logged_bytes=max_logged_bytes,
    )


def _version_with(client: "MlflowClient", export: Export) -> "tuple[ModelVersion, LoggedModel] | None":
    """Return the version that was made from the same bytes with the place of its files, or None."""
    for version in made_of(client, export.subject, HASH_TAG, export.hash):
        model = _logged_model(client, version.tags.get(MODEL_TAG))
        if version.status == "READY" and model is not None:
            return version, model
    return None


def _only_one(client: "MlflowClient", export: Export, made: "ModelVersion") -> "ModelVersion":
    """Keep the oldest version where several machines registered the same bytes at once.

    Each machine sees the versions that were made before its own.
    """
    found = _version_with(client, export)  # one whose files somebody deleted for good is not kept for this one
    first = found[0] if found else made
    if int(first.version) < int(made.version):
        client.delete_model_version(export.subject, made.version)
        return first
    return made


def _challenge(client: "MlflowClient", name: str, version: int) -> None:
    """Point `challenger` to what was registered last; of two that register at once either may win."""
    for _ in range(10):
        before = settle(client, name, CHALLENGER)
        if before == version:
            return
        try:
            return move(client, name, "register", CHALLENGER, before, version)
        except RegistryError:
            continue  # another process has registered something meanwhile


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
    query = f"tags.`{HASH_TAG}` = '{export.hash}'"
    found = paged(client.search_logged_models, [experiment], filter_string=query)
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

    copies = 1 + (database_file(tracking_uri(root)) is not None) + export.is_pointed_to
    require_space(scratch_folder(root), copies * _size(export.logged), f"registering {export.subject}")
    with work_folder(root, "upload", export.subject) as staging:
        source = export.folder
        if export.is_pointed_to:
            source = Path(staging) / "pointer" / export.subject
            _write_pointed(source, root, export)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
            mlflow.pyfunc.save_model(
                path=f"{staging}/model",
                python_model=serving.__file__,
                artifacts={serving.ARTIFACT: str(source)},
                code_paths=[str(Path(__file__).parent)],
                signature=serving.signature(export.folder),
                pip_requirements=[f"{name}=={installed_version(name).partition('+')[0]}" for name in SERVED_WITH],
            )
        client.log_model_artifacts(model.model_id, f"{staging}/model")


def _write_pointed(folder: Path, root: Path, export: Export) -> None:
    """Fill a folder with the pointer to an export and the parts beside it: copies, for MLflow refuses links."""
    write_pointer(folder, root, f"export/{export.subject}", export.hash, export.md5, export.beside)
    for name in export.beside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(export.folder / name, folder / name)


def _faults(client: "MlflowClient", model: "LoggedModel", export: Export) -> list[str]:
    """Compare the names and sizes of what lies in MLflow with the manifest."""
    present = stored_sizes(client, model.model_id, export.subject)
    is_pointer = POINTER in present
    if is_pointer and not export.is_pointed_to:  # the limit was raised since: the version stays as it is
        return []
    if export.is_pointed_to and not present:
        return [f"{POINTER} is missing"]
    return size_faults(present, export.beside if is_pointer else export.files)


def _verify(client: "MlflowClient", root: Path, model: "LoggedModel", export: Export) -> None:
    """Refuse an upload with another list of files, another size, another sha256, or that does not load."""
    faults = _faults(client, model, export)
    try:
        if not faults:
            with downloaded(root, model.artifact_location, export.subject) as folder:
                stored = folder / "artifacts" / export.subject
                if resolve_whole(stored, root)[1] != export.hash:
                    faults = ["the files are those of another export"]
                require_beside(stored)
                load_folder(root, folder)
    except Exception as error:  # whatever it is, nobody else should meet it first
        faults = [redact(" ".join(str(error).split()) or type(error).__name__)]
    if faults:
        raise RegistryError(
            f"{export.folder} arrived damaged in {redact(model.artifact_location)}: {'; '.join(faults)}; "
            f"no version was made, try again: dreambooth register {export.subject}"
        )


def _new_version(client: "MlflowClient", root: Path, model: "LoggedModel", export: Export) -> "ModelVersion":
    from mlflow.entities import LoggedModelStatus
    from mlflow.exceptions import MlflowException

    _complete_run(client, root, model.source_run_id, export)
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
        tags=_version_tags(root, model, export),
        description=export.generation["instance_prompt"],
    )


def _version_tags(root: Path, model: "LoggedModel", export: Export) -> dict[str, str]:
    training = _training(root, export)
    consent = export.manifest.get("consent")
    tags = {
        HASH_TAG: export.hash,
        MODEL_TAG: model.model_id,
        CONSENT_TAG: json.dumps(consent) if consent else None,
        FINGERPRINT_TAG: export.manifest.get("model"),
        "dreambooth.base": export.manifest.get("base"),
        "dreambooth.prior": _prior_key(root, training),
        "dreambooth.params": _params_hash(training),
        "dreambooth.subject": export.subject,
        "dreambooth.class_noun": export.generation["class_noun"],
        "dreambooth.identifier": export.generation["identifier"],
        SIZE_TAG: export.size,
        "dreambooth.version": __version__,
        "dvc.path": f"export/{export.subject}",
        MD5_TAG: export.md5,
        "git.commit": _git_commit(root),
    }
    return {name: str(value) for name, value in tags.items() if value is not None}


def _training(root: Path, export: Export) -> dict[str, Any]:
    """Return what models/<id> says it was trained from, if that is the model of this export; else nothing."""
    about = _about(root / "models" / export.subject)
    inputs: dict[str, Any] = about.get("inputs") or {}
    return inputs if about.get("fingerprint") == export.manifest.get("model") else {}


def _prior_key(root: Path, training: Mapping[str, Any]) -> str | None:
    """Return the key of the class images that a training saw; None when others lie there by now."""
    for folder in (root / "build/classes").glob("*"):
        about = _about(folder)
        if about and sha256_of(about["files"]) == training.get("prior"):
            return str(about["key"]) if "key" in about else None
    return None


def _params_hash(training: Mapping[str, Any]) -> str | None:
    """Return the hash of all parameters of a training."""
    chosen = {name: training.get(name) for name in ("train", "resolution", "identifier", "class_noun")}
    return sha256_of(chosen) if training else None


def _about(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        return {}
    try:
        return read_manifest(folder, verify=False)
    except TornFolderError:
        return {}


def _add_evaluation(client: "MlflowClient", root: Path, version: "ModelVersion", export: Export) -> None:
    """Keep what the gate will look at beside the run, and say in the tags of the version which evaluation it is.

    What an earlier evaluation measured and this one did not goes: a row of scores is of one evaluation.
    """
    folder = root / "build" / export.subject / "evaluation"
    about = _about(folder)
    key = about.get("fingerprint")
    if not key or about.get("model") != export.manifest.get("model") or version.tags.get(EVALUATION_TAG) == key:
        return
    for name in SCORES:
        client.log_artifact(version.run_id, str(folder / name), f"evaluation/{key}")
    metrics = {f"{METRIC_PREFIX}{name}": f"{value:.6g}" for name, value in _metrics(root, export).items()}
    for name in sorted(name for name in version.tags if name.startswith(METRIC_PREFIX) and name not in metrics):
        client.delete_model_version_tag(export.subject, version.version, name)
    for name, value in {**metrics, EVALUATION_TAG: key}.items():
        client.set_model_version_tag(export.subject, version.version, name, value)


def _metrics(root: Path, export: Export) -> dict[str, float]:
    """Return the numbers of metrics/<id>.json, flat, if they were measured on this export; else nothing."""
    evaluation = root / "build" / export.subject / "evaluation"
    about = _about(evaluation)
    try:
        content = json.loads((root / "metrics" / f"{export.subject}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return flat_metrics(content) if about.get("model") == export.manifest.get("model") else {}


def _complete_run(client: "MlflowClient", root: Path, run_id: str, export: Export) -> None:
    """Give the run of the model its scores and its grid, where the evaluation went to another store or to none."""
    from mlflow.entities import Metric

    metrics = _metrics(root, export)
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

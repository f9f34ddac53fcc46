"""Find, check and load the registered versions of a subject; nothing here changes the registry."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dreambooth.errors import ConsentError, ModelError, ParamsError, RegistryError
from dreambooth.folders import MANIFEST, TornFolderError, hash_of_files, work_folder
from dreambooth.mlflowstore import connect, database_file, explain, paged, tracking_uri
from dreambooth.params import check_id
from dreambooth.pointer import POINTER, named_beside, require_beside, resolve_whole
from dreambooth.redaction import redact
from dreambooth.yaml12 import YamlError, load_yaml

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel
    from mlflow.tracking import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"
HASH_TAG = "dreambooth.export_hash"
MODEL_TAG = "dreambooth.model_id"
EVALUATION_TAG = "dreambooth.evaluation"
METRIC_PREFIX = "metric."  # of the tags that hold the scores of that evaluation
VERDICT_TAG = "dreambooth.verdict"
REASON_TAG = "dreambooth.reason"
GATE_TAG = "dreambooth.gate"  # what the gate said where it was overruled
CONSENT_TAG = "dreambooth.consent"
FINGERPRINT_TAG = "dreambooth.fingerprint"
MD5_TAG = "dvc.md5"
SIZE_TAG = "dreambooth.size"


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model that is whole."""

    name: str
    version: int
    created: bool
    """False when it was there before."""
    export_hash: str
    """Content of export/<id> that it was made from."""
    md5: str | None = None
    """Of that folder in dvc.lock."""


@dataclass(frozen=True)
class Row:
    """What is known of one version, for a table."""

    version: int
    aliases: tuple[str, ...]
    created: float
    """Seconds since 1970."""
    verdict: str
    reason: str
    scores: Mapping[str, float]
    size: int | None
    """Bytes of the export."""
    faults: tuple[str, ...] | None
    """What is wrong with its files; None where nobody looked."""


def find(root: Path, subject_id: str, version: int | None = None, alias: str | None = None) -> RegisteredVersion | None:
    """Return a version of a subject: this one, the one with this alias, or the newest; None if there is none."""
    if not is_there(root):
        return None
    with explained(root, f"find {subject_id}", "try again when it answers"):
        found = find_version(client_of(root), check_id(subject_id), version, alias)
    return _registered(found) if found else None


def find_export(root: Path, subject_id: str, tag: str, value: str | None) -> RegisteredVersion | None:
    """Return the version of an export, whatever was registered after it; None if there is none.

    Args:
        root: of the project.
        subject_id: of the subject.
        tag: what the export is known by: HASH_TAG, or MD5_TAG where its files lie elsewhere.
        value: of that tag; None is no export.

    Returns:
        Of several versions of the same files the challenger, else the oldest.
    """
    if value is None or not is_there(root):
        return None
    with explained(root, f"find the export of {subject_id}", "try again when it answers"):
        client = client_of(root)
        found = [one for one in made_of(client, check_id(subject_id), tag, value) if one.status == "READY"]
        challenger = aliases_of(client, subject_id).get(CHALLENGER) if len(found) > 1 else None
    chosen = next((one for one in found if int(one.version) == challenger), found[0] if found else None)
    return _registered(chosen) if chosen else None


def is_registered(root: Path, subject_id: str, tag: str, value: str | None) -> bool:
    """Tell whether an export has a version to which `challenger` points: to register it would change nothing.

    Args:
        root: of the project.
        subject_id: of the subject.
        tag: see `find_export`.
        value: of that tag.
    """
    found = find_export(root, subject_id, tag, value)
    challenger = find(root, subject_id, alias=CHALLENGER) if found else None
    return found is not None and (challenger is None or challenger.version == found.version)


def recorded_md5(root: Path, path: str) -> str | None:
    """Return the md5 that dvc.lock has of an output; None without one."""
    try:
        state = (root / "dvc.lock").stat()
        return _recorded(root / "dvc.lock", state.st_ino, state.st_mtime_ns, state.st_size).get(path)
    except (OSError, YamlError, KeyError, TypeError):
        return None


@lru_cache(maxsize=1)
def _recorded(lock: Path, inode: int, mtime_ns: int, size: int) -> dict[str, str | None]:
    """Read the md5 of all outputs once for each state of a dvc.lock: of 60 subjects that takes seconds."""
    stages = load_yaml(lock.read_text(encoding="utf-8"))["stages"]
    return {out.get("path"): out.get("md5") for stage in stages.values() for out in stage.get("outs", ())}


def is_there(root: Path) -> bool:
    """Tell whether anything can have been registered: asking MLflow about a missing database would create it."""
    file = database_file(tracking_uri(root))
    return file is None or file.exists()


def choose(root: Path, subject_id: str, version: int | None = None) -> RegisteredVersion:
    """Return this version, else the champion, else the challenger, else the newest.

    Raises:
        RegistryError: there is none.
    """
    choices = [(version, None)] if version else [(None, CHAMPION), (None, CHALLENGER), (None, None)]
    found = next((hit for number, alias in choices if (hit := find(root, subject_id, number, alias))), None)
    if found is None:
        which = f"version {version}" if version else "version"
        raise RegistryError(
            f"{subject_id} has no {which} in {redact(tracking_uri(root))}; {next_step(root, subject_id)}"
        )
    return found


def load_found(root: Path, found: RegisteredVersion) -> "PyFuncModel":
    """Load a version that was found, to draw with.

    The result's `predict({"prompt": "..."}, params={"seed": 1})` returns PNG bytes, see `dreambooth.serving`.

    Raises:
        RegistryError: its files are not whole.
    """
    name = found.name
    remedy = f"its files come back when the same export is registered again: dreambooth register {name}"
    with explained(root, f"load version {found.version} of {name}", remedy):
        source = client_of(root).get_model_version_download_uri(name, str(found.version))
        with downloaded(root, source, name) as folder:
            return load_folder(root, folder)


def generation_of(model: "PyFuncModel") -> dict[str, Any]:
    """Return generation.json of a loaded version: whose it is, the words that it was trained with, how it draws."""
    return dict(model.unwrap_python_model().generation)


def predict(model: "PyFuncModel", prompts: Sequence[str], options: Mapping[str, Any]) -> list[bytes]:
    """Draw prompts with a loaded version; return a PNG for each.

    Raises:
        ParamsError: an option that the model refuses.
        ConsentError: the version shows a person whose consent has ended.
    """
    from mlflow.exceptions import MlflowException

    try:
        return list(model.predict({"prompt": list(prompts)}, params=dict(options)))
    except MlflowException as error:
        if error.error_code == "PERMISSION_DENIED":
            raise ConsentError(str(error.message)) from error
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise ParamsError(str(error.message).splitlines()) from error


def next_step(root: Path, subject_id: str) -> str:
    """Return the command that leads on from a version that is not there: it shows those that are, or registers one."""
    return f"dreambooth versions {subject_id}" if find(root, subject_id) else step_to_register(root, subject_id)


def step_to_register(root: Path, subject_id: str) -> str:
    """Return the command that registers a version of a subject: what never ran has no export to register."""
    verb = "register" if (root / "export" / subject_id).is_dir() else "run"
    return f"dreambooth {verb} {subject_id}"


def rows(root: Path, subject_id: str, limit: int | None = 20, deep: bool = False) -> list[Row]:
    """Return the versions of a subject, the newest first; those with an alias are among them, however old.

    Args:
        root: of the project.
        subject_id: of the subject.
        limit: of the versions that are shown; None shows all.
        deep: compare the sha256 of every file of every version, else names and sizes of those with an alias; what they
            only point to is hashed all the same, see `check_files`.
    """
    if not is_there(root):
        return []
    with explained(root, f"list the versions of {subject_id}", "try again when it answers"):
        client = client_of(root)
        aliases = aliases_of(client, check_id(subject_id))
        by_version: dict[int, list[str]] = {}
        for alias, number in sorted(aliases.items()):
            by_version.setdefault(number, []).append(alias)
        found = {int(one.version): one for one in all_versions(client, subject_id, limit)}
        found |= {
            number: one
            for number in set(by_version) - set(found)
            if (one := find_version(client, subject_id, number, None))
        }
        return [
            _row(root, client, found[number], tuple(by_version.get(number, ())), deep)
            for number in sorted(found, reverse=True)
        ]


def in_words(root: Path, subjects: Iterable[str]) -> dict[str, str]:
    """Return the versions of each subject in words, the newest first: "v2 @champion, v1", or "none"."""
    if not is_there(root):
        return dict.fromkeys(subjects, "none")
    with explained(root, "list the versions", "try again when it answers"):
        client = client_of(root)
        return {subject_id: _in_words(client, check_id(subject_id)) for subject_id in subjects}


def _in_words(client: "MlflowClient", subject_id: str) -> str:
    named: dict[int, str] = {}
    for alias, number in sorted(aliases_of(client, subject_id).items()):
        named[number] = f"{named.get(number, '')} @{alias}"
    found = all_versions(client, subject_id)
    return ", ".join(f"v{one.version}{named.get(int(one.version), '')}" for one in found) or "none"


def check_files(root: Path, client: "MlflowClient", version: "ModelVersion", deep: bool = True) -> list[str]:
    """Say what is wrong with the files of a version; an empty list if nothing is.

    Args:
        root: of the project.
        client: from `connect`.
        version: of the registry.
        deep: compare every sha256, which over HTTP downloads the version; else names and sizes. A pipeline behind a
            pointer lies on this machine, and is hashed either way: MLflow knows no size of it.
    """
    from mlflow.exceptions import MlflowException

    name = version.name
    try:
        source = client.get_model_version_download_uri(name, str(version.version))
        if deep:
            with downloaded(root, source, name) as folder:
                require_beside(folder / "artifacts" / name)
                actual = resolve_whole(folder / "artifacts" / name, root)[1]
        else:
            actual = _shallow_hash(root, client, version, source)
    except (MlflowException, OSError, TornFolderError, ModelError) as error:
        return [explain(error)]
    expected = version.tags.get(HASH_TAG)
    return [] if actual == expected else [f"the files are those of another export ({actual[:12]}, not {expected})"]


def aliases_of(client: "MlflowClient", name: str) -> dict[str, int]:
    """Return the aliases of a subject's versions; none where nothing was registered."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


def all_versions(client: "MlflowClient", name: str, limit: int | None = None) -> "list[ModelVersion]":
    """Return the versions of a registered model, the newest first."""
    return list(islice(_newest_first(client, name, min(limit or 1000, 1000)), limit))


def _newest_first(client: "MlflowClient", name: str, page_size: int) -> "Iterator[ModelVersion]":
    """Yield the versions of a registered model, asking for so many at a time."""
    query, order = f"name = '{name}'", ["version_number DESC"]
    yield from paged(client.search_model_versions, query, order_by=order, max_results=page_size)


def made_of(client: "MlflowClient", name: str, tag: str, value: str) -> "list[ModelVersion]":
    """Return the versions that were made from the same bytes, the oldest first."""
    found = paged(client.search_model_versions, f"name = '{name}' and tags.`{tag}` = '{value}'")
    return sorted(found, key=lambda version: int(version.version))


def find_version(client: "MlflowClient", name: str, version: int | None, alias: str | None) -> "ModelVersion | None":
    """Return a version that is READY: this one, the one with this alias, or the newest; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        if version is not None:
            found = [client.get_model_version(name, str(version))]
        elif alias is not None:
            found = [client.get_model_version_by_alias(name, alias)]
        else:
            return next((hit for hit in _newest_first(client, name, 20) if hit.status == "READY"), None)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the second: no such alias
            return None
        raise
    return next((hit for hit in found if hit.status == "READY"), None)


@contextmanager
def explained(root: Path, what: str, remedy: str) -> Iterator[None]:
    """Turn what MLflow, the network and a damaged store raise into one line with the next step."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError, TornFolderError, ModelError) as error:
        where = redact(tracking_uri(root))
        raise RegistryError(f"cannot {what} in {where}: {explain(error)}; {remedy}") from error


@contextmanager
def downloaded(root: Path, source: str, subject_id: str) -> Iterator[Path]:
    """Yield a local folder with the files of a version: the stored one, or a copy that goes away."""
    from mlflow.artifacts import download_artifacts

    uri = tracking_uri(root)
    if urlsplit(source).scheme in ("", "file"):
        yield Path(download_artifacts(artifact_uri=source, tracking_uri=uri))
        return
    with work_folder(root, "download", subject_id) as target:
        yield Path(download_artifacts(artifact_uri=source, dst_path=target, tracking_uri=uri))


def load_folder(root: Path, folder: Path) -> "PyFuncModel":
    """Load a model folder of MLflow with the code of this package, not the copy that lies in it.

    Args:
        root: the project in which a pipeline is looked for that the folder only points to.
        folder: with the file MLmodel.
    """
    import mlflow.pyfunc

    path, home = list(sys.path), os.environ.get("DREAMBOOTH_HOME")
    os.environ["DREAMBOOTH_HOME"] = str(root)  # MLflow hands the model nothing else of ours
    try:
        return mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)
    finally:
        sys.path[:] = path
        if home is None:
            os.environ.pop("DREAMBOOTH_HOME", None)
        else:
            os.environ["DREAMBOOTH_HOME"] = home


def stored_sizes(client: "MlflowClient", model_id: str, name: str) -> dict[str, int]:
    """Return the size of every file of a subject's export, or of what points to it, in a logged model of MLflow."""
    folder = f"artifacts/{name}"
    return {path.removeprefix(f"{folder}/"): size for path, size in _listing(client, model_id, folder)}


def size_faults(present: Mapping[str, int], files: Mapping[str, Any]) -> list[str]:
    """Say which files of a manifest are missing or have another size; an empty list if none."""
    return [
        f"{name} has {present.get(name, 'no')} bytes, not {entry['size']}"
        for name, entry in files.items()
        if present.get(name) != entry["size"]
    ]


def _listing(client: "MlflowClient", model_id: str, folder: str) -> Iterator[tuple[str, int]]:
    """Yield path and size of every file below a folder of a logged model."""
    for entry in client.list_logged_model_artifacts(model_id, folder):
        if entry.is_dir:
            yield from _listing(client, model_id, entry.path)
        else:
            yield entry.path, int(entry.file_size)


def client_of(root: Path) -> "MlflowClient":
    """Return a client of the registry of a project."""
    return connect(root)[0]


def _registered(version: "ModelVersion") -> RegisteredVersion:
    tags = version.tags
    return RegisteredVersion(version.name, int(version.version), False, tags.get(HASH_TAG, ""), tags.get(MD5_TAG))


def _shallow_hash(root: Path, client: "MlflowClient", version: "ModelVersion", source: str) -> str:
    """Return the hash that the stored manifest stands for, after names and sizes were found to be as it says.

    What a pointer leads to is hashed.
    """
    folder = f"artifacts/{version.name}"
    present = stored_sizes(client, version.tags[MODEL_TAG], version.name)
    if POINTER in present:
        with downloaded(root, f"{source}/{folder}/{POINTER}", version.name) as file:
            _require_sizes(present, named_beside(file))
            return resolve_whole(file.parent, root)[1]
    if MANIFEST not in present:
        raise TornFolderError(f"{folder}/{MANIFEST} is missing")
    with downloaded(root, f"{source}/{folder}/{MANIFEST}", version.name) as file:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
    _require_sizes(present, files)
    return hash_of_files(files)


def _require_sizes(present: Mapping[str, int], files: Mapping[str, Any]) -> None:
    if wrong := size_faults(present, files):
        raise TornFolderError("; ".join(wrong))


def _row(root: Path, client: "MlflowClient", version: "ModelVersion", aliases: tuple[str, ...], deep: bool) -> Row:
    tags = version.tags
    looked = deep or aliases
    return Row(
        version=int(version.version),
        aliases=aliases,
        created=version.creation_timestamp / 1000,
        verdict=tags.get(VERDICT_TAG, ""),
        reason=tags.get(REASON_TAG, ""),
        scores={
            name.removeprefix(METRIC_PREFIX): float(value)
            for name, value in tags.items()
            if name.startswith(METRIC_PREFIX)
        },
        size=int(tags[SIZE_TAG]) if SIZE_TAG in tags else None,
        faults=tuple(check_files(root, client, version, deep)) if looked else None,
    )

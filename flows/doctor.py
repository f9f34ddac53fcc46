"""Look at everything a project relies on, and say of each fault what mends it; nothing is changed."""

import ipaddress
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from packaging.requirements import Requirement

from dreambooth import __version__, health
from dreambooth.consent import PERSON, require_consent
from dreambooth.errors import DreamboothError, shown
from dreambooth.folders import PLACES, WORKS, checkpoint_folders, is_private, leftovers, misnamed, scratch_folder
from dreambooth.health import Finding, State
from dreambooth.params import Params, load_params
from dreambooth.redaction import redact
from dreambooth.tracking import PENDING, unsent
from flows.copies import copies
from flows.project import PARAMS

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

LOW_BYTES = 2e9  # of free disk
SOON = 30  # days before a consent ends
IDLE_DAYS = 7  # of a training that nobody continues
TOLD = ("torch", "diffusers", "prefect", "dvc", "mlflow")  # whose versions who reports a fault is asked for


def examine(root: Path) -> list[Finding]:
    """Look at database, artifacts of aliased versions, orphan runs, DVC, scratch, device, servers and versions."""
    findings: list[Finding] = []
    params = _params(root, findings)
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "registry": lambda: health.examine(root, list(params.subjects) if params else []),
        "consent": lambda: _consents(root, params),
        "DVC": lambda: _dvc(root),
        "scratch": lambda: _scratch(root, params),
        "device": lambda: _device(params),
        "Prefect": _prefect,
        "servers": lambda: _servers(listeners(), dict(os.environ)),
        "libraries": lambda: _libraries(installed),
    }
    for what, look in looks.items():
        try:
            findings += look()
        except DreamboothError as error:
            findings.append(Finding("broken", what, redact(str(error)), "see there; then: dreambooth doctor"))
    return findings


def installed(package: str) -> str | None:
    """Return the installed version of a package; None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def listeners() -> list[tuple[str, int, tuple[str, ...]]]:
    """Return address, port and words of the command of every MLflow or Prefect process of this user that listens."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = tuple(process.info["cmdline"] or ())
        if not _program(command):
            continue
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.Error:
            continue  # of another user, or gone
        found += [(one.laddr.ip, one.laddr.port, command) for one in connections if one.status == psutil.CONN_LISTEN]
    return sorted(set(found))


def _params(root: Path, findings: list[Finding]) -> Params | None:
    try:
        return load_params(root / PARAMS)
    except DreamboothError as error:
        findings.append(Finding("broken", PARAMS, str(error).splitlines()[0], f"mend {root / PARAMS}"))
        return None


def _consents(root: Path, params: Params | None) -> Iterator[Finding]:
    for subject_id, subject in params.subjects.items() if params else ():
        if subject.kind != PERSON:
            continue
        what = f"consent of {subject_id}"
        try:
            consent = require_consent(params, subject_id, root) if params else None
        except DreamboothError as error:
            yield Finding("broken", what, str(error), "no training and no promotion until then")
            continue
        assert consent is not None
        days = (consent.until - date.today()).days
        state: State = "warning" if days <= SOON else "good"
        yield Finding(state, what, f"until {consent.until}, {days} days", "ask again in time" if days <= SOON else "")


def _dvc(root: Path) -> Iterator[Finding]:
    from flows.dvcstore import empty_keys, remotes

    if not (root / ".dvc").is_dir():
        yield Finding("broken", "DVC", f"{root} has no .dvc folder", "dvc init (with --no-scm outside of git)")
        return
    known = remotes(root)
    if not known:
        remedy = "dvc remote add --default NAME URL, then dvc push --run-cache"
        yield Finding("warning", "DVC remote", "none: what was computed exists on this machine alone", remedy)
    for name, fault in known.items():
        remedy = f"dvc remote list; mend {name}, or sign in" if fault else ""
        yield Finding("broken" if fault else "good", f"DVC remote {name}", fault or "answers", remedy)
    if empty := empty_keys(root):
        runs = empty[0].parents[1]
        found = f"{len(empty)} of its keys have no entry, and the stages that look there fail ('join() argument')"
        remedy = f"when nothing runs: find {shlex.quote(str(runs))} -mindepth 1 -type d -empty -delete"
        yield Finding("broken", "DVC run cache", found, remedy)
    if linked := sorted({path.parent.name for path in (root / "data" / "subjects").glob("*/*") if path.is_symlink()}):
        found = f"photos of {', '.join(map(shown, linked))} are symbolic links, which no stage follows"
        remedy = "dvc config cache.type reflink,hardlink,copy; dvc checkout --relink"
        yield Finding("broken", "DVC links", found, remedy)
    if problems := misnamed(root / "data"):
        yield Finding("broken", "names", " | ".join(problems), "rename them: no run can begin")


def _prefect() -> Iterator[Finding]:
    from flows import prefectstore

    if not (url := prefectstore.server()):
        return
    from prefect.client.orchestration import get_client

    from flows.program import reached

    with reached(), get_client(sync_client=True) as client:
        client.api_version()
        paused = _paused(client)
    yield Finding("good", "Prefect", f"{redact(url)} answers", "")
    if paused:
        found = f"paused, so nothing starts by itself: {', '.join(paused)}"
        yield Finding("warning", "Prefect deployments", found, "switch them on in the UI of Prefect")


def _paused(client: "SyncPrefectClient") -> list[str]:
    """Return the deployments of our flows that do not start by themselves, since somebody has switched them off."""
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    from flows.automations import FLOWS

    ours = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=FLOWS)), limit=200)
    return sorted(one.name for one in ours if one.paused or not all(schedule.active for schedule in one.schedules))


def _scratch(root: Path, params: Params | None) -> Iterator[Finding]:
    from flows.forget import interrupted

    folder = scratch_folder(root)
    free = shutil.disk_usage(folder).free
    yield Finding(
        "warning" if free < LOW_BYTES else "good",
        "disk",
        f"{free / 1e9:.1f} GB are free in {folder}",
        "make room, or set DREAMBOOTH_SCRATCH to another disk" if free < LOW_BYTES else "",
    )
    if not is_private(folder):
        yield Finding("warning", "scratch", f"others may look into {folder}: latents of photos", f"chmod 700 {folder}")
    left = [path.name for work in WORKS for path in folder.glob(f"{work}-*")]
    if left:
        remedy = f"when nothing runs: rm -r {folder}/{{{','.join(WORKS)}}}-*"
        yield Finding("warning", "scratch", f"left behind by a process that was killed: {', '.join(left)}", remedy)
    yield from _left_beside(root)
    yield from _copies(root)
    if waiting := len(list(unsent(root).glob(f"*/{PENDING}"))):
        yield Finding("warning", "metrics", f"{waiting} parcels wait for MLflow", "python -m dreambooth.tracking")
    known = set(params.subjects) if params else set()
    for subject_id in interrupted(root):
        remedy = f"dreambooth forget {subject_id} --yes"
        yield Finding("broken", f"forget {subject_id}", "was interrupted", remedy)
    checkpoints = checkpoint_folders(root)
    stale = [path.name for path, whose in checkpoints.items() if whose not in known]
    if params and stale:
        yield Finding("warning", "checkpoints", f"of subjects that are no more: {', '.join(stale)}", "remove them")
    idle = [path for path, whose in checkpoints.items() if whose in known and _days_idle(path) > IDLE_DAYS]
    if params and idle:
        named = ", ".join(f"{path.name} ({_bytes_of(path) / 1e9:.1f} GB)" for path in idle)
        remedy = "continue them with the parameters they began with, or remove their folders"
        yield Finding("warning", "checkpoints", f"of trainings stopped over {IDLE_DAYS} days ago: {named}", remedy)


def _left_beside(root: Path) -> Iterator[Finding]:
    """Name what killed writers left beside the folders of subjects: hidden, with photos or weights in it."""
    for place in PLACES:
        if left := [shown(path.name) for path in leftovers(root / place)]:
            found = f"left behind by a process that was killed: {', '.join(left)}"
            yield Finding("warning", place, found, f"when nothing runs: rm -r {root / place}/.[!.]*.*")


def _copies(root: Path) -> Iterator[Finding]:
    """Name the copies of the project that killed runs and sweeps left: there are photos and weights in them."""
    for copy in copies(root):
        if copy.user:
            continue
        what = "clone" if copy.is_clone else "sweep"
        found = f"left behind by a process that was killed: {copy.folder} ({_bytes_of(copy.folder) / 1e9:.1f} GB)"
        yield Finding("warning", what, found, f"rm -r {copy.folder}")


def _device(params: Params | None) -> Iterator[Finding]:
    """Say what computes, and what it could do that the parameters do not ask for."""
    from dreambooth import hardware

    gpu, dtype, remedy = hardware.gpu_in_words(), params.base.inference_dtype if params else None, ""
    if dtype == "float32" and (gpu or hardware.cpu_has_tiles()):
        half = "float16" if gpu else "bfloat16"
        remedy = f"base.inference_dtype: {half} draws about twice as fast here (docs/recipes.md)"
    elif dtype == "bfloat16" and hardware.gpu_lacks_bfloat16():
        remedy = "this GPU only emulates bfloat16: base.inference_dtype: float16, train.mixed_precision: fp16"
    found, unused = gpu or "the CPU: there is no GPU that torch can use", hardware.unused_gpu()
    yield Finding("warning" if unused else "good", "device", found, unused or remedy)


def _days_idle(folder: Path) -> float:
    return (time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))) / 86400


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _program(command: Sequence[str]) -> str:
    """Return mlflow or prefect, whichever a command runs, else nothing; a folder of that name says nothing.

    It is a program (bin/prefect), a module (-m mlflow), or what uvicorn serves (mlflow.server.fastapi_app:app).
    """
    for word in command:
        path = Path(word)
        called = path.name if path.parent.name in ("bin", "Scripts") else word
        if found := re.fullmatch(r"(mlflow|prefect)(\.exe|(\.\w+)+(:\w+)?)?", called):
            return found[1]
    return ""


def _is_open(address: str) -> bool:
    """Tell whether other machines reach what listens at an address; a name that is not localhost may be any."""
    if address == "localhost":
        return False
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return True
    return not (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _servers(found: list[tuple[str, int, tuple[str, ...]]], environment: dict[str, str]) -> Iterator[Finding]:
    """Warn of servers that the network can reach and nothing protects: MLflow and Prefect ask for no password."""
    has_password = bool(environment.get("PREFECT_SERVER_API_AUTH_STRING"))
    for address, port, command in found:
        if not _is_open(address):
            continue
        is_prefect = _program(command) == "prefect"
        if is_prefect and has_password:
            continue
        remedy = (
            "bind it to 127.0.0.1, or set PREFECT_SERVER_API_AUTH_STRING"
            if is_prefect
            else "bind it to 127.0.0.1 (--host), or pip install 'mlflow[auth]' and --app-name basic-auth behind TLS"
        )
        if is_prefect or not any("basic-auth" in word or word.startswith("mlflow.server.auth") for word in command):
            what = "Prefect" if is_prefect else "MLflow"
            at = f"port {port} of {address or 'every address'} is open to the network, no password"
            yield Finding("warning", f"{what} server", at, remedy)
    if _is_open(environment.get("PREFECT_SERVER_API_HOST", "127.0.0.1")) and not has_password:
        yield Finding(
            "warning",
            "Prefect server",
            "PREFECT_SERVER_API_HOST opens the next one to the network, no password",
            "unset it, or set PREFECT_SERVER_API_AUTH_STRING",
        )


def _libraries(installed_version: Callable[[str], str | None]) -> Iterator[Finding]:
    """Tell the versions, and compare them with what pyproject.toml asks for; an extra is nobody's duty."""
    told = ", ".join(f"{name} {found}" for name in TOLD if (found := installed_version(name)))
    told = f"dreambooth {__version__}, {told}"
    install, faults = "python -m pip install --constraint constraints.txt --editable .", []
    try:
        wanted = requires("dreambooth") or []
    except PackageNotFoundError:  # called from its folder alone
        yield Finding("warning", "libraries", f"their bounds are not known, it is not installed: {told}", install)
        return
    for needed in map(Requirement, wanted):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        have = installed_version(needed.name)
        if have is None:
            faults.append(f"{needed.name} is missing")
        elif not needed.specifier.contains(have, prereleases=True):
            faults.append(f"{needed.name} {have}, wanted {needed.specifier}")
    found = f"{'; '.join(faults) or 'within their bounds'}: {told}"
    yield Finding("broken" if faults else "good", "libraries", found, install if faults else "")

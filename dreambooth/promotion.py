"""Promote a version to champion through the gate, go back to the one before, and finish what was interrupted."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth import aliases
from dreambooth.consent import PERSON, Consent, require_consent, require_lasting
from dreambooth.errors import EvaluationError, GateError, RegistryError
from dreambooth.folders import TornFolderError, read_manifest, work_folder
from dreambooth.gate import Scorecard, decide, read_scorecard
from dreambooth.params import Params, check_id
from dreambooth.pointer import resolve
from dreambooth.registry import alone
from dreambooth.versions import (
    CHALLENGER,
    CHAMPION,
    CONSENT_TAG,
    EVALUATION_TAG,
    FINGERPRINT_TAG,
    REASON_TAG,
    VERDICT_TAG,
    check_files,
    client_of,
    downloaded,
    explained,
    find_version,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

Rescore = Callable[[Params, str, Path, Path, str, Path], None]
REMEDY = "nothing was changed, or what was begun is finished by the next call: dreambooth versions"


@dataclass(frozen=True)
class Promotion:
    """What became of a promotion or a rollback."""

    name: str
    champion: int
    """From now on."""
    before: int | None
    """What it was."""
    verdict: str
    """promote, forced, rollback; unchanged where it was the champion before."""
    reason: str


def promote(
    root: Path,
    params: Params,
    subject_id: str,
    version: int | None = None,
    force: str | None = None,
    rescore: Rescore | None = None,
) -> Promotion:
    """Make a version the champion if the gate finds it better; write the verdict down, whatever it is.

    Args:
        root: of the project.
        params: all of them: the margins of the gate, and whether the subject is a person.
        subject_id: of the subject.
        version: else the challenger.
        force: why the gate is overruled. Files that are not whole, and a missing consent, it does not overrule.
        rescore: evaluates challenger and champion in one run where they were evaluated differently, see
            `stages.evaluate.beside_champion`; None keeps the champion then.

    Raises:
        GateError: the gate keeps the champion, or cannot tell; the message says why.
        ConsentError: a person without a consent that holds.
        RegistryError: no such version, files that are not whole, or another process promoted meanwhile.
    """
    _require_reason(force)
    with explained(root, f"promote {subject_id}", REMEDY), alone(root, check_id(subject_id)):
        client = client_of(root)
        champion = aliases.settle(client, subject_id, CHAMPION)
        candidate = _candidate(client, subject_id, version)
        number = int(candidate.version)
        if number == champion:
            return Promotion(subject_id, number, number, "unchanged", "it is the champion already")
        _require_consent_of(params, root, candidate)
        _require_files(root, client, candidate)
        if champion is not None and force is None:
            _require_champion(root, client, subject_id, champion)
        verdict, reason = ("forced", force) if force else _judge(root, client, params, candidate, champion, rescore)
        for tag, value in ((VERDICT_TAG, verdict), (REASON_TAG, reason)):
            client.set_model_version_tag(subject_id, str(number), tag, value[: aliases.MAX_TEXT])
        if verdict not in ("promote", "forced"):
            aliases.append(client, subject_id, "refuse", CHAMPION, champion, number, verdict, reason)
            raise GateError(
                f"version {number} of {subject_id} does not become the champion: {reason}; "
                f'to overrule the gate: dreambooth promote {subject_id} --version {number} --force "WHY"'
            )
        aliases.move(client, subject_id, "promote", CHAMPION, champion, number, verdict, reason)
    return Promotion(subject_id, number, champion, verdict, reason)


def rollback(root: Path, params: Params, subject_id: str, force: str | None = None) -> Promotion:
    """Make the champion before this one the champion again; those whose files are not whole are passed over.

    Args:
        root: of the project.
        params: of the project, to ask for the consent of a person.
        subject_id: of the subject.
        force: why a champion is left whose files are gone, instead of getting them back.

    Raises:
        RegistryError: no previous champion, none that is whole, or the champion's files are gone.
    """
    _require_reason(force)
    with explained(root, f"roll {subject_id} back", REMEDY), alone(root, check_id(subject_id)):
        client = client_of(root)
        champion = aliases.settle(client, subject_id, CHAMPION)
        earlier = aliases.history(aliases.read_log(client, subject_id), CHAMPION)[:-1]
        if champion is None or not earlier:
            raise RegistryError(
                f"{subject_id} has no champion before {f'version {champion}' if champion else 'any'}; "
                f"promote another version: dreambooth promote {subject_id} --version N"
            )
        if force is None:
            _require_champion(root, client, subject_id, champion)
        target, passed_over = _newest_whole(root, client, subject_id, [one for one in earlier if one != champion])
        _require_consent_of(params, root, target)
        number = int(target.version)
        reason = "; ".join([force or "asked for", *passed_over])
        aliases.move(client, subject_id, "rollback", CHAMPION, champion, number, "rollback", reason)
    return Promotion(subject_id, number, champion, "rollback", reason)


def consent_of(version: "ModelVersion") -> Consent | None:
    """Return the consent that stands in the tags of a version."""
    text = version.tags.get(CONSENT_TAG)
    return Consent.model_validate(json.loads(text)) if text else None


def _require_reason(force: str | None) -> None:
    if force is not None and not force.strip():
        raise RegistryError('--force needs a reason, which is recorded: --force "WHY"')


def _candidate(client: "MlflowClient", name: str, version: int | None) -> "ModelVersion":
    found = find_version(client, name, version, None if version else CHALLENGER)
    if found is None:
        which = f"version {version}" if version else CHALLENGER
        raise RegistryError(f"{name} has no {which} to promote; dreambooth versions {name}, dreambooth register {name}")
    return found


def _require_consent_of(params: Params, root: Path, version: "ModelVersion", today: date | None = None) -> None:
    """Ask for the consent beside the photos, which is the newest word; where they are not, for that in the tags."""
    name = version.name
    subject, recorded = params.subjects.get(name), consent_of(version)
    is_person = recorded is not None or (subject is not None and subject.kind == PERSON)
    if not is_person:
        return
    if recorded is None or (root / "data" / "subjects" / name).is_dir():
        require_consent(params, name, root, today)
    else:
        require_lasting(recorded, name, today)


def _require_files(root: Path, client: "MlflowClient", version: "ModelVersion") -> None:
    if faults := check_files(root, client, version):
        raise RegistryError(
            f"version {version.version} of {version.name} cannot be served: {'; '.join(faults)}; its files come back "
            f"when the same export is registered again: dreambooth register {version.name}"
        )


def _require_champion(root: Path, client: "MlflowClient", name: str, champion: int) -> None:
    """Refuse to go on from a champion whose files are gone: whoever asks should know, and say so."""
    found = find_version(client, name, champion, None)
    faults = check_files(root, client, found) if found else ["the version was deleted"]
    if faults:
        raise RegistryError(
            f"the champion, version {champion} of {name}, is not whole: {'; '.join(faults)}; its files come back when "
            f"the same export is registered again: dreambooth register {name}; to go on without them, say why: "
            '--force "WHY"'
        )


def _newest_whole(
    root: Path, client: "MlflowClient", name: str, earlier: list[int]
) -> "tuple[ModelVersion, list[str]]":
    passed_over: list[str] = []
    for number in reversed(earlier):
        found = find_version(client, name, number, None)
        faults = check_files(root, client, found) if found else ["deleted"]
        if found and not faults:
            return found, passed_over
        passed_over.append(f"version {number} passed over: {'; '.join(faults)}")
    raise RegistryError(f"{name} has no earlier champion whose files are whole ({' | '.join(passed_over)})")


def _judge(
    root: Path,
    client: "MlflowClient",
    params: Params,
    candidate: "ModelVersion",
    champion: int | None,
    rescore: Rescore | None,
) -> tuple[str, str]:
    """Return verdict and reason of the gate; what cannot be compared keeps the champion."""
    found = find_version(client, candidate.name, champion, None) if champion else None
    try:
        challenger = _scorecard(root, client, candidate)
        other = _scorecard(root, client, found) if found else _scorecard(root, client, candidate, "base")
        if found and rescore and challenger.how != other.how and _is_trained_here(root, candidate):
            challenger, other = _scored_again(root, client, params, found, rescore)
        decision = decide(challenger, other, params.gate, params.evaluate.confidence)
    except EvaluationError as error:
        return "keep", f"keep: {error}"
    return decision.verdict, decision.line


def _is_trained_here(root: Path, candidate: "ModelVersion") -> bool:
    """Tell whether models/<id> is the training that a version was made from."""
    try:
        manifest = read_manifest(root / "models" / candidate.name)
    except TornFolderError:
        return False
    return bool(manifest.get("fingerprint") == candidate.tags.get(FINGERPRINT_TAG))


def _scored_again(
    root: Path, client: "MlflowClient", params: Params, champion: "ModelVersion", rescore: Rescore
) -> tuple[Scorecard, Scorecard]:
    """Evaluate challenger and champion in one run, with the evaluator of today."""
    name, source = champion.name, client.get_model_version_download_uri(champion.name, str(champion.version))
    with (
        downloaded(root, source, name) as folder,
        work_folder(root, "scores", name) as target,
    ):
        parts, place = resolve(folder / "artifacts" / name), Path(target) / "evaluation"
        rescore(params, name, root, parts, champion.tags[FINGERPRINT_TAG], place)
        return read_scorecard(place, "personalised"), read_scorecard(place, "champion")


def _scorecard(root: Path, client: "MlflowClient", version: "ModelVersion", model: str = "personalised") -> Scorecard:
    """Read the scores that were registered with a version."""
    key = version.tags.get(EVALUATION_TAG)
    if not key:
        raise EvaluationError(
            f"version {version.version} of {version.name} was registered without an evaluation; evaluate and register "
            f"its export again: dreambooth run {version.name}"
        )
    with work_folder(root, "scores", version.name) as target:
        folder = client.download_artifacts(version.run_id, f"evaluation/{key}", target)
        return read_scorecard(Path(folder), model)

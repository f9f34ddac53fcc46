"""Promote a version to champion through the gate, go back to the one before, and finish what was interrupted."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dreambooth import aliases
from dreambooth.beside import Beside, Side, lay_beside
from dreambooth.consent import RECORD, Consent, read_consent, require_consent, require_lasting
from dreambooth.errors import DreamboothError, EvaluationError, GateError, RegistryError
from dreambooth.folders import TornFolderError, read_manifest, sha256_of, work_folder
from dreambooth.gate import decide, differing, read_scorecard
from dreambooth.images import read_prepared
from dreambooth.mlflowstore import explain
from dreambooth.params import Params, check_id
from dreambooth.pointer import resolve
from dreambooth.registry import alone
from dreambooth.versions import (
    CHALLENGER,
    CHAMPION,
    CONSENT_TAG,
    EVALUATION_TAG,
    FINGERPRINT_TAG,
    GATE_TAG,
    MD5_TAG,
    REASON_TAG,
    VERDICT_TAG,
    check_files,
    client_of,
    downloaded,
    explained,
    find_version,
    next_step,
)

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

Rescore = Callable[[Params, str, Path, Path, str, Path], None]
Trained = Callable[[Path, str, str, str | None], AbstractContextManager[Path]]
ROLES = ("candidate", "champion")
BESIDE = "beside"  # folder in the run of a version: what the gate saw of it and of the champion
_log = logging.getLogger(__name__)
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
    gate: str = ""
    """What the gate said where it was overruled."""

    @property
    def why(self) -> str:
        """For people: the reason, and what was overruled by it."""
        return f"{self.reason}; the gate said: {self.gate}" if self.gate else self.reason


@contextmanager
def trained_here(root: Path, subject_id: str, fingerprint: str, md5: str | None) -> Iterator[Path]:
    """Yield the project, in which a training and the photos that it saw have to lie.

    Args:
        root: of the project.
        subject_id: of the subject.
        fingerprint: of the training.
        md5: of its export in dvc.lock; None where DVC does not know it.

    Raises:
        RegistryError: models/<id> is another training, or is not whole.
    """
    if not is_trained_in(root, subject_id, fingerprint):
        raise RegistryError(
            f"{root / 'models' / subject_id} and build/{subject_id}/instance beside it are not those of the training "
            f"{fingerprint[:12]}; with its dvc.lock: dvc pull train@{subject_id} validate@{subject_id}; or train it "
            f"again: dreambooth run {subject_id}"
        )
    yield root


def is_trained_in(root: Path, subject_id: str, fingerprint: str) -> bool:
    """Tell whether models/<id> is the training with this fingerprint, with the photos that it saw beside it."""
    try:
        photos = sha256_of(read_manifest(_prepared(root, subject_id))["files"])
        manifest = read_manifest(root / "models" / subject_id)
    except TornFolderError:
        return False
    return bool(manifest.get("fingerprint") == fingerprint and manifest["inputs"]["instance"] == photos)


def promote(
    root: Path,
    params: Params,
    subject_id: str,
    version: int | None = None,
    force: str | None = None,
    rescore: Rescore | None = None,
    trained: Trained = trained_here,
    say: Callable[[str], object] = _log.warning,
) -> Promotion:
    """Make a version the champion if the gate finds it better; write the verdict down, whatever it is.

    Args:
        root: of the project.
        params: all of them: the margins of the gate, and whether the subject is a person.
        subject_id: of the subject.
        version: else the challenger.
        force: why the gate is overruled; what it says all the same is recorded beside. Files that are not whole, and
            a missing consent, it does not overrule.
        rescore: evaluates challenger and champion in one run where they were evaluated differently, see
            `stages.evaluate.beside_champion`; None keeps the champion then.
        trained: yields a folder like `root` in which the challenger's training lies, to be scored again there.
        say: hears of another process that is waited for.

    Raises:
        GateError: the gate keeps the champion, or cannot tell; the message says why.
        ConsentError: a person without a consent that holds.
        RegistryError: no such version, files that are not whole, two versions that were evaluated differently and
            cannot be scored again, which is no verdict and is not recorded; or another process promoted meanwhile.
    """
    _require_reason(force)
    with explained(root, f"promote {subject_id}", REMEDY), alone(root, check_id(subject_id), say):
        client = client_of(root)
        champion = aliases.settle(client, subject_id, CHAMPION)
        candidate = _candidate(root, client, subject_id, version)
        number = int(candidate.version)
        if number == champion:
            return Promotion(subject_id, number, number, "unchanged", "it is the champion already")
        _require_consent_of(params, root, candidate)
        _require_files(root, client, candidate)
        if champion is not None and force is None:
            _require_champion(root, client, subject_id, champion)
        gate = _overruled(root, client, params, candidate, champion) if force else ""
        judged = None if force else _judge(root, client, params, candidate, champion, rescore, trained)
        verdict, reason = judged or ("forced", str(force))
        for tag, value in ((VERDICT_TAG, verdict), (REASON_TAG, reason), (GATE_TAG, gate)):
            client.set_model_version_tag(subject_id, str(number), tag, value[: aliases.MAX_TEXT])
        if verdict not in ("promote", "forced"):
            aliases.append(client, subject_id, "refuse", CHAMPION, champion, number, verdict, reason)
            raise GateError(
                f"version {number} of {subject_id} does not become the champion: {reason}; "
                f'to overrule the gate: dreambooth promote {subject_id} --version {number} --force "WHY"'
            )
        aliases.move(client, subject_id, "promote", CHAMPION, champion, number, verdict, reason, gate)
    return Promotion(subject_id, number, champion, verdict, reason, gate)


def rollback(
    root: Path,
    params: Params,
    subject_id: str,
    force: str | None = None,
    say: Callable[[str], object] = _log.warning,
) -> Promotion:
    """Make the champion before this one the champion again; those whose files are not whole are passed over.

    Args:
        root: of the project.
        params: of the project, to ask for the consent of a person.
        subject_id: of the subject.
        force: why a champion is left whose files are gone, instead of getting them back.
        say: hears of another process that is waited for.

    Raises:
        RegistryError: no previous champion, none that is whole, or the champion's files are gone.
    """
    _require_reason(force)
    with explained(root, f"roll {subject_id} back", REMEDY), alone(root, check_id(subject_id), say):
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


def beside_champion(root: Path, params: Params, subject_id: str, version: int, champion: int) -> Beside:
    """Compare a version with the champion from their registered evaluations, for a person's decision; nothing is drawn.

    Raises:
        EvaluationError: one of them was registered without an evaluation.
        RegistryError: the store cannot be reached, or one of them is gone.
    """
    with (
        explained(root, f"compare version {version} of {subject_id} with the champion", "try again when it answers"),
        work_folder(root, "scores", subject_id) as folder,
    ):
        client = client_of(root)
        sides: list[Side] = []
        for number, role in zip((version, champion), ROLES, strict=True):
            found = find_version(client, subject_id, number, None)
            if found is None:
                raise RegistryError(f"version {number} of {subject_id} is gone; dreambooth versions {subject_id}")
            sides.append(_side(client, found, role, Path(folder)))
        photos = _photos_of(root, subject_id, sides[0])
        return lay_beside(sides[0], sides[1], photos, params.gate, params.evaluate.confidence)


def consent_of(version: "ModelVersion") -> Consent | None:
    """Return the consent that stands in the tags of a version."""
    text = version.tags.get(CONSENT_TAG)
    return Consent.model_validate(json.loads(text)) if text else None


def _require_reason(force: str | None) -> None:
    if force is not None and not force.strip():
        raise RegistryError('--force needs a reason, which is recorded: --force "WHY"')


def _candidate(root: Path, client: "MlflowClient", name: str, version: int | None) -> "ModelVersion":
    found = find_version(client, name, version, None if version else CHALLENGER)
    if found is None:
        which = f"version {version}" if version else CHALLENGER
        raise RegistryError(f"{name} has no {which} to promote; {next_step(root, name)}")
    return found


def _require_consent_of(params: Params, root: Path, version: "ModelVersion") -> None:
    """Ask for the consent beside the photos, which is the newest word; where there is none, for that in the tags.

    A version that was made with a consent shows a person, whatever params.yaml calls the subject by now.
    """
    name, recorded = version.name, consent_of(version)
    photos = root / "data" / "subjects" / name
    if recorded is None or photos.is_dir():
        require_consent(params, name, root)
    if recorded is not None:
        require_lasting(read_consent(photos / RECORD) or recorded, name)


def _require_files(root: Path, client: "MlflowClient", version: "ModelVersion") -> None:
    if faults := check_files(root, client, version):
        raise RegistryError(
            f"version {version.version} of {version.name} cannot be served: {'; '.join(faults)}; its files come back "
            f"when the same export is registered again: dreambooth register {version.name}"
        )


def _require_champion(root: Path, client: "MlflowClient", name: str, champion: int) -> None:
    """Refuse to go on from a champion that was deleted, or whose files are gone: who asks should know, and say so."""
    found = find_version(client, name, champion, None)
    if found is None:
        raise RegistryError(
            f"the champion, version {champion} of {name}, was deleted: nothing can be held against it; to go on "
            'without it, say why: --force "WHY"'
        )
    if faults := check_files(root, client, found):
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
    trained: Trained,
) -> tuple[str, str]:
    """Return verdict and reason of the gate; what cannot be compared keeps the champion.

    What a champion was compared by is kept in the run of the candidate, for people.
    """
    found = find_version(client, candidate.name, champion, None) if champion else None
    with work_folder(root, "scores", candidate.name) as target:
        try:
            ours = _side(client, candidate, ROLES[0], Path(target))
            theirs = _side(client, found, ROLES[1], Path(target)) if found else replace(ours, model="base")
            cards = [read_scorecard(side.folder, side.model) for side in (ours, theirs)]
            photos = _photos_of(root, candidate.name, ours) if found else []
            if found and rescore and cards[0].how != cards[1].how:
                differs = differing(cards[0].how, cards[1].how)
                with _training_of(root, candidate, found, trained, differs) as project:
                    ours, theirs = _scored_again(root, client, params, (ours, theirs), found, rescore, project)
                    photos = _photos_of(project, candidate.name, ours)
                cards = [read_scorecard(side.folder, side.model) for side in (ours, theirs)]
            decision = decide(cards[0], cards[1], params.gate, params.evaluate.confidence)
        except EvaluationError as error:
            return "keep", f"keep: {error}"
        if found:
            page = lay_beside(ours, theirs, photos, params.gate, params.evaluate.confidence).page
            client.log_text(candidate.run_id, page, f"{BESIDE}/version-{candidate.version}-and-{found.version}.html")
    return decision.verdict, decision.line


def _overruled(
    root: Path, client: "MlflowClient", params: Params, candidate: "ModelVersion", champion: int | None
) -> str:
    """Return what the gate says of the scores that were registered, for whoever asks later what was overruled.

    Nothing is drawn for it, and no failure stops whoever has a reason not to wait for the gate.
    """
    if champion is not None and find_version(client, candidate.name, champion, None) is None:
        return f"not judged: the champion, version {champion}, is gone"
    try:
        return _judge(root, client, params, candidate, champion, None, trained_here)[1]
    except Exception as error:  # whatever it is: the promotion goes on, and the log says why nothing was said
        return f"not judged: {explain(error)}"


@contextmanager
def _training_of(
    root: Path, candidate: "ModelVersion", champion: "ModelVersion", trained: Trained, differs: str
) -> Iterator[Path]:
    """Yield a folder with the training of a version; that there is none is said, and is no verdict of the gate."""
    name, tags = candidate.name, candidate.tags
    with ExitStack() as stack:
        try:
            place = stack.enter_context(trained(root, name, tags.get(FINGERPRINT_TAG, ""), tags.get(MD5_TAG)))
        except DreamboothError as error:
            raise RegistryError(
                f"version {candidate.version} of {name} was not judged: it and the champion, version "
                f"{champion.version}, were evaluated differently ({differs}), and cannot be scored again alike: "
                f"{error}; to promote it without the gate: dreambooth promote {name} --version {candidate.version} "
                '--force "WHY"'
            ) from error
        yield place


def _scored_again(
    root: Path,
    client: "MlflowClient",
    params: Params,
    sides: tuple[Side, Side],
    champion: "ModelVersion",
    rescore: Rescore,
    project: Path,
) -> tuple[Side, Side]:
    """Evaluate challenger and champion in one run, with the evaluator of today; `project` holds the challenger."""
    name, source = champion.name, client.get_model_version_download_uri(champion.name, str(champion.version))
    place = sides[0].folder.with_name("again")
    with downloaded(root, source, name) as folder:
        parts = resolve(folder / "artifacts" / name, root)
        rescore(params, name, project, parts, champion.tags[FINGERPRINT_TAG], place)
    return replace(sides[0], folder=place), replace(sides[1], folder=place, model="champion")


def _prepared(root: Path, subject_id: str) -> Path:
    return root / "build" / subject_id / "instance"


def _photos_of(root: Path, subject_id: str, side: Side) -> list[Image.Image]:
    """Return the photos that a side was scored by; none where others lie, whose numbers mean something else."""
    folder = _prepared(root, subject_id)
    try:
        photos = sha256_of(read_manifest(folder)["files"])
    except TornFolderError:  # they lie where the stages ran
        return []
    if photos != read_scorecard(side.folder, side.model).how.get("photos"):
        return []
    return [photo for _, photo in read_prepared(folder)]


def _side(client: "MlflowClient", version: "ModelVersion", role: str, target: Path) -> Side:
    """Fetch the scores that were registered with a version, and the pictures that lie beside them."""
    key = version.tags.get(EVALUATION_TAG)
    if not key:
        raise EvaluationError(
            f"version {version.version} of {version.name} was registered without an evaluation; evaluate and register "
            f"its export again: dreambooth run {version.name}"
        )
    place = target / role
    place.mkdir()
    folder = client.download_artifacts(version.run_id, f"evaluation/{key}", str(place))
    return Side(f"{role}, version {version.version}", Path(folder))

"""Promote, roll back, recover: against a real MLflow database, with real processes that are killed at every step."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from registered import BISCUIT, add_champion, command, write_evaluation, write_export, write_project

from dreambooth import aliases, health, mlflowstore, promotion
from dreambooth.errors import ConsentError, GateError, RegistryError
from dreambooth.folders import new_folder, read_manifest, sha256_of
from dreambooth.params import Params, load_params
from dreambooth.promotion import beside_champion, promote, rollback
from dreambooth.registry import register
from dreambooth.versions import CHAMPION, CONSENT_TAG, aliases_of, find_version, rows
from flows import promote as flow

# Version 1 is as good as version 3; version 2 is better than both.
IDENTITIES = {1: 0.5, 2: 0.6, 3: 0.5}
BY_HAND = ({"action": "bless"}, {"to": "the last"}, {"from": "?"})  # what makes an entry of the log none


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A project with three versions that nobody has promoted."""
    from mlflow.tracking import MlflowClient

    root = tmp_path_factory.mktemp("shop") / "project"
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{database}")
    write_project(root, database)
    for number, identity in IDENTITIES.items():
        write_export(root, tiny_model_folder, str(number) * 64)
        write_evaluation(root, str(number) * 64, identity)
        assert register(root, BISCUIT).version == number
    return root


@pytest.fixture
def root(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The shop; afterwards its files, aliases, log and verdicts are as they were at first."""
    client = mlflowstore.connect(shop)[0]
    shutil.copytree(shop / "mlartifacts", shop / "kept")
    yield shop
    shutil.rmtree(shop / "mlartifacts")
    (shop / "kept").rename(shop / "mlartifacts")
    aliases.append(client, BISCUIT, "refuse", CHAMPION, None, 1)
    client.delete_registered_model(aliases.log_name(BISCUIT))
    for alias in aliases_of(client, BISCUIT):
        client.delete_registered_model_alias(BISCUIT, alias)
    for number in IDENTITIES:
        for tag in ("dreambooth.verdict", "dreambooth.reason", "dreambooth.gate"):
            client.delete_model_version_tag(BISCUIT, str(number), tag)


@pytest.fixture
def params(root: Path) -> Params:
    return load_params(root / "params.yaml")


def champion(root: Path) -> int | None:
    return aliases_of(mlflowstore.connect(root)[0], BISCUIT).get(CHAMPION)


def log(root: Path) -> list[aliases.Entry]:
    return [entry for entry in aliases.read_log(mlflowstore.connect(root)[0], BISCUIT) if entry.alias == CHAMPION]


def tags(root: Path, version: int) -> dict[str, str]:
    found: dict[str, str] = mlflowstore.connect(root)[0].get_model_version(BISCUIT, str(version)).tags
    return found


def lose_files(root: Path, version: int) -> Path:
    source = mlflowstore.connect(root)[0].get_model_version_download_uri(BISCUIT, str(version))
    lost = Path(source.removeprefix("file://")) / f"artifacts/{BISCUIT}/unet/diffusion_pytorch_model.safetensors"
    lost.unlink()
    return lost


def test_the_first_champion_must_be_better_than_the_base(root: Path, params: Params) -> None:
    done = promote(root, params, BISCUIT, 1)
    assert (done.champion, done.before, done.verdict) == (1, None, "promote")
    assert "against the base" in done.reason
    assert champion(root) == 1
    assert tags(root, 1)["dreambooth.verdict"] == "promote"
    (entry,) = log(root)
    assert (entry.action, entry.before, entry.after, entry.reason) == ("promote", None, 1, done.reason)
    assert promote(root, params, BISCUIT, 1).verdict == "unchanged"
    assert len(log(root)) == 1


def test_a_better_version_becomes_the_champion_and_one_that_is_no_better_does_not(root: Path, params: Params) -> None:
    promote(root, params, BISCUIT, 1)
    with pytest.raises(GateError, match=r"version 3 .* does not become the champion: keep: .*identity.*--force"):
        promote(root, params, BISCUIT, 3)
    assert champion(root) == 1
    assert tags(root, 3)["dreambooth.verdict"] == "keep"
    refusal = log(root)[-1]
    assert (refusal.action, refusal.after, refusal.verdict) == ("refuse", 3, "keep")
    assert refusal.reason == tags(root, 3)["dreambooth.reason"]
    assert promote(root, params, BISCUIT, 2).champion == champion(root) == 2


def test_versions_that_somebody_made_in_the_log_by_hand_count_for_nothing_and_are_named(
    root: Path, params: Params
) -> None:
    promote(root, params, BISCUIT, 1)
    client, whole = mlflowstore.connect(root)[0], {"action": "promote", "alias": CHAMPION, "from": "1", "to": "2"}
    made = []
    for wrong in ({}, {"action": "promote"}, *(whole | change for change in BY_HAND)):
        told = {f"dreambooth.{key}": value for key, value in wrong.items()}
        entry = client.create_model_version(aliases.log_name(BISCUIT), f"models:/{BISCUIT}/2", tags=told)
        made.append(int(entry.version))
    assert aliases.foreign(client, BISCUIT) == made
    assert [entry.after for entry in aliases.recover(root, BISCUIT) if entry.alias == CHAMPION] == [1]
    assert promote(root, params, BISCUIT, 2).champion == champion(root) == 2
    assert rollback(root, params, BISCUIT).champion == 1
    (fact,) = [fact for fact in health.examine(root, [BISCUIT]) if fact.what == f"log of {BISCUIT}"]
    assert fact.state == "warning"
    assert fact.found == f"no entries, and passed over: version {', '.join(map(str, made))}"


def test_the_challenger_is_promoted_where_no_version_is_named(root: Path, params: Params) -> None:
    aliases.settle(mlflowstore.connect(root)[0], BISCUIT, "challenger")
    aliases.move(mlflowstore.connect(root)[0], BISCUIT, "register", "challenger", None, 2)
    assert promote(root, params, BISCUIT).champion == 2


def test_force_needs_a_reason_and_records_it(root: Path, params: Params) -> None:
    promote(root, params, BISCUIT, 2)
    with pytest.raises(RegistryError, match="needs a reason"):
        promote(root, params, BISCUIT, 3, force=" ")
    promote(root, params, BISCUIT, 3, force="the customer wants it")
    assert champion(root) == 3
    assert (log(root)[-1].verdict, log(root)[-1].reason) == ("forced", "the customer wants it")
    assert tags(root, 3)["dreambooth.reason"] == "the customer wants it"


def test_who_overrules_the_gate_leaves_what_it_said_in_tags_and_log(root: Path, params: Params) -> None:
    promote(root, params, BISCUIT, 2)
    assert log(root)[-1].gate == tags(root, 2)["dreambooth.gate"] == ""  # nothing was overruled
    done = promote(root, params, BISCUIT, 3, force="the customer wants it")
    assert done.gate.startswith("keep: identity -0.100")
    assert log(root)[-1].gate == tags(root, 3)["dreambooth.gate"] == done.gate
    line = f"the customer wants it; the gate said: {done.gate}"
    assert done.why == line
    shown = command(root, "versions", BISCUIT, "--log").stdout
    assert line in " ".join(shown.split())
    page = "beside/version-3-and-2.html"  # of both, as the gate saw them
    run = mlflowstore.connect(root)[0].get_model_version(BISCUIT, "3").run_id
    assert page in {entry.path for entry in mlflowstore.connect(root)[0].list_artifacts(run, "beside")}


def test_a_gate_that_cannot_judge_stops_nobody_who_overrules_it_and_the_log_says_why(
    root: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("no scores")

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "read_scorecard", broken)
        assert promote(root, params, BISCUIT, 1, force="an outage").champion == 1
    assert log(root)[-1].gate == "not judged: no scores"
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "find_version", lambda *which: None if which[2] == 1 else find_version(*which))
        assert promote(root, params, BISCUIT, 2, force="version 1 was deleted").champion == 2
    assert log(root)[-1].gate == "not judged: the champion, version 1, is gone"


def test_promote_promote_rollback_rollback(root: Path, params: Params) -> None:
    promote(root, params, BISCUIT, 1)
    promote(root, params, BISCUIT, 2)
    assert rollback(root, params, BISCUIT).champion == champion(root) == 1
    with pytest.raises(RegistryError, match="has no champion before version 1; promote another"):
        rollback(root, params, BISCUIT)
    assert champion(root) == 1
    assert [(entry.action, entry.before, entry.after) for entry in log(root)] == [
        ("promote", None, 1), ("promote", 1, 2), ("rollback", 2, 1),
    ]  # fmt: skip
    promote(root, params, BISCUIT, 2)
    assert aliases.history(log(root), CHAMPION) == [1, 2]


@pytest.mark.fault(34)
def test_what_was_never_promoted_cannot_be_rolled_back(root: Path, params: Params) -> None:
    with pytest.raises(RegistryError, match="has no champion before any"):
        rollback(root, params, BISCUIT)


@pytest.mark.fault(31)
def test_with_the_files_of_the_champion_gone_promote_and_rollback_refuse_and_doctor_names_it(
    root: Path, params: Params
) -> None:
    promote(root, params, BISCUIT, 1)
    promote(root, params, BISCUIT, 3, force="to have two")
    lose_files(root, 3)
    for refused in (lambda: promote(root, params, BISCUIT, 2), lambda: rollback(root, params, BISCUIT)):
        with pytest.raises(RegistryError, match=r"the champion, version 3 of biscuit, is not whole: .*unet/.*missing"):
            refused()
    assert champion(root) == 3
    seen = command(root, "doctor")
    assert seen.returncode == 1
    (line,) = [line for line in seen.stdout.splitlines() if "@champion" in line]
    assert line.startswith("broken")
    assert "biscuit version 3" in line
    assert rollback(root, params, BISCUIT, force="the files are lost").champion == champion(root) == 1


@pytest.mark.fault(31)
@pytest.mark.parametrize("remedy", ["promote", "rollback"])
def test_a_champion_that_somebody_deleted_is_named_and_either_remedy_of_doctor_works(
    root: Path, params: Params, tiny_model_folder: Path, remedy: str
) -> None:
    client = mlflowstore.connect(root)[0]

    def seen() -> list[tuple[str, ...]]:
        return [astuple(one) for one in health.examine(root, [BISCUIT]) if one.state != "good"]

    try:
        write_export(root, tiny_model_folder, "4" * 64)
        write_evaluation(root, "4" * 64, 0.7)
        promote(root, params, BISCUIT, 1)
        number = register(root, BISCUIT).version
        promote(root, params, BISCUIT)
        client.delete_model_version(BISCUIT, str(number))
        champion_gone, challenger_gone = sorted(seen())
        assert champion_gone[:3] == ("broken", "biscuit @champion", f"version {number} was deleted")
        assert champion_gone[3] == (
            'promote another one: dreambooth promote biscuit --version N --force "WHY"; '
            'or go back: dreambooth rollback biscuit --force "WHY"'
        )
        assert challenger_gone[:3] == ("warning", "biscuit @challenger", f"version {number} was deleted")
        for refused in (lambda: promote(root, params, BISCUIT, 2), lambda: rollback(root, params, BISCUIT)):
            with pytest.raises(RegistryError, match=rf"the champion, version {number} of biscuit, was deleted: .*WHY"):
                refused()
        if remedy == "promote":
            assert promote(root, params, BISCUIT, 2, force="it was deleted").champion == champion(root) == 2
        else:
            assert rollback(root, params, BISCUIT, force="it was deleted").champion == champion(root) == 1
        assert seen() == [challenger_gone]
        assert challenger_gone[3].endswith("dreambooth register biscuit")
        again = register(root, BISCUIT)
        assert (again.created, seen()) == (True, [])
    finally:
        for version in [row.version for row in rows(root, BISCUIT) if row.version not in IDENTITIES]:
            client.delete_model_version(BISCUIT, str(version))
        write_export(root, tiny_model_folder, "3" * 64)
        write_evaluation(root, "3" * 64, IDENTITIES[3])


def test_a_version_whose_files_are_gone_is_not_promoted_even_by_force(root: Path, params: Params) -> None:
    lose_files(root, 2)
    with pytest.raises(RegistryError, match="version 2 of biscuit cannot be served"):
        promote(root, params, BISCUIT, 2, force="please")
    assert champion(root) is None


def test_rollback_passes_over_what_cannot_be_served(root: Path, params: Params) -> None:
    for number in (1, 2, 3):
        promote(root, params, BISCUIT, number, force="one after the other")
    lose_files(root, 2)
    done = rollback(root, params, BISCUIT)
    assert done.champion == champion(root) == 1
    assert "version 2 passed over" in done.reason
    with pytest.raises(RegistryError, match="no champion before"):
        rollback(root, params, BISCUIT)


def test_what_the_gate_saw_of_champion_and_candidate_is_kept_beside_the_candidate(
    root: Path, params: Params, tmp_path: Path
) -> None:
    client = mlflowstore.connect(root)[0]

    def pages(version: int) -> list[str]:
        run_id = client.get_model_version(BISCUIT, str(version)).run_id
        return [entry.path for entry in client.list_artifacts(run_id, "beside")]

    promote(root, params, BISCUIT, 1)
    assert pages(1) == []  # the first one has no champion beside it
    promote(root, params, BISCUIT, 2)
    with pytest.raises(GateError):
        promote(root, params, BISCUIT, 3)
    assert pages(2) == ["beside/version-2-and-1.html"]
    assert pages(3) == ["beside/version-3-and-2.html"]
    run_id = client.get_model_version(BISCUIT, "3").run_id
    page = client.download_artifacts(run_id, pages(3)[0], str(tmp_path))
    assert "candidate, version 3, beside the champion, version 2" in Path(page).read_text()


def test_who_decides_sees_the_champion_before_the_promotion_and_nothing_is_changed(root: Path, params: Params) -> None:
    promote(root, params, BISCUIT, 1)
    before = log(root)
    beside = beside_champion(root, params, BISCUIT, 2, 1)
    assert beside.title == "candidate, version 2, beside the champion, version 1"
    assert beside.line.startswith("promote: identity +0.100")
    assert log(root) == before
    shown = flow._beside_champion(root, params, BISCUIT, 2, 1)
    assert shown.startswith("## candidate, version 2, beside the champion, version 1")
    assert " | +0.100 [+0.100, +0.100] |" in shown
    assert flow._beside_champion(root, params, BISCUIT, 9, 1).startswith("The champion is not shown: E_REG")
    with pytest.raises(RegistryError, match="version 9 of biscuit is gone"):
        beside_champion(root, params, BISCUIT, 9, 1)


@pytest.mark.fault(32)
def test_scores_of_two_evaluators_keep_the_champion(root: Path, params: Params, tiny_model_folder: Path) -> None:
    promote(root, params, BISCUIT, 1)
    write_export(root, tiny_model_folder, "2" * 64)
    write_evaluation(root, "2" * 64, 0.9, how={"code": "2", "photos": "p"})
    assert register(root, BISCUIT).version == 2  # the same version, with a newer evaluation
    with pytest.raises(GateError, match=r"not evaluated alike \(code\)"):
        promote(root, params, BISCUIT, 2)
    write_evaluation(root, "2" * 64, 0.6)
    register(root, BISCUIT)
    assert promote(root, params, BISCUIT, 2).champion == 2


@pytest.mark.fault(32)
def test_a_champion_of_another_evaluator_is_scored_again_where_the_challenger_was_trained(
    root: Path, params: Params, tiny_model_folder: Path
) -> None:
    promote(root, params, BISCUIT, 1)
    write_export(root, tiny_model_folder, "2" * 64)
    write_evaluation(root, "2" * 64, 0.9, how={"code": "2", "photos": "p"})
    register(root, BISCUIT)
    asked: list[str] = []

    def rescore(params: Params, name: str, root: Path, parts: Path, fingerprint: str, target: Path) -> None:
        assert (parts / "unet").is_dir()
        asked.append(fingerprint)
        shutil.copytree(root / "build" / name / "evaluation", target)
        add_champion(target, target)

    try:
        known = len(log(root))
        with pytest.raises(RegistryError, match=r"version 2 .* was not judged: .* version 1, .* \(code\).* dvc pull"):
            promote(root, params, BISCUIT, 2, rescore=rescore)  # models/biscuit is not there: nothing to score
        assert len(log(root)) == known
        assert "dreambooth.verdict" not in tags(root, 2)
        seen = write_training(root, "2" * 64)
        with new_folder(seen, {"photos": []}) as folder:
            (folder / "more.txt").touch()
        with pytest.raises(RegistryError, match=r"build/biscuit/instance beside it are not those of the training 2222"):
            promote(root, params, BISCUIT, 2, rescore=rescore)
        write_training(root, "2" * 64)
        with pytest.raises(GateError, match=r"identity \+0\.000"):
            promote(root, params, BISCUIT, 2, rescore=rescore)
        assert asked == ["1" * 64]
    finally:
        shutil.rmtree(root / "models", ignore_errors=True)
        shutil.rmtree(root / "build" / BISCUIT / "instance", ignore_errors=True)
        write_evaluation(root, "2" * 64, 0.6)
        register(root, BISCUIT)


def write_training(root: Path, fingerprint: str) -> Path:
    """Write models/<id> and the photos that it saw; return the folder of these."""
    photos = root / "build" / BISCUIT / "instance"
    with new_folder(photos, {"photos": []}):
        pass
    inputs = {"instance": sha256_of(read_manifest(photos)["files"])}
    with new_folder(root / "models" / BISCUIT, {"fingerprint": fingerprint, "inputs": inputs}):
        pass
    return photos


def test_of_two_moves_from_one_state_the_second_is_told(root: Path, params: Params) -> None:
    promote(root, params, BISCUIT, 1)
    client = mlflowstore.connect(root)[0]
    aliases.move(client, BISCUIT, "promote", CHAMPION, 1, 2)
    with pytest.raises(RegistryError, match="champion of biscuit is version 2 by now, not 1: another process"):
        aliases.move(client, BISCUIT, "promote", CHAMPION, 1, 3)
    assert champion(root) == 2
    assert aliases.history(log(root), CHAMPION) == [1, 2]


def test_an_alias_moved_by_hand_is_taken_over_into_the_log(root: Path, params: Params) -> None:
    promote(root, params, BISCUIT, 1)
    promote(root, params, BISCUIT, 2)
    client = mlflowstore.connect(root)[0]
    client.set_registered_model_alias(BISCUIT, CHAMPION, "3")
    aliases.recover(root, BISCUIT)
    assert champion(root) == 3
    assert (log(root)[-1].action, log(root)[-1].before, log(root)[-1].after) == ("found", 2, 3)
    assert rollback(root, params, BISCUIT).champion == 2


def test_an_alias_that_was_deleted_comes_back_from_the_log(root: Path, params: Params) -> None:
    promote(root, params, BISCUIT, 1)
    mlflowstore.connect(root)[0].delete_registered_model_alias(BISCUIT, CHAMPION)
    aliases.recover(root, BISCUIT)
    assert champion(root) == 1


def test_the_table_says_what_each_version_is(root: Path, params: Params) -> None:
    promote(root, params, BISCUIT, 2)
    lose_files(root, 2)
    by_version = {row.version: row for row in rows(root, BISCUIT)}
    assert by_version[2].aliases == ("champion",)
    assert by_version[2].verdict == "promote"
    assert by_version[2].scores["identity.personalised"] == 0.6
    assert "unet" in "".join(by_version[2].faults or ())
    assert by_version[1].faults is None
    assert {row.version: row.faults for row in rows(root, BISCUIT, deep=True)}[1] == ()
    (row, _) = rows(root, BISCUIT, limit=1)
    assert row.version == 3  # the newest, and the champion although it is older


def test_the_index_of_the_reports_follows_promote_rollback_and_register_and_stops_none_of_them(root: Path) -> None:
    told = {
        "title": BISCUIT,
        "decision": {"line": "promote"},
        "metrics": {"identity": {"base": 0.4, "personalised": 0.5}},
    }
    (root / "reports" / BISCUIT).mkdir(parents=True)
    (root / "reports" / BISCUIT / "report.json").write_text(json.dumps(told))
    index = root / "reports/index.html"
    try:
        for arguments, said in (
            (("promote", BISCUIT, "--version", "1"), "v1 @champion"),
            (("promote", BISCUIT, "--version", "2"), "v2 @champion, v1"),
            (("rollback", BISCUIT), "v1 @champion"),
            (("register", BISCUIT), "v3"),
        ):
            index.unlink(missing_ok=True)
            assert command(root, *arguments).returncode == 0
            assert said in index.read_text()
        index.unlink()
        index.mkdir()  # where no file can be written
        done = command(root, "promote", BISCUIT, "--version", "2")
        assert (done.returncode, champion(root)) == (0, 2)
        assert "warning: reports/index.html stays as it was" in done.stderr
    finally:
        shutil.rmtree(root / "reports")


@pytest.fixture
def person(tmp_path: Path, root: Path) -> Params:
    params = load_params(root / "params.yaml")
    subject = params.subjects[BISCUIT].model_copy(update={"kind": "person"})
    return params.model_copy(update={"subjects": {BISCUIT: subject}})


def write_consent(root: Path, until: date) -> None:
    folder = root / "data" / "subjects" / BISCUIT
    folder.mkdir(parents=True, exist_ok=True)
    given = date.today() - timedelta(days=30)
    (folder / "subject.yaml").write_text(
        f"consent: {{who: file 12, given: {given}, purpose: a poster, until: {until}}}\n"
    )


@pytest.mark.threat(21)
def test_a_person_is_promoted_only_while_the_consent_lasts(root: Path, person: Params) -> None:
    try:
        with pytest.raises(ConsentError, match="is a person without a consent"):
            promote(root, person, BISCUIT, 2, force="please")
        write_consent(root, date.today() - timedelta(days=1))
        with pytest.raises(ConsentError, match=r"holds from .* until .*, today is .*ask for a new one"):
            promote(root, person, BISCUIT, 2)
        assert champion(root) is None
        write_consent(root, date.today())
        assert promote(root, person, BISCUIT, 2).champion == 2
    finally:
        shutil.rmtree(root / "data", ignore_errors=True)


@pytest.mark.threat(21)
def test_an_ended_consent_of_a_version_is_not_passed_by_calling_the_subject_something_else(
    root: Path, params: Params
) -> None:
    assert params.subjects[BISCUIT].kind != "person"
    client, ended = mlflowstore.connect(root)[0], date.today() - timedelta(days=1)
    consent = {"who": "file 12", "given": "2020-01-31", "purpose": "a poster", "until": str(ended)}
    for number in (1, 2):
        promote(root, params, BISCUIT, number)
        client.set_model_version_tag(BISCUIT, str(number), CONSENT_TAG, json.dumps(consent))
    aliases.move(client, BISCUIT, "promote", CHAMPION, 2, 3)
    try:
        write_consent(root, ended)
        for refused in (
            lambda: promote(root, params, BISCUIT, 2),
            lambda: promote(root, params, BISCUIT, 2, force="please"),
            lambda: rollback(root, params, BISCUIT),
        ):
            with pytest.raises(ConsentError, match=f"the consent of biscuit holds from .* until {ended}, today is"):
                refused()
        assert champion(root) == 3
        write_consent(root, date.today())  # a new one, which is the newest word
        assert rollback(root, params, BISCUIT).champion == 2
    finally:
        shutil.rmtree(root / "data", ignore_errors=True)
        for number in (1, 2):
            client.delete_model_version_tag(BISCUIT, str(number), CONSENT_TAG)


# Each program below is one process that imports MLflow once and then forks, so that a child is killed for real and a
# kill costs no start. Nothing is connected before the fork.
FORKS = """
import json, os, signal, sys
from pathlib import Path
from mlflow.tracking import MlflowClient
import dreambooth.gate
from dreambooth import aliases, mlflowstore
from dreambooth.params import load_params
from dreambooth.promotion import promote, rollback
from dreambooth.versions import aliases_of

root = Path(sys.argv[1])
params = load_params(root / "params.yaml")
WRITES = ("create_registered_model", "create_model_version", "set_model_version_tag", "set_registered_model_alias")


def forked(work):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), json.loads(os.read(reader, 65536) or b"null")


def die_at(number):
    calls = 0
    for name in WRITES:
        def counted(self, *args, call=getattr(MlflowClient, name), **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(self, *args, **kwargs)
        setattr(MlflowClient, name, counted)


def state():
    client = mlflowstore.connect(root)[0]
    log = aliases.read_log(client, "biscuit")
    return [aliases_of(client, "biscuit").get("champion"), aliases.history(log, "champion")]


def begin():
    client = mlflowstore.connect(root)[0]
    client.delete_registered_model("biscuit.log")
    aliases.append(client, "biscuit", "promote", "champion", None, 1)
    aliases.append(client, "biscuit", "promote", "champion", 1, 3)
    aliases._follow_log(client, "biscuit", "champion")


def up():
    return promote(root, params, "biscuit", 2).champion


def down():
    return rollback(root, params, "biscuit").champion
"""


@pytest.mark.slow
@pytest.mark.fault(33)
def test_a_promotion_and_a_rollback_that_are_killed_at_any_step_are_finished_or_never_were(root: Path) -> None:
    aliases.append(mlflowstore.connect(root)[0], BISCUIT, "refuse", CHAMPION, None, 1)
    program = (
        FORKS
        + """
found = []
for act, after in ((up, [1, 3, 2]), (down, [1])):
    for step in range(1, 20):
        forked(begin)
        killed, _ = forked(lambda: (die_at(step), act()))
        recovered = forked(lambda: (str(aliases.recover(root, "biscuit")), state()))[1][1]
        if recovered[1] != after:
            forked(act)
        found.append([act.__name__, step, killed, recovered, forked(state)[1], after])
        if not killed:
            break
print(json.dumps(found))
"""
    )
    done = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases: list[Any] = json.loads(done.stdout.splitlines()[-1])
    assert [killed for _, _, killed, *_ in cases].count(False) == 2  # each was let through once, when no step was left
    assert sum(killed for name, _, killed, *_ in cases if name == "up") >= 5
    assert sum(killed for name, _, killed, *_ in cases if name == "down") >= 3
    for name, step, _, recovered, final, after in cases:
        assert recovered in ([3, [1, 3]], [after[-1], after]), f"{name} killed at step {step}: {recovered}"
        assert final == [after[-1], after], f"{name} killed at step {step}, then repeated: {final}"


@pytest.mark.slow
@pytest.mark.fault(33)
def test_promotions_that_race_leave_one_champion_and_a_log_that_agrees(root: Path) -> None:
    """Without the lock of the project, as on two machines: eight processes move the alias at once."""
    aliases.append(mlflowstore.connect(root)[0], BISCUIT, "refuse", CHAMPION, None, 1)
    program = (
        FORKS
        + """
def race(number):
    client = mlflowstore.connect(root)[0]
    aliases_of(client, "biscuit")
    os.read(gate, 1)
    try:
        aliases.move(client, "biscuit", "promote", "champion", 3, 1 + number % 2)
    except Exception as error:
        return "is version" in str(error)
    return "won"

forked(begin)
gate, opener = os.pipe()
pipes, children = [], []
for number in range(8):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, json.dumps(race(number)).encode())
        os._exit(0)
    os.close(writer)
    pipes.append(reader)
    children.append(child)
os.write(opener, b"x" * 8)
for child in children:
    os.waitpid(child, 0)
print(json.dumps([[json.loads(os.read(reader, 4096)) for reader in pipes], forked(state)[1]]))
"""
    )
    done = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results, (points_to, told) = json.loads(done.stdout.splitlines()[-1])
    assert sorted(results, key=str) == [True] * 7 + ["won"]
    assert told[:2] == [1, 3]
    assert len(told) == 3
    assert points_to == told[-1]

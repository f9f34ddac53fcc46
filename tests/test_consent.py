from datetime import date
from pathlib import Path
from typing import Any

import pytest
from registered import command
from tiny_project import make_project, write_params

from dreambooth.card import card
from dreambooth.consent import RECORD as FILE
from dreambooth.consent import read_consent, require_consent
from dreambooth.errors import ConsentError
from dreambooth.export import generation_defaults
from dreambooth.params import parse_params

RECORD = "consent: {who: file 12, given: 2026-01-31, purpose: a poster, until: 2026-12-31}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "subjects" / "biscuit"
    path.mkdir(parents=True)
    return path


def test_a_record_says_who_when_for_what_and_until(folder: Path, params_values: dict[str, Any]) -> None:
    params_values["subjects"]["biscuit"]["kind"] = "person"
    params = parse_params(params_values)
    root = folder.parents[2]
    with pytest.raises(ConsentError, match=r"biscuit is a person without a consent; write .*subject\.yaml: consent:"):
        require_consent(params, "biscuit", root)
    (folder / "subject.yaml").write_text(RECORD)
    found = require_consent(params, "biscuit", root, today=date(2026, 12, 31))
    assert found is not None
    assert found.as_text() == {
        "who": "file 12", "given": "2026-01-31", "purpose": "a poster", "until": "2026-12-31",
    }  # fmt: skip
    for day in (date(2026, 1, 30), date(2027, 1, 1)):
        with pytest.raises(ConsentError, match=f"today is {day}"):
            require_consent(params, "biscuit", root, today=day)


def test_what_is_no_person_needs_none(folder: Path, params_values: dict[str, Any]) -> None:
    assert require_consent(parse_params(params_values), "biscuit", folder.parents[2]) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no consent"),
        ("consent: yes\n", "consent"),
        ("- a\n", "holds no consent"),
        (
            RECORD.replace("2026-12-31", "2027-02-30"),
            r"subject\.yaml cannot be read \(day is out of range.*; write: consent",
        ),
        ("consent: [\n", r"subject\.yaml cannot be read \(line \d, column \d: .*; write: consent"),
        ("consent: {who: me, given: 2026-01-31, purpose: fun}\n", "until: Field required"),
        (RECORD.replace("2026-12-31", "soon"), "until: "),
        (RECORD.replace("until", "till"), "till: "),
    ],
)
def test_a_record_that_leaves_something_open_is_refused(folder: Path, text: str, said: str) -> None:
    (folder / "subject.yaml").write_text(text)
    with pytest.raises(ConsentError, match=said):
        read_consent(folder / FILE)


def test_a_record_that_cannot_be_opened_says_why(folder: Path) -> None:
    (folder / FILE).mkdir()
    with pytest.raises(ConsentError, match=r"subject\.yaml cannot be read \(is no file\); write: consent"):
        read_consent(folder / FILE)


@pytest.mark.threat(21)
def test_the_card_carries_the_consent(folder: Path, params_values: dict[str, Any]) -> None:
    (folder / "subject.yaml").write_text(RECORD)
    metrics = {
        "identity": dict.fromkeys(("personalised", "base", "gain", "low", "high", "ceiling"), 0.5) | {"prompts": 6},
        "confidence": 0.95, "prompts": 6, "encoder": {"name": "e", "revision": "1"}, "photos": 5,
    }  # fmt: skip
    params = parse_params(params_values)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    defaults = generation_defaults(params, "biscuit")
    text = card(folder, "biscuit", params, "b", metrics, defaults, read_consent(folder / FILE), "full", 5)
    assert "Consent: given by file 12 on 2026-01-31, for a poster, until 2026-12-31." in text
    assert "Consent" not in card(folder, "biscuit", params, "b", metrics, defaults, None, "full", 5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["validate", "train"])
@pytest.mark.threat(21)
def test_no_stage_works_on_a_person_whose_consent_has_ended(
    stage: str, tmp_path: Path, tiny_model_folder: Path, params_values: dict[str, Any]
) -> None:
    import subprocess
    import sys

    params_values["subjects"]["biscuit"]["kind"] = "person"
    root = make_project(tmp_path / "project", tiny_model_folder, params_values)
    (root / "data/subjects/biscuit/subject.yaml").write_text(RECORD.replace("2026", "2025"))
    command = [sys.executable, "-m", f"stages.{stage}", "biscuit"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("E_CONSENT: the consent of biscuit holds from 2025-01-31 until 2025-12-31")
    assert not (root / "build").exists()


@pytest.mark.slow
@pytest.mark.threat(21)
def test_a_person_is_added_with_a_consent_alone(
    tmp_path: Path, tiny_model_folder: Path, params_values: dict[str, Any]
) -> None:
    root = make_project(tmp_path / "project", tiny_model_folder, params_values)
    (root / "dvc.yaml").write_text("stages: {}\n")
    write_params(root, params_values)
    record = tmp_path / "signed.yaml"
    record.write_text(RECORD.replace("2026-12-31", "2099-12-31"))
    arguments = ["add", "ada", str(root / "data/subjects/biscuit"), "--class-noun", "dog", "--kind", "person"]
    refused = command(root, *arguments)
    assert (refused.returncode, refused.stderr[:11]) == (3, "E_CONSENT: ")
    assert not (root / "data/subjects/ada").exists()
    assert command(root, *arguments, "--consent", str(record)).returncode == 0
    assert read_consent(root / "data/subjects/ada" / FILE) is not None

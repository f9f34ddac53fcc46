"""The consent of a person whose photos are used: who, when, for what, until; kept beside the photos.

It lies in data/subjects/<id>/subject.yaml, so that it is versioned, moved and forgotten with them, and stands in no
commit.
"""

from datetime import date
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from dreambooth.errors import ConsentError
from dreambooth.folders import read_text
from dreambooth.params import Params, Section, Words
from dreambooth.yaml12 import YamlError, load_yaml

RECORD = "subject.yaml"
PERSON = "person"
_EXAMPLE = "consent: {who: NAME OR REFERENCE, given: 2026-01-31, purpose: WHAT FOR, until: 2027-01-31}"


class Consent(Section):
    """What a person has agreed to."""

    who: Words
    """Who agreed: a name, or a reference to where it is filed."""
    given: Annotated[date, Field(strict=False)]
    """The day it was given."""
    purpose: Words
    """What the pictures may be used for."""
    until: Annotated[date, Field(strict=False)]
    """The last day it holds."""

    def as_text(self) -> dict[str, str]:
        """Return it as JSON holds it."""
        return {name: str(value) for name, value in self.model_dump().items()}


def read_consent(path: Path) -> Consent | None:
    """Read a record; None where there is none.

    Raises:
        ConsentError: it does not say who, when, for what and until when.
    """
    try:
        content: Any = load_yaml(read_text(path))
        return Consent.model_validate(content["consent"])
    except FileNotFoundError:
        return None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConsentError(f"{path}: {faults}; write: {_EXAMPLE}") from None
    except (OSError, YamlError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConsentError(f"{path} cannot be read ({reason}); write: {_EXAMPLE}") from None
    except (KeyError, TypeError):
        raise ConsentError(f"{path} holds no consent; write: {_EXAMPLE}") from None


def require_consent(params: Params, subject_id: str, root: Path, today: date | None = None) -> Consent | None:
    """Return the consent of a person, None for anything else.

    Raises:
        ConsentError: a person without a consent that holds today.
    """
    subject = params.subjects.get(subject_id)
    if subject is None or subject.kind != PERSON:
        return None
    folder = root / "data" / "subjects" / subject_id
    consent = read_consent(folder / RECORD)
    if consent is None:
        raise ConsentError(f"{subject_id} is a person without a consent; write {folder / RECORD}: {_EXAMPLE}")
    require_lasting(consent, subject_id, today)
    return consent


def require_lasting(consent: Consent, subject_id: str, today: date | None = None) -> None:
    """Raise ConsentError when a consent does not hold today."""
    day = today or date.today()
    if not consent.given <= day <= consent.until:
        raise ConsentError(
            f"the consent of {subject_id} holds from {consent.given} until {consent.until}, today is {day}; ask for a "
            f"new one, write it into data/subjects/{subject_id}/{RECORD} and run the subject again, or forget it: "
            f"dreambooth forget {subject_id}"
        )

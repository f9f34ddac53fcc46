"""Run the flow with a registry that only counts, and print what it did as JSON: flow_program.py ROOT SUBJECT..."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from dreambooth import registry
from dreambooth.errors import RegistryError
from dreambooth.folders import content_hash
from dreambooth.versions import RegisteredVersion


def book(root: Path) -> Path:
    return Path(os.environ.get("TOY_REGISTRY", root / "registry.json"))


def register(
    root: Path, subject_id: str, max_logged_bytes: int | None, say: Callable[[str], object], remedy: str | None
) -> RegisteredVersion:
    """Give an export the next number, the same export the same number."""
    if (root / f"fail-register-{subject_id}").exists():
        raise RegistryError("the store is down; dreambooth register later")
    key, place = [subject_id, content_hash(root / "export" / subject_id)], book(root)
    with FileLock(f"{place}.lock"):
        known = json.loads(place.read_text()) if place.exists() else []
        created = key not in known
        known += [key] if created else []
        place.write_text(json.dumps(known))
    return RegisteredVersion(subject_id, known.index(key) + 1, created, key[1])


def find(root: Path, subject_id: str, version: int | None = None, alias: str | None = None) -> RegisteredVersion | None:
    """Return the newest number of a subject."""
    known = json.loads(book(root).read_text()) if book(root).exists() else []
    mine = [number for number, key in enumerate(known, 1) if key[0] == subject_id]
    return RegisteredVersion(subject_id, mine[-1], False, known[mine[-1] - 1][1]) if mine else None


def find_export(root: Path, subject_id: str, tag: str, value: str | None) -> RegisteredVersion | None:
    """Return the number of an export."""
    known = json.loads(book(root).read_text()) if book(root).exists() else []
    key = [subject_id, value]
    return RegisteredVersion(subject_id, known.index(key) + 1, False, str(value)) if key in known else None


if __name__ == "__main__":
    from flows.personalize import run

    registry.register = register
    outcome = asdict(run(sys.argv[2:], Path(sys.argv[1])))
    sys.stdout.write(json.dumps(outcome) + "\n")

"""Take the entry of a subject out of params.yaml, whatever else is wrong with that file."""

import re
from pathlib import Path
from typing import Any

from dreambooth.errors import ParamsError
from dreambooth.yaml12 import YamlError, load_yaml
from flows.project import PARAMS, read_params_text, write_params_text


class UnreadError(Exception):
    """Say why params.yaml tells nothing."""


def plain_params(root: Path) -> dict[str, Any]:
    """Return params.yaml as plain values: whoever forgets a subject need not mend the other parameters before."""
    try:
        content = load_yaml(read_params_text(root))
    except (YamlError, UnicodeDecodeError) as error:
        raise UnreadError(str(error)) from None
    if not isinstance(content, dict) or not isinstance(content.get("subjects"), dict):
        raise UnreadError("it has no map of subjects")
    return content


def forget_entry(root: Path, subject_id: str) -> list[str]:
    """Take the entry of a subject out; return what could not be looked at.

    Raises:
        ParamsError: the entry is written in a way that its lines cannot be taken out.
    """
    try:
        before = plain_params(root)
    except UnreadError as error:
        return [f"{PARAMS}, which cannot be read ({error}): take out by hand what it says of {subject_id}"]
    if subject_id not in before["subjects"]:
        return []
    others = {name: entry for name, entry in before["subjects"].items() if name != subject_id}
    shorter = without_subject(read_params_text(root), subject_id)
    if _values(shorter) != before | {"subjects": others}:
        raise ParamsError([f"{PARAMS}: subjects.{subject_id} cannot be taken out; delete it by hand, then go on"])
    write_params_text(root, shorter)
    return []


def without_subject(text: str, subject_id: str) -> str:
    """Return params.yaml without the lines of a subject, every other byte as it was.

    Only a direct entry of `subjects:` is one: a subject may be called as a field of all others is, kind.
    """
    lines = text.splitlines(keepends=True)
    start = next((number for number, line in enumerate(lines) if re.match(r"subjects\s*:", line)), None)
    if start is None:
        return text
    end = next((number for number in range(start + 1, len(lines)) if _begins_section(lines[number])), len(lines))
    said = max((number for number in range(start, end) if lines[number].strip()), default=start)
    section, blank = lines[start + 1 : said + 1], lines[said + 1 : end]
    depth = next((_width(line) for line in section if _says(line)), 0)  # of the entries, which YAML wants all alike
    kept, inside = [lines[start]], False
    for line in section:
        if _says(line) and _width(line) <= depth:
            inside = re.match(rf"""(["']?){re.escape(subject_id)}\1\s*:""", line.lstrip()) is not None
        if not inside or (line.lstrip().startswith("#") and _width(line) <= depth):
            kept.append(line)
    if not kept[-1].strip():  # what stood before the entry parts the sections now
        blank = []
    return "".join([*lines[:start], *_with_value(kept), *blank, *lines[end:]])


def _begins_section(line: str) -> bool:
    return bool(line.strip()) and line[0] not in " #"


def _width(line: str) -> int:
    return len(line) - len(line.lstrip())


def _says(line: str) -> bool:
    """Tell whether a line has more than space and a comment."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _with_value(section: list[str]) -> list[str]:
    """Say {} where no subject is left: nothing at all would not be a map."""
    if any(_says(line) for line in section[1:]):
        return section
    return [re.sub(r":\s*(#.*)?$", ": {}", section[0].rstrip("\n")) + "\n", *section[1:]]


def _values(text: str) -> Any:
    try:
        return load_yaml(text)
    except YamlError:
        return None

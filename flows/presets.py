"""Write presets of params/, and other values, into params.yaml: DVC, the tests and a reader see what is used."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter

from dreambooth.errors import ParamsError
from dreambooth.params import nearest_path, parse_params
from dreambooth.yaml12 import YamlError, load_yaml
from flows.project import PARAMS, read_params_text, write_params_text

FOLDER = "params"
ON_TOP_OF = "on_top_of"  # in a preset: another one, whose model its values were chosen for
OF_A_MODEL = ("base.pretrained_model_name_or_path", "train.method")  # what rates and memory were chosen for
MAY_SAY = ("base", "evaluate", "export", "photos", "prior", "tracking", "train")  # not who is trained, nor who may pass


@dataclass(frozen=True)
class Change:
    """A parameter that gets another value."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {_in_yaml(self.before)} -> {_in_yaml(self.after)}"  # either can be put into the file


class _WithNull(RoundTripRepresenter):
    """Writes null, where ruamel.yaml would leave nothing."""


_WithNull.add_representer(type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null"))


def names(root: Path) -> list[str]:
    """Return the presets of a project."""
    return sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))


def apply(root: Path, presets: Sequence[str]) -> list[Change]:
    """Merge presets into params.yaml, each on top of the one before; return what changed.

    The file keeps its comments and its order. An invalid result is refused, and the file stays as it was.

    Raises:
        ParamsError: no such preset, one that says what a preset may not, one before the one that it stands on top of,
            or values that do not go together.
    """
    _require_order(root, presets)
    text = read_params_text(root)
    changes: dict[str, Change] = {}
    for preset in presets:
        text, new = merge(text, read(root, preset))
        for change in new:
            first = changes.get(change.name, change).before
            changes[change.name] = Change(change.name, first, change.after)
    parse_params(_plain_values(text))
    real = [change for change in changes.values() if change.before != change.after]
    if real:
        write_params_text(root, text)
    return real


def _require_order(root: Path, presets: Sequence[str]) -> None:
    """Refuse a preset that comes before the one it stands on top of, whose values would take the place of its own."""
    for number, preset in enumerate(presets):
        below = _load(root, preset).get(ON_TOP_OF)
        if below in presets[number + 1 :]:
            raise ParamsError(
                [
                    f"--preset {preset}: stands on top of {below}, which comes after it and would undo it; "
                    f"--preset {below} --preset {preset}"
                ]
            )


def remarks(root: Path, presets: Sequence[str]) -> list[str]:
    """Say which presets were chosen for another model than the one that params.yaml has by now."""
    values = _by_path(_plain_values(read_params_text(root)))
    said = []
    for preset in presets:
        below = _load(root, preset).get(ON_TOP_OF)
        made_for = _by_path(read(root, below)) if below else {}
        other = [name for name in OF_A_MODEL if name in made_for and values.get(name) != made_for[name]]
        if other:
            told = ", ".join(f"{name} is {values.get(name)}, there {made_for[name]}" for name in other)
            said.append(
                f"{FOLDER}/{preset}.yaml stands on top of {below}, and {PARAMS} says another model ({told}): "
                f"its values may not fit; --preset {below} --preset {preset}"
            )
    return said


def read(root: Path, preset: str) -> dict[str, Any]:
    """Read one preset: sections of params.yaml with some of their keys."""
    sections, where = _load(root, preset), f"{FOLDER}/{preset}.yaml"
    if (below := sections.pop(ON_TOP_OF, None)) is not None and below not in names(root):
        raise ParamsError([f"{where}: {ON_TOP_OF}: should be one of {', '.join(names(root))} (got {below!r})"])
    wrong = [name for name, part in sections.items() if name not in MAY_SAY or not isinstance(part, dict)]
    if wrong:
        raise ParamsError([f"{where}: {name}: should be a map in one of {', '.join(MAY_SAY)}" for name in wrong])
    return sections


def _load(root: Path, preset: str) -> dict[str, Any]:
    """Read all that the file of a preset says."""
    path = root / FOLDER / f"{preset}.yaml"
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", preset) or not path.is_file():
        known = ", ".join(names(root)) or f"none; {FOLDER}/ has no .yaml"
        raise ParamsError([f"--preset: there is no {preset!r}; the presets of this project: {known}"])
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except YamlError as error:
        raise ParamsError([f"{FOLDER}/{path.name}: cannot be read: {error}"]) from None
    return dict(values or {})


def write_values(root: Path, values: Mapping[str, Any], source: str) -> list[Change]:
    """Put values of a source into params.yaml, as presets are; return what changed.

    Args:
        root: the project.
        values: by the paths of parameters: {"train.learning_rate": 1e-4}.
        source: of them, in words.

    Raises:
        ParamsError: a parameter that params.yaml does not have, or an invalid result; the file stays as it was.
    """
    text, changes = put(read_params_text(root), values, source)
    parse_params(_plain_values(text))
    if changes:
        write_params_text(root, text)
    return changes


def merge(text: str, preset: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[Change]]:
    """Put the values of a preset, by section and key, into the text of params.yaml: see `put`."""
    return put(text, _by_path(preset), "a preset")


def put(text: str, values: Mapping[str, Any], source: str) -> tuple[str, list[Change]]:
    """Put values into the text of params.yaml, by their paths; everything else in it stays, comments too.

    Raises:
        ParamsError: a path that params.yaml does not have, or a text that is not YAML.
    """
    yaml = YAML()
    yaml.Representer = _WithNull
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.indent(mapping=2, sequence=4, offset=2)  # as params.yaml has its lists, also once DVC has moved them
    _plain_values(text)  # refuses what ruamel.yaml would fail at
    whole = yaml.load(text.replace("\r\n", "\n"))  # it would keep the first of two in comments alone
    places = {path: _section(whole, path) for path in values}
    unknown = {path: place for path, place in places.items() if path.rpartition(".")[2] not in place}
    if unknown:
        raise ParamsError(
            [
                f"{PARAMS}: {path}: unknown, but {source} sets it; {nearest_path(path, place)}"
                for path, place in unknown.items()
            ]
        )
    changes = []
    for path, value in values.items():
        section, key = places[path], path.rpartition(".")[2]
        before = section[key]
        if before != value or isinstance(before, bool) is not isinstance(value, bool):
            changes.append(Change(path, _plain(before), value))
            _put(section, key, value)
    out = io.StringIO()
    yaml.dump(whole, out)
    return out.getvalue().replace("\n", "\r\n" if "\r\n" in text else "\n"), changes


def _by_path(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, part in sections.items() for key, value in part.items()}


def _section(whole: CommentedMap, path: str) -> CommentedMap:
    """Return the map that holds the last part of a path; an empty one where there is none, as of a whole section."""
    *sections, _ = path.split(".")
    part: Any = whole if sections else None
    for name in sections:
        part = part.get(name) if isinstance(part, CommentedMap) else None
    return part if isinstance(part, CommentedMap) else CommentedMap()


def _plain_values(text: str) -> Any:
    try:
        return load_yaml(text)
    except YamlError as error:
        raise ParamsError([f"{PARAMS}: cannot be read: {error}"]) from None


def _put(section: CommentedMap, key: str, value: Any) -> None:
    """Replace a value; the comment in the line of its key stays, those above the items of a list go with the list."""
    comments = section.ca.items.get(key)
    if isinstance(section[key], list) and comments:
        comments[3] = None  # even an empty list here takes the line break from a value on one line
    section[key] = _flow(value)


def _flow(value: Any) -> Any:
    """Keep lists on one line, as the file has them."""
    if not isinstance(value, list):
        return value
    line = CommentedSeq(value)
    line.fa.set_flow_style()
    return line


def _in_yaml(value: Any) -> str:
    """Return a value as params.yaml would say it, on one line."""
    yaml, out = YAML(), io.StringIO()
    yaml.Representer = _WithNull
    yaml.default_flow_style, yaml.width = True, 4096
    yaml.dump([value], out)
    return out.getvalue().strip()[1:-1]  # without the brackets of the list: a scalar alone would get an end mark


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value

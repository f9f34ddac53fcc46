"""Read and write YAML 1.2, the one that DVC writes: 5e-6 is a number, and no is a word.

PyYAML follows YAML 1.1: after `dvc exp run -S` had rewritten params.yaml it would find the text "5e-05" and the truth
value False in it. Plain values only: no tags, no aliases, no key twice, each of which hides what a run will do.
"""

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

MAX_DEPTH = 50


class YamlError(Exception):
    """Refuse a text that is not YAML, or hides what it says; one line with the place."""


class _PlainComposer(Composer):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.parser.check_event(AliasEvent):
            mark = self.parser.peek_event().start_mark
            raise ComposerError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)


def load_yaml(text: str) -> Any:
    """Return the plain values of a YAML 1.2 text.

    Raises:
        YamlError: it is not YAML, or holds a tag, an alias, or the same key twice.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer, yaml.max_depth = _PlainComposer, MAX_DEPTH
    try:
        return yaml.load(text)
    except (YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise YamlError(_in_a_line(error)) from None


def _in_a_line(error: YAMLError | ValueError) -> str:
    """Say what is wrong and where, without the drawing of the place."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    said = " ".join(f"{getattr(error, 'context', None) or ''} {getattr(error, 'problem', None) or ''}".split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {said}"


def dump_yaml(values: Any, flow: bool = False) -> str:
    """Return plain values as a YAML 1.2 text in their own order.

    Args:
        values: maps, lists, texts and numbers.
        flow: in braces, on one line where it fits.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = flow, False  # type: ignore[assignment]
    yaml.allow_unicode, yaml.width = True, 120
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue()

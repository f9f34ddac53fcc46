"""Whatever stands in a name, in a parameter or in a file: an answer, or one mistake in words, never a traceback.

2,000 cases: 1,500 of names and parameters by hypothesis, 500 mutated files (`python -m benchmarks.fuzz` has 10,000).
`CASES=2000 python -m pytest tests/test_properties.py` takes so many of each, and other ones every time.
"""

import copy
import os
import re
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_project import REPOSITORY, make_photo, tiny_values

from benchmarks import fuzz
from dreambooth.errors import DreamboothError, ParamsError, PhotosError, SubjectError, shown
from dreambooth.images import png_bytes
from dreambooth.params import ID_PATTERN, Params, check_id, load_params, parse_params
from dreambooth.photos import check_photos, find_photos, require_usable
from dreambooth.yaml12 import YamlError, load_yaml
from flows.add import new_names

LIMITS = load_params(REPOSITORY / "params.yaml").photos
VALUES = tiny_values()
PHOTO = png_bytes(make_photo(0, 64))
# Whatever Linux takes for a name: any bytes but / and zero, at most 255 of them.
NAMES = st.binary(min_size=1, max_size=80).map(lambda name: os.fsdecode(name.replace(b"/", b"").replace(b"\0", b"")))
TEXTS = st.one_of(
    st.text(max_size=60), st.sampled_from(["../../etc", "-rf", "$(id)", "a;b", "<script>", "=1+1", "\x1b[m"])
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXTS,
    st.binary(max_size=8),
    st.lists(st.integers(), max_size=3),
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
FIELDS = [
    (section, name)
    for section, field in Params.model_fields.items()
    for name in getattr(field.annotation, "model_fields", {})
]


def cases(number: int) -> settings:
    """Return settings for so many cases, the same ones every time; CASES asks for more, and for new ones."""
    more = int(os.environ.get("CASES", "0"))
    return settings(
        max_examples=max(number, more),
        derandomize=not more,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def problems(error: DreamboothError) -> list[str]:
    lines = str(error).splitlines()
    assert lines
    assert all(line.strip() for line in lines)
    return lines


@pytest.mark.fault(10, 11)
@pytest.mark.threat(6, 8)
@cases(400)
@given(TEXTS | st.from_regex(ID_PATTERN))
def test_a_text_is_an_id_or_is_refused(text: str) -> None:
    try:
        found = check_id(text)
    except SubjectError as error:
        refusal = problems(error)
        assert len(refusal) == 1
        return
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", found)
    assert (Path("/data/subjects") / found).resolve().parent == Path("/data/subjects")


@pytest.mark.fault(10)
@pytest.mark.threat(5)
@cases(300)
@given(st.lists(NAMES, min_size=1, max_size=3), st.sampled_from([".png", ".JPG", ".txt", ""]))
def test_a_folder_with_any_names_is_looked_through(names: list[str], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in names:
            if name + suffix not in (".", "..", ""):
                (folder / (name + suffix)).write_bytes(PHOTO)
        reports = check_photos(folder, LIMITS)
        assert len(reports) + len(find_photos(folder).ignored) >= len(list(folder.iterdir())) - len(
            find_photos(folder).captions
        )
        assert all(report.error is None for report in reports)
        assert all(shown(report.file).isprintable() for report in reports)
        stored = new_names(find_photos(folder).photos)
        assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in stored)
        assert len({name.lower() for name in stored}) == len(stored)
        with pytest.raises(PhotosError) as refused:
            require_usable(reports, folder, LIMITS)
        assert len(problems(refused.value)) == 1


@pytest.mark.fault(13)
@pytest.mark.threat(24)
@cases(500)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), SCALARS), min_size=1, max_size=4))
def test_any_value_of_any_parameter_is_taken_or_named(changes: list[tuple[tuple[str, str], Any]]) -> None:
    values = copy.deepcopy(VALUES)
    for (section, name), value in changes:
        values[section][name] = value
    try:
        params = parse_params(values)
    except ParamsError as error:
        told = problems(error)
        assert all(line.startswith("params.yaml: ") and line.isprintable() for line in told)
        return
    assert parse_params(params.model_dump(mode="json")) == params


@pytest.mark.fault(13)
@cases(150)
@given(st.dictionaries(TEXTS | st.sampled_from(list(VALUES)), JSON, max_size=4))
def test_any_map_is_parameters_or_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ParamsError) as refused:
        parse_params(values)
    assert len(problems(refused.value)) == len(refused.value.problems)


@pytest.mark.threat(10)
@cases(150)
@given(st.text(alphabet="ab:-?[]{},&*!|>'\"%@`# \n\t0.~=<\\", max_size=60) | st.text(max_size=40))
def test_any_text_is_yaml_or_is_refused_in_one_line(text: str) -> None:
    try:
        load_yaml(text)
    except YamlError as error:
        told = str(error).splitlines()
        assert len(told) <= 1


@pytest.mark.fault(3, 5)
@pytest.mark.threat(1, 2, 3)
def test_any_mutation_of_a_photo_is_a_picture_or_one_refusal(tmp_path: Path) -> None:
    outcomes: Counter[str] = fuzz.run(500, seed=7, limits=LIMITS, folder=tmp_path)
    assert sum(outcomes.values()) == 500
    assert {"picture", "E_IMG_TRUNCATED", "E_IMG_FORMAT", "E_IMG_PIXELS"} <= set(outcomes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 3e9  # of all tests of this process; the command measures the fuzzing alone

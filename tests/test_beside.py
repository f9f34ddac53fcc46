"""Candidate beside champion: the same prompts and noise, the differences of the gate, nothing invented."""

import dataclasses
import io
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image
from tiny_project import REPOSITORY

from dreambooth.beside import COLUMNS, Beside, Side, choose_prompts, lay_beside, score_rows
from dreambooth.gate import decide, read_scorecard
from dreambooth.params import parse_params
from flows import summary

MARGINS = parse_params(yaml.safe_load((REPOSITORY / "params.yaml").read_text())).gate
BASE, CHAMPION, CANDIDATE, PHOTO = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)
PROMPTS, SEEDS = 8, 2


def write_evaluation(folder: Path, gains: list[float], colour: tuple[int, int, int], code: str = "1") -> Path:
    """Write an evaluation of 8 prompts by 2 seeds: the base at an identity of .4, the model above it by its gains."""
    tables: dict[str, list[pd.DataFrame]] = {"scores": [], "prompts": [], "class_images": []}
    prompts = [f"prompt {i}" for i in range(PROMPTS)]
    for name, shade in (("base", BASE), ("personalised", colour)):
        identity = [0.4 + (gain if name == "personalised" else 0) for gain in gains]
        means = {"kind": "recontextualisation", "prompt": prompts, "identity": identity}
        measured = {"prompt_fidelity": 0.5, "diversity": [0.3 + 0.01 * i for i in range(PROMPTS)], "model": name}
        tables["prompts"].append(pd.DataFrame(means | measured))
        cases = pd.DataFrame(means).loc[[i for i in range(PROMPTS) for _ in range(SEEDS)]]
        cases = cases.assign(noise_seed=range(PROMPTS * SEEDS), nearest_photo=0, copy=False, flat=False, model=name)
        tables["scores"].append(cases)
        tables["class_images"].append(pd.DataFrame({"pres": [0.3, 0.31, 0.32], "flat": False, "model": name}))
        (folder / name).mkdir(parents=True)
        for number in range(0, PROMPTS * SEEDS, SEEDS):  # the first seeds, as they are kept beside a version
            Image.new("RGB", (64, 64), shade).save(folder / name / f"{number:03d}.png")
    for file, parts in tables.items():
        pd.concat(parts).to_csv(folder / f"{file}.csv", index=False)
    models = {name: {"model": name, "is_base": name == "base"} for name in ("base", "personalised")}
    (folder / "evaluation.json").write_text(json.dumps({"how": {"code": code}, "models": models}))
    return folder


GAINS = [0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.11, 0.12]


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Side, Side]:
    """Return a candidate that has won .035 in the mean, and the champion."""
    champion = write_evaluation(tmp_path / "champion", [0.05] * PROMPTS, CHAMPION)
    candidate = write_evaluation(tmp_path / "candidate", GAINS, CANDIDATE)
    return Side("candidate, version 2", candidate), Side("champion, version 1", champion)


def lay(sides: tuple[Side, Side], photos: int = 1) -> Beside:
    return lay_beside(*sides, [Image.new("RGB", (64, 64), PHOTO)] * photos, MARGINS, 0.95)


def count(sheet: bytes, colour: tuple[int, int, int]) -> int:
    """Count the pictures of a colour: each is enlarged to 128 x 128."""
    with Image.open(io.BytesIO(sheet)) as image:
        pixels = sum(number for number, one in image.convert("RGB").getcolors(1 << 24) or () if one == colour)
    assert pixels % 128**2 == 0
    return pixels // 128**2


def test_the_difference_of_each_measure_is_the_one_that_the_gate_bounds(sides: tuple[Side, Side]) -> None:
    beside = lay(sides)
    cards = [read_scorecard(side.folder, side.model) for side in sides]
    decision = decide(cards[0], cards[1], MARGINS, 0.95)
    assert beside.line == decision.line
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in beside.rows}
    identity = rows["identity"]
    assert (identity["base"], identity["champion"], identity["candidate"]) == ("0.400", "0.450", "0.485")
    assert f"identity {identity['candidate - champion']}" in decision.line
    assert rows["prompt fidelity"]["candidate - champion"].startswith("+0.000")
    assert rows["copies of photos"]["candidate - champion"] == "+0 points"


def test_a_second_opinion_on_the_identity_stands_beside_the_first_and_is_no_part_of_the_verdict(
    sides: tuple[Side, Side],
) -> None:
    line = lay(sides).line
    for side, second in zip(sides, (0.1, 0.9), strict=True):  # as much as may be against the candidate
        table = pd.read_csv(side.folder / "prompts.csv")
        table.assign(identity_second=second).to_csv(side.folder / "prompts.csv", index=False)
    beside = lay(sides)
    assert beside.line == line
    row = next(row for row in beside.rows if row[0] == "identity, second opinion (decides nothing)")
    assert list(row[1:]) == ["0.100", "0.900", "0.100", "-0.800 [-0.800, -0.800]"]


def test_over_fewer_than_six_prompts_differences_stand_without_an_interval(sides: tuple[Side, Side]) -> None:
    candidate, champion = (read_scorecard(side.folder, side.model) for side in sides)
    few = [dataclasses.replace(card, prompts=card.prompts[:5]) for card in (champion, champion, candidate)]
    rows = {row[0]: row[-1] for row in score_rows(few, 0.95)}
    assert rows["identity"] == "+0.020"
    assert "[" in rows["PRES (less is better)"]  # over class images
    for side in sides:
        table = pd.read_csv(side.folder / "prompts.csv")
        table[table["prompt"] < "prompt 5"].to_csv(side.folder / "prompts.csv", index=False)
    assert "too few for intervals" in lay(sides).note


def test_a_row_has_the_photo_and_the_three_models_at_the_same_noise(sides: tuple[Side, Side]) -> None:
    sheet = lay(sides).sheet
    assert [count(sheet, colour) for colour in (PHOTO, BASE, CHAMPION, CANDIDATE)] == [6] * 4
    without = lay(sides, photos=0).sheet  # they lie where the stages ran
    assert [count(without, colour) for colour in (PHOTO, BASE, CHAMPION, CANDIDATE)] == [0, 6, 6, 6]


def test_the_prompts_with_the_most_and_with_the_least_gain_are_shown(sides: tuple[Side, Side]) -> None:
    cards = [read_scorecard(side.folder, side.model) for side in sides]
    shown = choose_prompts(cards[0].prompts, cards[1].prompts, True)
    assert list(shown) == ["prompt 7", "prompt 6", "prompt 5", "prompt 2", "prompt 1", "prompt 0"]
    assert shown["prompt 7"] == "prompt 7 (+0.070)"
    property_prompt = cards[0].prompts.assign(kind=["property", *["live"] * 7])
    assert "prompt 0" not in choose_prompts(property_prompt, property_prompt, True)
    few = choose_prompts(cards[0].prompts[:2], cards[1].prompts[:2], True)
    assert list(few) == ["prompt 1", "prompt 0"]


def test_two_evaluators_are_not_subtracted_and_the_page_says_why(tmp_path: Path, sides: tuple[Side, Side]) -> None:
    other = write_evaluation(tmp_path / "other", [0.05] * PROMPTS, CHAMPION, code="2")
    beside = lay((sides[0], Side("champion, version 1", other)))
    assert {row[-1] for row in beside.rows} == {"not comparable"}
    assert "not evaluated alike (code)" in beside.line
    assert "cannot be subtracted" in beside.note
    assert count(beside.sheet, CHAMPION) == 6  # the same words and noise: people may look


def test_other_noise_is_not_shown_beside(sides: tuple[Side, Side]) -> None:
    path = sides[1].folder / "scores.csv"
    table = pd.read_csv(path)
    table.assign(noise_seed=table["noise_seed"] + 1000).to_csv(path, index=False)
    sheet = lay(sides).sheet
    assert (count(sheet, CHAMPION), count(sheet, CANDIDATE)) == (0, 6)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"no picture")])
def test_pictures_that_nobody_kept_are_grey_and_without_any_there_is_no_sheet(sides: tuple[Side, Side], damage) -> None:  # type: ignore[no-untyped-def]
    for path in (sides[1].folder / "personalised").glob("*.png"):
        damage(path)
    sheet = lay(sides).sheet
    assert (count(sheet, CHAMPION), count(sheet, CANDIDATE)) == (0, 6)
    for path in (sides[0].folder / "personalised").glob("*.png"):
        damage(path)
    beside = lay(sides)
    assert beside.sheet == b""
    assert "No pictures of the two were kept" in beside.note
    assert "<img" not in beside.page


def test_the_page_holds_all_and_escapes_names(sides: tuple[Side, Side]) -> None:
    beside = lay((Side("<script>", sides[0].folder), sides[1]))
    assert "<script" not in beside.page
    assert "data:image/png;base64," in beside.page
    assert "Content-Security-Policy" in beside.page


def test_prefect_gets_the_same_as_markdown(sides: tuple[Side, Side]) -> None:
    beside = lay(sides)
    text = summary.markdown_beside(beside)
    head, line, table, note, sheet = text.split("\n\n")
    assert head == "## candidate, version 2, beside the champion, version 1"
    assert line == f"The gate: {beside.line}"
    assert len(table.splitlines()) == 2 + len(beside.rows)
    assert {row.count("|") for row in table.splitlines()} == {len(COLUMNS) + 1}
    assert note == beside.note
    assert sheet.startswith("![candidate, version 2, beside the champion, version 1](data:image/png;base64,")

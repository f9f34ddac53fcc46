"""Lay a candidate beside the champion for whoever decides: pictures of the same prompts and noise, scores, differences.

Nothing is drawn here. Pictures that nobody has kept are missing, and what cannot be compared says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from dreambooth import evaluation
from dreambooth.errors import EvaluationError
from dreambooth.evaluation import BASE
from dreambooth.gate import Scorecard, decide, numbers, read_scorecard
from dreambooth.grid import STRIP_TILE, grid
from dreambooth.images import png_bytes
from dreambooth.pages import data_uri, render
from dreambooth.params import MIN_PROMPTS, Gate

MOST, LEAST = 3, 3  # prompts that are shown: those with the most and the least identity against the champion
COLUMNS = ("measure", "base", "champion", "candidate", "candidate - champion")
NOT_COMPARABLE, MISSING = "not comparable", "not measured"
_KEY = ["kind", "prompt", "noise_seed"]  # what makes two pictures comparable: the words without identifier, the noise


@dataclass(frozen=True)
class Side:
    """One of the two."""

    name: str
    """For people: champion, version 3."""
    folder: Path
    """As the stage evaluate leaves it, or the part of it that was registered."""
    model: str = "personalised"
    """Its name in there."""


@dataclass(frozen=True)
class Beside:
    """What is shown of a candidate and the champion."""

    title: str
    line: str
    """Of the gate: its verdict with the reason."""
    rows: Sequence[Sequence[str]]
    """Cells under COLUMNS."""
    note: str
    sheet: bytes
    """A PNG; empty where neither has kept a picture."""

    @property
    def page(self) -> str:
        """One HTML file with all of it."""
        uri = data_uri(self.sheet, "png") if self.sheet else ""
        return render("beside.html", beside=self, columns=COLUMNS, sheet=uri)


def lay_beside(
    candidate: Side, champion: Side, photos: Sequence[Image.Image], margins: Gate, confidence: float
) -> Beside:
    """Compare two evaluations for people.

    Args:
        candidate: whose folder has the base as well.
        champion: evaluated in the same run, or in one of its own.
        photos: of the subject; none leaves their column out.
        margins: section gate of params.yaml.
        confidence: of the intervals.

    Raises:
        EvaluationError: a folder holds no scores.
    """
    sides = (Side(BASE, candidate.folder, BASE), champion, candidate)
    cards = [read_scorecard(side.folder, side.model) for side in sides]
    decision = decide(cards[2], cards[1], margins, confidence)
    are_alike = cards[1].how == cards[2].how
    shown = choose_prompts(cards[2].prompts, cards[1].prompts, are_alike)
    sheet = picture_sheet(sides, shown, photos)
    return Beside(
        title=f"{candidate.name}, beside the {champion.name}",
        line=decision.line,
        rows=score_rows(cards, confidence),
        note=_note(cards[2], are_alike, confidence, len(shown), bool(sheet)),
        sheet=sheet,
    )


def score_rows(cards: Sequence[Scorecard], confidence: float) -> list[list[str]]:
    """Return a row a measure: base, champion, candidate, and the paired difference of the last two with its interval.

    Args:
        cards: of base, champion, candidate.
        confidence: of the intervals.
    """
    _, champion, candidate = cards
    found: Mapping[str, Any] = {}
    if are_alike := champion.how == candidate.how:
        try:
            found = evaluation.compare(candidate, champion, confidence)
        except EvaluationError:
            are_alike = False
    has_interval = _has_interval(candidate)
    rows = [
        [
            label,
            *(_number(value) for value in values),
            _difference(found.get(name), are_alike, has_interval or name == "pres_rise"),
        ]
        for name, (label, values) in _means(cards).items()
    ]
    rates = [card.copy_rate for card in cards]
    change = f"{100 * (rates[2] - rates[1]):+.0f} points" if are_alike else NOT_COMPARABLE
    return [*rows, ["copies of photos", *(f"{rate:.0%}" for rate in rates), change]]


def _means(cards: Sequence[Scorecard]) -> dict[str, tuple[str, list[float]]]:
    """Return the label of each measure of `evaluation.compare`, with its mean by each model."""
    identity = {"identity": ("identity", [evaluation.mean_counted(card.prompts) for card in cards])}
    if all(map(evaluation.has_second_opinion, cards)):
        seconds = [evaluation.mean_counted(card.prompts, "identity_second") for card in cards]
        identity["identity_second"] = (evaluation.SECOND_OPINION, seconds)
    return identity | {
        "prompt": ("prompt fidelity", [card.prompts["prompt_fidelity"].mean() for card in cards]),
        "diversity": ("diversity", [card.prompts["diversity"].mean() for card in cards]),
        "pres_rise": ("PRES (less is better)", [pd.Series(card.pres, dtype=float).mean() for card in cards]),
    }


def choose_prompts(candidate: pd.DataFrame, champion: pd.DataFrame, are_alike: bool) -> dict[str, str]:
    """Return some prompts with their labels: those with the most identity won by the candidate, then with the least.

    Only prompts that count. Both extremes are shown, for a mean hides them.

    Args:
        candidate: a row a prompt: kind, prompt, identity, the mean over its seeds.
        champion: the same.
        are_alike: whether the two may be subtracted; the first prompts are returned otherwise.
    """
    counted = evaluation.counted(candidate)
    if not are_alike:
        return {prompt: prompt for prompt in counted["prompt"][: MOST + LEAST]}
    pairs = counted.merge(champion, on=["kind", "prompt"], suffixes=("", "_champion"))
    gains = (pairs["identity"] - pairs["identity_champion"]).set_axis(pairs["prompt"])
    ordered = gains.sort_values(ascending=False, kind="stable")
    shown = ordered if len(ordered) <= MOST + LEAST else pd.concat([ordered[:MOST], ordered[-LEAST:]])
    return {str(prompt): f"{prompt} ({gain:+.3f})" for prompt, gain in shown.items()}


def picture_sheet(sides: Sequence[Side], prompts: Mapping[str, str], photos: Sequence[Image.Image]) -> bytes:
    """Draw a row a prompt: the photo that the candidate's picture is nearest to, then each side at the same noise.

    Args:
        sides: base, champion, candidate.
        prompts: as the base is asked for them, with the labels of their rows.
        photos: of the subject, those that the candidate was scored by.

    Returns:
        A PNG; empty where no picture of champion or candidate was kept.
    """
    tables = [_first_seeds(side) for side in sides]
    rows, captions, found = [], [], 0
    for prompt in prompts:
        asked = tables[-1][tables[-1]["prompt"] == prompt].head(1)
        cells = [_picture(side, table, asked) for side, table in zip(sides, tables, strict=True)]
        found += sum(image is not None for image, _ in cells[1:])
        nearest = int(asked["nearest_photo"].iloc[0]) if len(asked) else 0
        photo = [photos[nearest]] if photos else []
        rows.append([*photo, *(image for image, _ in cells)])
        captions.append([""] * len(photo) + [caption for _, caption in cells])
    if not found:
        return b""
    columns = [*(["photo"] if photos else []), *(side.name for side in sides)]
    return png_bytes(grid(rows, list(prompts.values()), columns, captions, tile=STRIP_TILE))


def _first_seeds(side: Side) -> pd.DataFrame:
    """Return the first case of each prompt, with the number of its picture; empty where the cases were not kept."""
    columns = [*_KEY, "identity", "nearest_photo", "number"]
    table = pd.read_csv(side.folder / "scores.csv")
    table = table[table["model"] == side.model].reset_index(drop=True)
    table["number"] = table.index
    if not set(columns) <= set(table):
        return pd.DataFrame(columns=columns)
    return table.drop_duplicates(["kind", "prompt"])[columns]


def _picture(side: Side, table: pd.DataFrame, asked: pd.DataFrame) -> tuple[Image.Image | None, str]:
    """Return the picture of a side for the prompt and the noise of a case, with its identity; None if there is none."""
    row = table.merge(asked[_KEY], on=_KEY)
    if row.empty:
        return None, ""
    path = side.folder / side.model / f"{int(row['number'].iloc[0]):03d}.png"
    caption = f"{row['identity'].iloc[0]:.3f}"
    if not path.is_file():
        return None, caption
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB"), caption
    except OSError:  # damaged: a picture for people keeps nobody from a promotion
        return None, caption


def _number(value: float) -> str:
    return MISSING if pd.isna(value) else f"{value:.3f}"


def _has_interval(card: Scorecard) -> bool:
    """Whether an interval over its prompts says anything."""
    return len(evaluation.counted(card.prompts)) >= MIN_PROMPTS


def _difference(interval: Mapping[str, Any] | None, are_alike: bool, has_interval: bool) -> str:
    if not are_alike:
        return NOT_COMPARABLE
    if interval is None:
        return MISSING
    return numbers(interval) if has_interval else f"{interval['mean']:+.3f}"


def _note(candidate: Scorecard, are_alike: bool, confidence: float, shown: int, has_sheet: bool) -> str:
    counted = len(evaluation.counted(candidate.prompts))
    intervals = f"with {confidence:.0%} intervals over prompts" if _has_interval(candidate) else "too few for intervals"
    scores = (
        f"Differences at the same prompts and noise, {intervals}; the identity over the {counted} prompts that count."
        if are_alike
        else "The two were evaluated differently, so that their numbers cannot be subtracted; a promotion scores both "
        "again where the candidate was trained."
    )
    if not has_sheet:
        return f"{scores} No pictures of the two were kept; they are from the next evaluation on: dreambooth run"
    if not are_alike:
        return f"{scores} Shown: the first {shown} prompts, one seed of each with its identity."
    which = (
        f"the {MOST} prompts in which the candidate has won most identity, then the {LEAST} in which it has won least"
    )
    if shown < MOST + LEAST:
        which = "the prompts, from the one in which the candidate has won most identity to the one with least"
    return f"{scores} Shown: {which} (mean over seeds, in brackets); one seed of each, with its own identity."

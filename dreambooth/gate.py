"""Decide from the scores of two models whether one may take the place of the other; what is not shown is refused.

P prompts, M class images; all scores are cosines in [-1, 1].
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import pandas as pd

from dreambooth.errors import EvaluationError
from dreambooth.evaluation import compare, counted, flat_remark
from dreambooth.intervals import in_interval
from dreambooth.params import Gate

POWER = 0.8  # with which the number of prompts that is named decides; in words: four times of five
State = Literal["shown", "open", "refused"]
Verdict = Literal["promote", "keep", "inconclusive"]


@dataclass(frozen=True)
class Scorecard:
    """What one evaluator measured of one model, as far as the gate looks at it."""

    model: str
    """Fingerprint of the training; of the base, the hash of its weights."""
    is_base: bool
    how: Mapping[str, Any]
    """Everything that scores depend on besides the model; only equal ones are compared."""
    prompts: pd.DataFrame
    """A row a prompt: kind, prompt, identity, prompt_fidelity, diversity."""
    pres: list[float]
    """Mean cosine of each class image with the photos."""
    copy_rate: float
    """Share of the images that repeat a photo."""
    flat: int | None
    """How many images, of the class as well, show nothing; None where an older evaluation has not looked."""


_NEEDS = {  # what measures it
    "diversity": ": it needs two evaluate.seeds or more",
    "pres_rise": ": it needs two evaluate.num_class_images or more",
}


@dataclass(frozen=True)
class Check:
    """One condition of the gate."""

    name: str
    state: State
    text: str
    """Value and bound in words."""
    needed: int | None = None
    """How many prompts that count (class images, for the prior) would decide an open one, were its mean the truth."""


@dataclass(frozen=True)
class Decision:
    """What follows from two scorecards."""

    verdict: Verdict
    against: Literal["champion", "base"]
    line: str
    """For people: the verdict with its reason."""
    checks: tuple[Check, ...]


def decide(challenger: Scorecard, other: Scorecard, margins: Gate, confidence: float = 0.95) -> Decision:
    """Decide whether the challenger may take the place of the champion, or become the first one.

    Every bound is one of a t interval over prompt means, or over class images. Better is shown when the lower bound is
    above the minimum gain, not worse when it is above minus the margin; what is not shown keeps the champion.

    Args:
        challenger: the new model.
        other: the champion, or the base model where there is none.
        margins: section gate of params.yaml.
        confidence: of the intervals.
    """
    against: Literal["champion", "base"] = "base" if other.is_base else "champion"
    checks = [*_comparable(challenger, other, margins)]
    if any(check.state != "shown" for check in checks):
        return _decision(against, checks, {})
    try:
        found = compare(challenger, other, confidence)
    except EvaluationError as error:
        return _decision(against, [*checks, Check("identity", "refused", str(error))], {})
    if other.is_base:
        checks += [
            judge("identity", found, 0, confidence),
            _small_drop(found, margins),
            _few_copies(challenger, margins.first_copy_rate),
        ]
    else:
        checks += [_better(found, margins, confidence), *_guards(challenger, found, margins, confidence)]
    return _decision(against, checks, found)


def judge(name: str, found: Mapping[str, Any], bound: float, confidence: float, sign: int = 1) -> Check:
    """Tell whether sign * difference is above `bound`: shown by its interval, open, or not even in the mean.

    Args:
        name: measure in `found`.
        found: intervals by measure, see `evaluation.compare`.
        bound: cosine.
        confidence: of the intervals.
        sign: -1 where less is better.

    Source of the number that would decide: the normal approximation n = ((z.975 + z.80) sd / gain)^2, z.975 at a
    confidence of 95 %.
    """
    interval = found.get(name)
    if interval is None:
        return Check(name, "refused", f"{name} was not measured{_NEEDS.get(name, '')}")
    mean, sd = sign * interval["mean"], interval["sd"]
    low = sign * interval["low" if sign > 0 else "high"]
    wanted = f"{'above' if sign > 0 else 'below'} {sign * bound:+.3f}"
    text = f"{name} {numbers(interval)}, wanted {wanted}"
    if low > bound:
        return Check(name, "shown", text)
    if mean > bound:
        z = NormalDist().inv_cdf
        errors = z((1 + confidence) / 2) + z(POWER)  # standard errors between the gain and the bound: 2.8 at 95 %
        return Check(name, "open", text, max(math.ceil((errors * sd / (mean - bound)) ** 2), interval["n"] + 1))
    return Check(name, "refused", text)


def numbers(interval: Mapping[str, Any]) -> str:
    """Write an interval of `evaluation.compare`."""
    return in_interval(interval["mean"], interval["low"], interval["high"])


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Name what two evaluations did differently; empty where they did all alike."""
    return ", ".join(key for key in sorted({*one, *other}) if one.get(key) != other.get(key))


def read_scorecard(folder: Path, model: str) -> Scorecard:
    """Read what the evaluation left of one model in build/<id>/evaluation, or a copy of it.

    Args:
        folder: with evaluation.json, prompts.csv, class_images.csv, scores.csv.
        model: base, personalised.

    Raises:
        EvaluationError: the folder is not whole, or knows no such model.
    """
    try:
        about = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("prompts", "class_images", "scores")}
        parts = {name: table[table["model"] == model].reset_index(drop=True) for name, table in tables.items()}
        found = about["models"][model]
        return Scorecard(
            model=found["model"],
            is_base=found["is_base"],
            how=about["how"],
            prompts=parts["prompts"],
            pres=parts["class_images"]["pres"].to_list(),
            copy_rate=float(parts["scores"]["copy"].mean(skipna=False)),  # a blank cell is no picture without a copy
            flat=_count_flat(parts["scores"], parts["class_images"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{folder} holds no scores of {model!r} ({type(error).__name__}: {error}); evaluate again: dreambooth run"
        ) from None


def _count_flat(*tables: pd.DataFrame) -> int | None:
    if not all("flat" in table and table["flat"].notna().all() for table in tables):
        return None
    return sum(int(table["flat"].sum()) for table in tables)


def _comparable(challenger: Scorecard, other: Scorecard, margins: Gate) -> Iterator[Check]:
    """Refuse scores of two evaluators; leave open what is scored by pictures of nothing, or by too few prompts."""
    differs = differing(challenger.how, other.how)
    if differs or not challenger.how:
        what = differs or "nothing is known of either"
        yield Check("evaluator", "refused", f"the two were not evaluated alike ({what}); evaluate both again")
    counts = {"challenger": challenger.flat, "base" if other.is_base else "champion": other.flat}
    known = {name: count for name, count in counts.items() if count is not None}
    if len(known) < len(counts):
        yield Check("pictures", "open", "nobody has looked for black pictures; evaluate again: dreambooth run")
    elif remark := flat_remark(known):
        yield Check("pictures", "open", remark)
    count = len(counted(challenger.prompts))
    if count < margins.min_prompts:
        text = (
            f"{count} of {len(challenger.prompts)} prompts count for the identity (those of a property do not), "
            f"{margins.min_prompts} are needed; raise evaluate.max_prompts"
        )
        yield Check("prompts", "open", text)


def _better(found: Mapping[str, Any], margins: Gate, confidence: float) -> Check:
    """Ask for a better identity and no worse prompt fidelity, or for the mirrored case; report the more hopeful."""
    ways = (
        {"identity": margins.min_gain, "prompt": -margins.prompt_margin},
        {"prompt": margins.prompt_min_gain, "identity": -margins.identity_margin},
    )
    checks = [_both(*(judge(name, found, bound, confidence) for name, bound in way.items())) for way in ways]
    order: tuple[State, ...] = ("shown", "open", "refused")
    return min(checks, key=lambda check: order.index(check.state))  # the first of equals


def _both(*checks: Check) -> Check:
    """Make one condition of several: the worst state counts."""
    order: tuple[State, ...] = ("refused", "open", "shown")
    state = min((check.state for check in checks), key=order.index)
    decisive = [check for check in checks if check.state == state]
    needed = max((check.needed for check in decisive if check.needed is not None), default=None)
    return Check("better", state, "; ".join(check.text for check in decisive), needed)


def _guards(challenger: Scorecard, found: Mapping[str, Any], margins: Gate, confidence: float) -> Iterator[Check]:
    """Ask that nothing else got worse."""
    yield judge("diversity", found, -margins.diversity_margin, confidence)
    yield judge("pres_rise", found, -margins.pres_margin, confidence, sign=-1)
    yield _few_copies(challenger, margins.copy_rate)


def _small_drop(found: Mapping[str, Any], margins: Gate) -> Check:
    """Ask of the first model that its prompt fidelity did not drop much in the mean: it must drop somewhat."""
    interval = found.get("prompt")
    if interval is None:
        return Check("prompt", "refused", "prompt was not measured")
    text = f"prompt {numbers(interval)}, wanted above {-margins.first_prompt_drop:+.3f} in the mean"
    return Check("prompt", "shown" if interval["mean"] > -margins.first_prompt_drop else "refused", text)


def _few_copies(challenger: Scorecard, limit: float) -> Check:
    rate = challenger.copy_rate
    text = f"copies {rate:.0%}, wanted at most {limit:.0%}" if np.isfinite(rate) else "copies were not measured"
    return Check("copying", "shown" if rate <= limit else "refused", text)


def _decision(against: Literal["champion", "base"], checks: list[Check], found: Mapping[str, Any]) -> Decision:
    states = {check.state for check in checks}
    verdict: Verdict = "keep" if "refused" in states else "inconclusive" if "open" in states else "promote"
    if verdict == "promote":
        shown = [f"{name} {numbers(found[name])}" for name in ("identity", "prompt") if name in found]
        return Decision(verdict, against, f"promote: {'; '.join(shown)} against the {against}", tuple(checks))
    decisive = [check for check in checks if check.state == ("refused" if verdict == "keep" else "open")]
    line = f"{verdict}: {'; '.join(check.text for check in decisive)}"
    if verdict == "keep":
        return Decision(verdict, against, line, tuple(checks))
    over_prompts = [check.needed for check in decisive if check.needed and check.name != "pres_rise"]
    images = [check.needed for check in decisive if check.needed and check.name == "pres_rise"]
    needed = max(over_prompts, default=None)
    says = [*([f"{needed} prompts that count"] if needed else []), *([f"{images[0]} class images"] if images else [])]
    if says:
        line += f"; about {' and '.join(says)} would decide four times of five, if the difference is as measured"
    if needed:
        line += ": raise evaluate.max_prompts, or write more prompts into the folder evaluate.prompts"
    return Decision(verdict, against, line, tuple(checks))

"""Show one evaluation to people: one HTML file that holds all of its pictures, with JSON, CSV and curves beside it."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure as Plot

from dreambooth.curves import png_of, tradeoff_curve
from dreambooth.errors import shown
from dreambooth.evaluation import COST, SECOND_OPINION, choose_step, counted, flat_remark
from dreambooth.fidelity import COPY_DISTANCE, widened
from dreambooth.folders import write_file
from dreambooth.gate import Decision
from dreambooth.images import read_prepared
from dreambooth.intervals import in_interval, over_prompts
from dreambooth.pages import Picture, data_uri, file_picture, picture_of, render
from dreambooth.params import MIN_PROMPTS

WORST = 5
NEAREST = 24  # pictures beside their nearest photo
CLASS_IMAGES = 16  # pairs in the prior panel
SMOOTHING = 0.05  # of the steps: span of the mean that is drawn over a loss, which is nearly pure noise
SAFETY = (
    "not checked: nothing in this pipeline looks for unsafe pictures. To have it checked, look at the pictures of this "
    "page, or run a safety checker over the PNG files in build/<subject>/evaluation/personalised"
)
MEASURES = {  # of metrics/<id>.json, with their labels
    "identity": "identity",
    "identity_second": SECOND_OPINION,
    "prompt": "prompt",
    "diversity": "diversity",
}


@dataclass(frozen=True)
class Sources:
    """Where a report reads from."""

    evaluation: Path
    """As the stage evaluate leaves it; a champion in it is shown as one model more."""
    instance: Path
    trained: Path
    licence: str
    """Of the photos, in words."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Manifest of `trained`: how it was trained, and which step of it is shipped."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Section train of params.yaml as the model was trained with it."""
        recipe: Mapping[str, Any] = self.training.get("inputs", {}).get("train", {})
        return recipe


@dataclass(frozen=True)
class Table:
    """A table in the page; the columns in `numbers` are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Report:
    """What the template shows, in its order."""

    title: str
    decision: Decision
    summary: Table
    summary_note: str
    models: Sequence[str]
    photos: Sequence[Picture]
    photo_table: Table
    grid: Sequence[Mapping[str, Any]]
    prompts: Sequence[Mapping[str, Any]]
    nearest: Sequence[Mapping[str, Any]]
    copying: str
    class_prompt: str
    class_images: Sequence[Sequence[Picture]]
    prior: str
    loss: str
    loss_note: str
    tradeoff: str
    tradeoff_note: str
    provenance: Table
    curves: Mapping[str, bytes] = field(default_factory=dict)
    """PNG by name, for files beside the page."""


def write_report(
    target: Path, title: str, sources: Sources, metrics: Mapping[str, Any], decision: Decision, drop: float
) -> None:
    """Fill a folder with index.html, report.json, scores.csv, prompts.csv, loss.png, tradeoff.png and grid.png.

    Args:
        target: an empty folder.
        title: of the page, plain text.
        sources: of everything shown.
        metrics: of metrics/<id>.json.
        decision: of the gate.
        drop: of the prompt fidelity that identity is worth, for the choice of a step.
    """
    report = make_report(title, sources, metrics, decision, drop)
    write_file(target / "index.html", render("report.html", report=report).encode())
    photos = [dict(zip(report.photo_table.columns, row, strict=True)) for row in report.photo_table.rows]
    told = {"title": title, "decision": asdict(decision), "metrics": metrics, "photos": photos}
    write_file(target / "report.json", json.dumps(told, indent=1).encode() + b"\n")
    for name in ("scores.csv", "prompts.csv", "grid.png"):
        if (source := sources.evaluation / name).is_file():  # a picture may be gone, which stops no report
            write_file(target / name, source.read_bytes())
    for name, png in report.curves.items():
        write_file(target / name, png)


def make_report(title: str, sources: Sources, metrics: Mapping[str, Any], decision: Decision, drop: float) -> Report:
    """Read and lay out the eight parts of a report."""
    about = json.loads((sources.evaluation / "evaluation.json").read_text(encoding="utf-8"))
    tables = {name: pd.read_csv(sources.evaluation / f"{name}.csv") for name in ("scores", "prompts", "class_images")}
    models = list(about["models"])
    photos = [picture_of(image, name) for name, image in read_prepared(sources.instance)]
    loss, shipped = loss_curves(*read_losses(sources.trained)), sources.training.get("shipped_step")
    points = read_points(sources.evaluation, metrics, shipped)
    tradeoff = tradeoff_curve(points) if points is not None else b""
    return Report(
        title=title,
        decision=decision,
        summary=summary_table(metrics),
        summary_note=_summary_note(metrics)
        + rehearsal_note(tables["prompts"], models, sources.training.get("class_prompts", ())),
        models=models,
        photos=photos,
        photo_table=photo_table(sources.instance),
        grid=list(grid_rows(sources.evaluation, tables["scores"], models)),
        prompts=prompt_tables(tables["prompts"], models),
        nearest=nearest_pairs(sources.evaluation, tables["scores"], models[-1], photos),
        copying=_copying_note(metrics),
        class_prompt=about["how"]["class_prompt"],
        class_images=class_pairs(sources.evaluation, tables["class_images"], models),
        prior=_prior_note(metrics),
        loss=data_uri(loss, "png"),
        loss_note="Faint: each step, which is nearly pure noise. Strong: the mean of its neighbourhood.",
        tradeoff=data_uri(tradeoff, "png") if tradeoff else "",
        tradeoff_note=_tradeoff_note(points, drop, shipped, sources.recipe, metrics["confidence"]),
        provenance=provenance(about, metrics, sources),
        curves={"loss.png": loss} | ({"tradeoff.png": tradeoff} if tradeoff else {}),
    )


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """Set the base beside the personalised model, a line a measure and what it is over; what is missing says so."""
    rows = []
    for name, label in MEASURES.items():
        found = metrics.get(name)
        told = ["", "", "not measured", ""]
        if found:
            count = found["prompts"]
            told = [*_base_and_model(found), over_prompts(found, count), f"{count} prompts"]
        if found or name != "identity_second":  # only some encoders give one
            rows.append([label, *told])
    copying, prior = metrics["copying"], metrics.get("prior")
    rows.append(["copies", f"{copying['rate_base']:.0%}", f"{copying['rate']:.0%}", "", ""])
    told = ["PRES", "", "", "not measured", ""]
    if prior:
        rise = in_interval(prior["rise"], prior["low"], prior["high"])
        told = ["PRES (less is better)", *_base_and_model(prior), rise, f"{prior['images']} class images"]
    difference = f"difference, {metrics['confidence']:.0%} interval"
    return Table(["measure", "base", "personalised", difference, "over"], [*rows, told], numbers=(1, 2, 3))


def rehearsal_note(prompts: pd.DataFrame, models: Sequence[str], class_prompts: Collection[str]) -> str:
    """Say what the prompt fidelity is over prompts that the class rows of the training had too, and over the others.

    Such a prompt is rehearsed, by the class in place of the subject. Empty where none is, or nothing was measured.
    """
    base, model = _of_each(prompts, models)
    gain = model["prompt_fidelity"] - base["prompt_fidelity"]
    rehearsed = model["prompt"].isin(class_prompts)
    if not rehearsed.any() or gain.isna().any():
        return ""
    told = f" {rehearsed.sum()} of the {len(gain)} prompts were rehearsed by class images (prior.prompts)"
    if rehearsed.all():
        return f"{told}: how others fare was not measured."
    over = [f"{gain[which].mean():+.3f}" for which in (rehearsed, ~rehearsed)]
    return f"{told}: prompt fidelity against the base is {over[0]} over these, {over[1]} over the others."


def grid_rows(evaluation: Path, scores: pd.DataFrame, models: Sequence[str]) -> Iterable[dict[str, Any]]:
    """Yield a row a prompt: for each seed the pictures of all models side by side, the identity under each."""
    parts = {model: scores[scores["model"] == model].reset_index(drop=True) for model in models}
    for prompt, cases in parts[models[0]].groupby("prompt", sort=False):
        pairs = [
            [
                file_picture(evaluation / model / f"{number:03d}.png", model, f"{parts[model]['identity'][number]:.3f}")
                for model in models
            ]
            for number in cases.index
        ]
        yield {"prompt": prompt, "pairs": pairs}


def prompt_tables(prompts: pd.DataFrame, models: Sequence[str]) -> list[dict[str, Any]]:
    """Return the tables by prompt kind, the worst five of those that count for the identity first."""
    base, model = _of_each(prompts, models)
    table = model.assign(gain=model["identity"] - base["identity"])
    if model["prompt_fidelity"].notna().all():
        table = table.assign(prompt_gain=model["prompt_fidelity"] - base["prompt_fidelity"])
    parts = [(f"The worst {WORST} by identity", counted(table).sort_values("identity").head(WORST))]
    parts += [(str(kind), rows) for kind, rows in table.groupby("kind", sort=False)]
    return [{"title": title, "table": prompt_table(rows)} for title, rows in parts]


def prompt_table(rows: pd.DataFrame) -> Table:
    """Lay out prompts with their means over seeds; what was not measured is left blank."""
    names = {
        "identity": "identity",
        "gain": "against base",
        "identity_second": "second opinion",
        "prompt_fidelity": "prompt",
        "prompt_gain": "against base",
        "diversity": "diversity",
        "nearest_cosine": "nearest photo",
        "copies": "copies",
    }
    names = {column: name for column, name in names.items() if column in rows}
    body = [[str(row["prompt"]), *(_cell(row[column], column) for column in names)] for _, row in rows.iterrows()]
    return Table(["prompt", *names.values()], body, numbers=range(1, len(names) + 1))


def nearest_pairs(
    evaluation: Path, scores: pd.DataFrame, model: str, photos: Sequence[Picture]
) -> list[dict[str, Any]]:
    """Return the pictures beside the photos that they are nearest to: copies first, then the most similar."""
    rows = scores[scores["model"] == model].reset_index(drop=True)
    order = rows.sort_values(["copy", "nearest_cosine"], ascending=False, kind="stable").head(NEAREST)
    return [
        {
            "is_copy": bool(row["copy"]),
            "picture": file_picture(
                evaluation / model / f"{number:03d}.png",
                model,
                f"{row['nearest_cosine']:.3f}, {row['nearest_distance']} bits{' copy' if row['copy'] else ''}",
            ),
            "photo": photos[int(row["nearest_photo"])],
        }
        for number, row in order.iterrows()
    ]


def class_pairs(evaluation: Path, class_images: pd.DataFrame, models: Sequence[str]) -> list[list[Picture]]:
    """Return the class images of all models at the same seeds, their PRES under each."""
    parts = {model: class_images[class_images["model"] == model]["pres"].to_list() for model in models}
    return [
        [
            file_picture(evaluation / "class" / model / f"{number:03d}.png", model, f"{parts[model][number]:.3f}")
            for model in models
        ]
        for number in range(min(CLASS_IMAGES, len(parts[models[0]])))
    ]


def read_losses(trained: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the loss of every step, and the losses at fixed noise, empty where they were not measured."""
    fixed = trained / "evaluation_loss.csv"
    return pd.read_csv(trained / "loss.csv"), pd.read_csv(fixed) if fixed.exists() else pd.DataFrame()


def loss_curves(history: pd.DataFrame, fixed: pd.DataFrame) -> bytes:
    """Plot photos and class images apart: each step faintly, its neighbourhood, and the loss at fixed noise: a PNG."""
    titles = {"loss_instance": "loss of the photos", "loss_prior": "loss of the class images"}
    shown = [name for name in titles if history[name].notna().any()]
    plot = Plot(figsize=(4.6 * max(len(shown), 1), 3), layout="constrained")
    for number, name in enumerate(shown):
        axes = plot.add_subplot(1, len(shown), number + 1)
        known = history[["step", name]].dropna()
        span = max(int(SMOOTHING * len(history)), 1)
        axes.plot(known["step"], known[name], color="#c9d3e3", linewidth=0.8)
        axes.plot(known["step"], known[name].rolling(span, min_periods=1, center=True).mean(), color="#2456a6")
        if name in fixed:
            axes.plot(fixed["step"], fixed[name], color="#b3261e", marker="o", markersize=3, label="at fixed noise")
            axes.legend(fontsize=8)
        axes.set_title(titles[name], fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
    return png_of(plot)


def read_points(evaluation: Path, metrics: Mapping[str, Any], shipped: int | None) -> pd.DataFrame | None:
    """Return identity and prompt fidelity: a row a step with previews, or base and final model alone.

    Args:
        evaluation: with checkpoints.csv, if there were previews.
        metrics: of metrics/<id>.json.
        shipped: the step whose label says so; None labels none.

    Returns:
        label, identity, identity_error, prompt, prompt_error, the errors being half widths of the interval of the
        difference from the last step, or from the base (NaN over too few prompts); None where the prompt fidelity is
        missing.
    """
    path = evaluation / "checkpoints.csv"
    if path.exists():
        table = pd.read_csv(path)
        labels = [f"step {step}{' (shipped)' if step == shipped else ''}" for step in table["step"]]
        return table.assign(label=labels) if table["prompt"].notna().all() else None
    if "prompt" not in metrics:
        return None
    identity, prompt = metrics["identity"], metrics["prompt"]
    errors = [(one["high"] - one["low"]) / 2 for one in (identity, prompt)]
    if metrics["prompts"] < MIN_PROMPTS:
        errors = [math.nan, math.nan]
    rows = [
        ("base", identity["base"], 0.0, prompt["base"], 0.0),
        ("personalised", identity["personalised"], errors[0], prompt["personalised"], errors[1]),
    ]
    return pd.DataFrame(rows, columns=["label", "identity", "identity_error", "prompt", "prompt_error"])


def photo_table(instance: Path) -> Table:
    """List every file that `validate` looked at, also those it left out, with what it found; empty if it noted none."""
    path = instance / "photos.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = []
    for photo in found.get("photos", ()):
        quality = photo["quality"] or {}
        measured = [f"{quality[name]:.0f}" if quality else "-" for name in ("sharpness", "brightness", "contrast")]
        twin = [f"the same as {shown(photo['duplicate_of'])}"] if photo["duplicate_of"] else []
        picture, size = photo["prepared"] or "left out", f"{photo['width']} x {photo['height']}"
        rows.append([picture, shown(photo["file"]), size, *measured, "; ".join([*photo["remarks"], *twin]) or "good"])
    rows += [["", "", "", "", "", "", remark] for remark in found.get("remarks", ())]
    columns = ["picture", "file", "pixels", "sharpness", "brightness", "contrast", "found"]
    return Table(columns, rows, numbers=(3, 4, 5))


def provenance(about: Mapping[str, Any], metrics: Mapping[str, Any], sources: Sources) -> Table:
    """List what the numbers depend on, and what they took."""
    how, rows = about["how"], []
    rows += [[f"model: {name}", found["model"]] for name, found in about["models"].items()]
    rows += [[role, ", ".join(one.values())] for role, one in how["encoders"].items()]
    rows.append(
        [
            "seeds of the evaluation",
            ", ".join(str(seed) for seed in dict.fromkeys(case["seed"] for case in how["cases"])),
        ]
    )
    rows += [[f"sampler: {name}", str(value)] for name, value in how["settings"].items() if value != ""]
    rows += [[f"version: {name}", value] for name, value in how["versions"].items()]
    rows += [[name, str(how[name])] for name in ("device", "dtype", "code")]
    rows += [["photos", f"{metrics['photos']}, sha256 {how['photos']}"], ["licence of the photos", sources.licence]]
    rows += training_rows(sources.training)
    rows.append(["safety", SAFETY])
    rows += [[name.replace("_", " "), f"{value:.3g}"] for name, value in read_cost(sources.evaluation).items()]
    return Table(["", ""], rows)


def training_rows(training: Mapping[str, Any]) -> list[list[str]]:
    """Return how a model was trained, with every parameter: two reports shall say what differed."""
    inputs, shipped = training.get("inputs", {}), training.get("shipped_step")
    rows = [[f"train: {name}", str(value)] for name, value in inputs.get("train", {}).items()]
    rows += [["step that is shipped", str(shipped)]] if shipped else []
    if "prior" in inputs:
        told = f"{training['class_images']}, {inputs['prior_kind']}, sha256 {inputs['prior']}"
        rows.append(["class images of the training", told])
    return rows


def read_cost(evaluation: Path) -> dict[str, float]:
    """Return time and memory of an evaluation, by name with unit; empty if they were not noted."""
    path = evaluation / COST
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _of_each(prompts: pd.DataFrame, models: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of the base and those of the personalised model, prompt beside prompt."""
    base, model = (prompts[prompts["model"] == name].reset_index(drop=True) for name in (models[0], models[-1]))
    return base, model


def _base_and_model(found: Mapping[str, Any]) -> list[str]:
    return [f"{found['base']:.3f}", f"{found['personalised']:.3f}"]


def _cell(value: Any, column: str) -> str:
    if pd.isna(value):
        return ""
    return str(int(value)) if column == "copies" else f"{value:+.3f}" if "gain" in column else f"{value:.3f}"


def _summary_note(metrics: Mapping[str, Any]) -> str:
    identity, calibrated = metrics["identity"], metrics["identity"]["calibrated"]
    scale = f" On the scale from base (0) to photos (1): {calibrated:.2f}." if calibrated is not None else ""
    return (
        f"Means over prompts, {metrics['seeds']} seeds each, against {metrics['photos']} photos; prompts of a property "
        f"do not count for the identity.{_few_note(metrics)} The photos among themselves reach an identity of "
        f"{identity['ceiling']:.3f}."
        f"{scale} Only differences between models mean something: another encoder has another scale."
        f"{_second_note(metrics)}{_flat_note(metrics)}"
    )


def _few_note(metrics: Mapping[str, Any]) -> str:
    fewest = min(metrics[name]["prompts"] for name in MEASURES if name in metrics)
    return f" Over fewer than {MIN_PROMPTS} an interval says little and is left out." if fewest < MIN_PROMPTS else ""


def _flat_note(metrics: Mapping[str, Any]) -> str:
    remark = flat_remark(metrics.get("flat", {}))
    return f" Warning: {remark}." if remark else ""


def _second_note(metrics: Mapping[str, Any]) -> str:
    second = metrics.get("identity_second")
    if not second:
        return ""
    return (
        f" The second opinion is that of {metrics['scorer']['name']}, by which the photos among themselves reach "
        f"{second['ceiling']:.3f}. It decides nothing: where the two disagree, look at the pictures."
    )


def _copying_note(metrics: Mapping[str, Any]) -> str:
    copying = metrics["copying"]
    return (
        f"Copies, framed in red: {copying['rate']:.0%}. A copy is a cosine above {copying['threshold']:.3g} or a "
        f"perceptual hash within {COPY_DISTANCE} of 63 bits."
    )


def _prior_note(metrics: Mapping[str, Any]) -> str:
    if "prior" not in metrics:
        return "Not measured (evaluate.num_class_images)."
    prior = metrics["prior"]
    rise = in_interval(prior["rise"], prior["low"], prior["high"])
    return (
        f"The same seeds for each model, PRES (likeness with the photos of the subject) under each. Its rise is "
        f"{rise} over {prior['images']} images. Squared maximum mean discrepancy "
        f"{prior['mmd2']:+.4f}, permutation p {prior['p_value']:.3f}: a small p says that the class has changed."
    )


def _tradeoff_note(
    points: pd.DataFrame | None, drop: float, shipped: int | None, recipe: Mapping[str, Any], confidence: float
) -> str:
    if points is None:
        return "Not drawn: the prompt fidelity was not measured."
    means = "Up: more like the subject. Right: more like the prompt."
    if "step" not in points:
        bars = "" if points["identity_error"].isna().any() else ", bars: the interval of the difference from the base"
        return f"{means} One point a model{bars}; with train.preview_steps the report shows one a step."
    about = (
        f"{means} One point a step, by its previews of {points['prompts'].iloc[0]} prompts; bars: the interval of the "
        "difference from the last step, at the same prompts and noise."
    )
    if recipe.get("ema_decay"):
        about = f"{about} Shipped is the average over the steps (train.ema_decay), which no preview shows."
    elif shipped not in set(points["step"]):
        about = (
            f"{about} Shipped is {f'step {shipped}' if shipped else 'a step that was not noted'}, without a preview."
        )
    return f"{about} {_advice(points, drop, shipped, recipe.get('lr_scheduler', 'constant'), confidence)}"


def _advice(points: pd.DataFrame, drop: float, shipped: int | None, lr_scheduler: str, confidence: float) -> str:
    """Say which step the previews speak for and how to get it: the weights of a step are not kept after the training.

    A step that is not told apart from the last one is no advice. It is the best of all but the last, in one of two
    measures: its interval holds for so many comparisons at once.
    """
    step, last = choose_step(points, drop), points.iloc[-1]
    best = points[points["step"] == step].iloc[0]
    most = f"Most identity within {drop:g} of the best prompt fidelity: step {step}"
    if step == shipped:
        return f"{most}, which is the one that is shipped."
    if step == last["step"]:
        return f"{most}, the last one."
    count, comparisons = int(best["prompts"]), 2 * (len(points) - 1)
    better = count >= MIN_PROMPTS and any(
        best[name] - last[name] > widened(best[f"{name}_error"], count, confidence, comparisons)
        for name in ("identity", "prompt")
    )
    if not better:
        return (
            f"{most}, but by {count} prompts the best of {len(points)} steps is not told apart from the last one: no "
            f"reason for a shorter training. More train.preview_prompts tell more, {MIN_PROMPTS} at least."
        )
    ends = (
        "" if lr_scheduler == "constant" else f"; its rate then falls to 0 by there ({lr_scheduler}), for other weights"
    )
    return (
        f"{most}. Its weights were removed at the end of the training; to ship a training of that length, set "
        f"train.max_train_steps to {step} and run it again: dreambooth run{ends}."
    )

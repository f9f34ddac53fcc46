"""Plot models as points, identity against prompt: for the report of one subject and for a sweep of many trainings."""

import io

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot
from matplotlib.patheffects import withStroke
from matplotlib.transforms import BboxBase

# Of a label, in points from its point: above and below, to the right and to the left, then farther away.
PLACES = [(right, up) for far in (0, 12, 24, 36) for right in (6, -6) for up in (4 + far, -11 - far)]


def tradeoff_curve(
    points: pd.DataFrame,
    prompt: str = "prompt fidelity",
    identity: str = "identity",
    title: str = "",
    in_order: bool = True,
) -> bytes:
    """Plot identity against prompt fidelity with error bars, each point with its label: a PNG.

    Args:
        points: label, identity, identity_error, prompt, prompt_error (half widths of the intervals; NaN has no bar).
        prompt: name of the axis to the right.
        identity: name of the axis upwards.
        title: above the plot.
        in_order: whether a line leads from each point to the next.
    """
    plot = Plot(figsize=(5.5, 4), layout="constrained")
    axes = plot.add_subplot()
    axes.errorbar(
        points["prompt"], points["identity"], xerr=points["prompt_error"], yerr=points["identity_error"],
        marker="o", color="#2456a6", ecolor="#b9c4d6", capsize=2, linewidth=1, linestyle="-" if in_order else "none",
        elinewidth=1,
    )  # fmt: skip
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(prompt, fontsize=9)
    axes.set_ylabel(identity, fontsize=9)
    axes.tick_params(labelsize=8)
    _write_labels(plot, axes, points)
    return png_of(plot)


def _write_labels(plot: Plot, axes: Axes, points: pd.DataFrame) -> None:
    """Write each label beside its point, at the first place where it covers no label that stands there already."""
    plot.draw_without_rendering()  # the layout decides where a point lies
    taken: list[BboxBase] = []
    for label, x, y in zip(points["label"], points["prompt"], points["identity"], strict=True):
        for right, up in PLACES:
            written = axes.annotate(
                label, (x, y), xytext=(right, up), textcoords="offset points", fontsize=8,
                ha="left" if right > 0 else "right", path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
            box = written.get_window_extent()
            if not any(box.overlaps(other) for other in taken) or (right, up) == PLACES[-1]:
                taken.append(box)
                break
            written.remove()


def png_of(plot: Plot) -> bytes:
    """Return a plot as a PNG that does not say which program drew it."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()

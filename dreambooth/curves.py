"""Plot models as points, identity against prompt: for the report of one subject and for a sweep of many trainings."""

import io

import pandas as pd
from matplotlib.figure import Figure as Plot


def tradeoff_curve(
    points: pd.DataFrame,
    prompt: str = "prompt fidelity",
    identity: str = "identity",
    title: str = "",
    in_order: bool = True,
) -> bytes:
    """Plot identity against prompt fidelity with error bars, each point with its label: a PNG.

    Args:
        points: label, identity, identity_error, prompt, prompt_error (half widths of the intervals).
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
    for label, x, y in zip(points["label"], points["prompt"], points["identity"], strict=True):
        axes.annotate(label, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(prompt, fontsize=9)
    axes.set_ylabel(identity, fontsize=9)
    axes.tick_params(labelsize=8)
    return png_of(plot)


def png_of(plot: Plot) -> bytes:
    """Return a plot as a PNG that does not say which program drew it."""
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()

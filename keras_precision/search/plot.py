"""The picture of a search: loss against bytes or seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from keras_precision.search.result import SearchResult


def plot(result: SearchResult, axes=None) -> Figure:
    """Returns a figure of what a search verified, its Pareto front, and the front that the layers' own losses predict.

    Args:
        result: to draw.
        axes: of matplotlib, to draw on; None makes a figure that needs no display.
    """
    if axes is None:
        axes = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    base = result.before.loss
    predicted = [(cost, base + increase) for cost, increase in result.predicted_front]
    axes.plot(*zip(*predicted, strict=True), color="0.7", label="sums of single layers and their errors", zorder=1)
    front = [(result.cost(point), point.loss) for point in result.front]
    axes.plot(*zip(*front, strict=True), color="C0", drawstyle="steps-post", label="Pareto front (held out)", zorder=2)
    kinds = {"search": ("C0", "o"), result.before.name: ("k", "s")}
    for number, point in enumerate(result.verified):
        color, marker = kinds.get(point.name, ("C1", "D"))
        at = result.cost(point), point.loss
        axes.errorbar(*at, yerr=point.standard_error, color=color, marker=marker, markersize=5, capsize=2, zorder=3)
        if point.name != "search":
            axes.annotate(point.name, at, xytext=(4, (5, -12)[number % 2]), textcoords="offset points", fontsize=8)
    chosen = result.chosen
    axes.plot(
        result.cost(chosen), chosen.loss, "*", color="C3", markersize=14, label="chosen", linestyle="none", zorder=4
    )
    if result.budget.name == "max_loss_increase":
        limit = base + result.budget.resolved(base)
        axes.axhline(limit, color="C3", linewidth=0.8, linestyle="--", label=str(result.budget))
        spread = max(limit - base, *(abs(loss - base) for _, loss in front))
        axes.set_ylim(base - 0.7 * spread, base + 2 * spread)  # the worst of what was tried would hide all else
    axes.margins(x=0.12)
    axes.set(xlabel="seconds a batch" if result.counts_time else "bytes of all weights", ylabel="loss")
    axes.legend(fontsize=8)
    return axes.figure

"""Plots of an audit: exponents by layer as heat maps, and the error by depth."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_precision import dtypes
from keras_precision.report.result import Audit, LayerAudit

_TITLES = {
    "weights": "weights",
    "activations": "activations",
    "activation_gradients": "gradients of activations",
    "weight_gradients": "gradients of weights",
}
_INCHES_A_LAYER, _SMALLEST, _LARGEST = 0.16, 3.0, 60.0


def figure_of(audit: Audit) -> Any:
    """Returns a matplotlib Figure, which no window shows: a heat map a kind of tensor, and the error of each layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(
            "Expected matplotlib to plot an audit. Run pip install 'keras-precision[plots]'; print(audit) and "
            "audit.to_dict() need none."
        ) from e
    by_path = {layer.path: layer for layer in audit.layers}
    rest = [layer for layer in audit.layers if layer.tensors and layer.path not in set(audit.order)]
    layers = [by_path[path] for path in dict.fromkeys(audit.order)] + rest
    kinds = [kind for kind in _TITLES if any(kind in layer.tensors for layer in layers)]
    height = min(max(_INCHES_A_LAYER * len(layers) + 1.5, _SMALLEST), _LARGEST)
    figure = Figure(figsize=(3.2 * (len(kinds) + 1) + 1.5, height), layout="constrained")
    axes = figure.subplots(1, len(kinds) + 1, sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=False):
        image = _heat_map(axis, layers, kind)
        axis.set_title(f"{_TITLES[kind]}{_scaled(audit, kind)}", fontsize=8)
    if kinds:
        figure.colorbar(image, ax=list(axes[:-1]), label="share of the values", shrink=0.6, location="bottom")
    _errors(axes[-1], layers)
    axes[0].set_yticks(range(len(layers)), [_shown(layer.path) for layer in layers], fontsize=6)
    axes[0].set_ylim(len(layers) - 0.5, -0.5)  # in the order of computation, the first on top
    figure.suptitle(_shown(f"{audit.model} under {audit.policy}"), fontsize=9)
    return figure


def _heat_map(axis, layers: list[LayerAudit], kind: str):
    """Draws shares of values by exponent, and between which exponents the layer's dtype has normal values."""
    found = [layer.tensors.get(kind) for layer in layers]
    exponents = [e for stats in found if stats is not None and stats.histogram for e in stats.exponent_range]
    low, high = (min(exponents), max(exponents)) if exponents else (0, 0)
    shares = np.zeros((len(layers), high - low + 1))
    for row, stats in enumerate(found):
        for exponent, count in stats.histogram.items() if stats is not None else ():
            shares[row, exponent - low] = count / max(stats.elements - stats.zeros, 1)
    image = axis.imshow(
        np.where(shares > 0, shares, np.nan),
        aspect="auto",
        extent=(low - 0.5, high + 0.5, len(layers) - 0.5, -0.5),
        interpolation="nearest",
        vmin=0,
        vmax=0.5,
        cmap="viridis",
    )
    for row, stats in enumerate(found):
        if stats is None or stats.dtype == "float32":
            continue
        facts = dtypes.info(stats.dtype)
        for bound in (np.log2(facts.tiny), np.log2(facts.max)):
            if low - 1 <= bound <= high + 1:
                axis.vlines(bound, row - 0.5, row + 0.5, color="red", linewidth=1)
    axis.set_xlim(low - 1, high + 1)
    axis.set_xlabel("binary exponent", fontsize=7)
    axis.tick_params(labelsize=6)
    return image


def _errors(axis, layers):
    ratios = [np.nan if layer.sqnr_db is None else layer.sqnr_db for layer in layers]
    axis.plot(ratios, range(len(layers)), marker=".", linewidth=0.8)
    axis.set_title("error of outputs", fontsize=8)
    axis.set_xlabel("SQNR against float32 (dB)", fontsize=7)
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.3)


def _scaled(audit, kind):
    return f"\n(x {audit.loss_scale:g})" if kind.endswith("gradients") and audit.loss_scale != 1 else ""


def _shown(text):
    """Returns text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")

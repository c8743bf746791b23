"""The demo's picture: training loss by epoch, one curve a policy."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from keras_precision.cli.digits import RunResult

# Curves of policies that train lie on top of each other; different dashes keep the lower ones visible.
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 3)))


def save_loss_curves(results: Sequence[RunResult], path: Path) -> Path:
    """Writes the curves as a PNG to `path`, whole or not at all, and returns `path`."""
    # A Figure of its own, not pyplot's: no display is needed and no global state is left.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, result in enumerate(results):
        losses = [result.initial_loss, *result.epoch_losses]
        finite = [loss if math.isfinite(loss) else math.nan for loss in losses]
        label = result.requested if result.status == "trains" else f"{result.requested} ({result.status})"
        axes.plot(finite, linestyle=DASHES[index % len(DASHES)], marker=".", label=label)
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log", title="Handwritten digits")
    axes.legend()
    descriptor, partial = tempfile.mkstemp(dir=path.parent, suffix=".png")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            figure.savefig(stream, format="png", dpi=150)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink()
        raise
    return path

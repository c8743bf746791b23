"""Goes back to any recent step of a running `fit`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_precision import _bridge_optimizers
from keras_precision._bridge_training import State, Training
from keras_precision.kernels.compiled import jitted
from keras_precision.progress import progress_bar
from keras_precision.scaling.gradients import first_nonfinite
from keras_precision.scaling.optimizer import LossScaleOptimizer

# float8 tensors are codes, whose scales are float32 variables beside them.
_WITH_VALUES = ("float16", "bfloat16", "float32", "float64")


class Look(NamedTuple):
    """What there is to see of a state.

    Attributes:
        nonfinite: path of the first weight, or other variable of the model, that holds inf or NaN; None if none does.
        has_loss: whether the running mean of the epoch's loss is finite, or not known.
        skipped_steps: by the optimizer, in all.
    """

    nonfinite: str | None = None
    has_loss: bool = True
    skipped_steps: int = 0

    def is_worse_than(self, before: Look) -> bool:
        """Returns whether something has become inf or NaN since, or was kept from it."""
        is_skip, has_lost_loss = self.skipped_steps > before.skipped_steps, before.has_loss and not self.has_loss
        return self.ruins(before) or is_skip or has_lost_loss

    def ruins(self, before: Look) -> bool:
        """Returns whether a weight, or another variable of the model, has become inf or NaN since."""
        return self.nonfinite is not None and before.nonfinite is None


@dataclasses.dataclass(frozen=True)
class Found:
    """A step of the past, before which training stands again.

    Attributes:
        batch: what it trained on.
        place: how many kept batches were before it.
        before: what the state looks like before it.
        after: what it looked like after it.
    """

    batch: Any
    place: int
    before: Look
    after: Look


class Replay:
    """Keeps a copy of the state now and then, and the batches since.

    Args:
        training: whose steps to keep.
        offload: whether to keep the copy in the host's memory.

    Attributes:
        before: what the state looked like when it was copied last.
        batches: kept since then.
        bytes: of those.
    """

    def __init__(self, training: Training, offload: bool = False):
        self._training, self._offload = training, offload
        self._start: Callable[[], State] | None = None
        self._copied: State | None = None
        self.before = Look()
        self.batches: list[Any] = []
        self.bytes = 0

    def keep(self, batches: list[Any]) -> None:
        """Keeps batches that are about to be trained on."""
        self.batches += batches
        self.bytes += sum(map(_bytes_of, keras.tree.flatten(batches)))

    def look(self) -> Look:
        """Looks at the present state, for which it waits for the device."""
        training = self._training
        pairs = zip(itertools.chain(*training.variables[:2]), itertools.chain(*training.values()[:2]), strict=True)
        floats = [(v, value) for v, value in pairs if keras.backend.standardize_dtype(v.dtype) in _WITH_VALUES]
        first = _first_nonfinite([value for _, value in floats])
        loss, scaling = training.logs.get("loss", 0.0), scaling_of(training.optimizer)
        skipped = 0 if scaling is None else training.value_of(scaling.state_variables.skipped_steps)
        return Look(
            nonfinite=floats[first][0].path if first < len(floats) else None,
            has_loss=bool(np.isfinite(ops.convert_to_numpy(loss)).all()),
            skipped_steps=int(ops.convert_to_numpy(skipped)),
        )

    def renew(self, seen: Look) -> None:
        """Starts again from the present state, which looks like `seen`; what was kept is forgotten."""
        self._start = self._copied = None  # before the new copy is made
        self.batches, self.bytes, self.before = [], 0, seen
        values = self._training.values()
        if self._offload:
            self._start = on_host(values)
        else:
            copied = self._copied = copies(values)
            self._start = lambda: copies(copied)

    def wait(self) -> None:
        """Waits until the device has done the steps and copies that it was given."""
        if keras.backend.backend() == "jax":
            import jax

            jax.block_until_ready((self._training.values(), self._copied))

    def find(self, verbose: int = 0) -> Found | None:
        """Goes back to before the first kept step after which a look is worse than before; None if none is.

        The present state is lost: keep it before with `on_host`.
        """
        training, before = self._training, self.before
        _free(training.values())
        training.set(self._start())
        with progress_bar("looking for the first value that is not finite", "steps", verbose) as progress:
            task = progress.add_task("looking for the first value that is not finite", total=2 * len(self.batches))
            for place, batch in enumerate(self.batches):
                training.step([batch])
                after = self.look()
                progress.advance(task)
                if after.is_worse_than(before):
                    break
                before = after
            else:
                return None
            training.set(self._start())
            for earlier in self.batches[:place]:
                training.step([earlier])
                progress.advance(task)
        return Found(batch, place, before, after)


def copies(values: State) -> State:
    """Returns copies on the same devices."""
    if keras.backend.backend() == "jax":
        return jitted(_jax_copies, ())(values)
    import tensorflow as tf

    return keras.tree.map_structure(tf.identity, values)


def _jax_copies(values):
    import jax

    return jax.tree.map(jax.numpy.copy, values)


def on_host(values: State) -> Callable[[], State]:
    """Copies values into the host's memory; returns a function that brings them back to the devices they are on."""
    if keras.backend.backend() != "jax":
        copied = keras.tree.map_structure(ops.convert_to_numpy, copies(values))
        return lambda: copied  # assigned to variables, they go there
    import jax

    shardings = [[v.sharding for v in group] for group in values]
    copied = [[np.array(v) for v in group] for group in values]  # asarray would share a CPU's buffers
    return lambda: jax.device_put(copied, shardings)


def _free(values: State) -> None:
    """Frees what a step would overwrite anyway."""
    if keras.backend.backend() == "jax":
        for array in itertools.chain(*values):
            array.delete()


def _first_nonfinite(values):
    """Returns the place of the first tensor that holds inf or NaN, their number if none does."""
    if not values:
        return 0
    function = jitted(first_nonfinite, ()) if keras.backend.backend() == "jax" else first_nonfinite
    return int(ops.convert_to_numpy(function(values)))


def scaling_of(optimizer: keras.Optimizer) -> LossScaleOptimizer | None:
    """Returns the one of an optimizer and those it wraps that scales the loss, None if none does."""
    layers = (optimizer, *_bridge_optimizers.wrapped(optimizer))
    return next((one for one in layers if isinstance(one, LossScaleOptimizer)), None)


def _bytes_of(array):
    parts = getattr(array, "values", [array]) if not hasattr(array, "dtype") else [array]  # of each replica
    return sum(getattr(part, "nbytes", 0) or part.dtype.size * (part.shape.num_elements() or 0) for part in parts)

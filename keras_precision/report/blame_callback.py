"""Names, while `fit` runs, the first tensor that is not finite."""

from __future__ import annotations

import dataclasses
import math
import time

import keras
from keras import ops

from keras_precision import _bridge_optimizers
from keras_precision._bridge_training import Training
from keras_precision.report.blame import Blame, NonFiniteError, blame, described, seen
from keras_precision.report.replay import Found, Look, Replay, on_host, scaling_of
from keras_precision.scaling.monitor import owner


# Of the time between two looks, what the second and its copy may take; and how many batches there may be between them.
_SHARE = 0.0025
_MOST_BATCHES = 1024


class BlameCallback(keras.callbacks.Callback):
    """Tells which layer and which tensor first held inf or NaN, when a step of `fit` makes one.

    Works with compiled steps, on JAX and TensorFlow, with loss scaling or
    without. It keeps a copy of the weights and of the optimizer's state, and
    the batches since, and looks now and then whether a step was skipped, or
    whether the loss or a weight is not finite. Then it trains again from the
    copy to find the step, and runs that one layer by layer (see `blame`).
    While nothing overflows, all that costs is the copies and looks.

    When the step has ruined the weights, or a moving average, it raises
    NonFiniteError. The model then has the weights, and the optimizer the
    state, from before that step: they can be saved, and trained on. When loss
    scaling has skipped the step, training goes on from where it was, and
    `blames` has one more entry.

    What other callbacks change between the batches of an epoch is not known to
    the second run; what they change between epochs is.

    Args:
        check_every: int >= 1, in batches: how often to look, and to copy; less
            often where that would take more than 0.25% of the time. At the
            beginning of training it looks after 1 batch, 2 more, 4 more, ...
        max_batch_bytes: int >= 1; so many bytes of batches are kept at most,
            or those of one call of `train_function`; copies are made more
            often where batches are large.
        offload: whether to keep the copy in the host's memory rather than the
            device's, which takes longer to copy.
        raises: True to raise after skipped steps as well, False never to.
            None: when weights are ruined.
        max_blames: int >= 1: after so many it has told enough, and stops.
        verbose: 1 to print what it finds, and a progress bar; 0 not to.

    Attributes:
        blames: list of `Blame`.

    Raises:
        NonFiniteError: from `fit`, with `blame` as an attribute.

    Example:
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, name="head")], name="model")
        >>> model.compile("sgd", "mse")
        >>> x = np.array([[1.0], [2.0], [np.inf], [3.0]])
        >>> try:
        ...     model.fit(x, x, batch_size=1, shuffle=False, verbose=0, callbacks=[BlameCallback(verbose=0)])
        ... except NonFiniteError as e:
        ...     print(e.blame.batch, e.blame.first.kind, e.blame.first.infinities)
        2 input 1
    """

    def __init__(
        self,
        check_every: int = 128,
        max_batch_bytes: int = 2**30,
        offload: bool = False,
        raises: bool | None = None,
        max_blames: int = 3,
        verbose: int = 1,
    ):
        super().__init__()
        for name, value in (
            ("check_every", check_every),
            ("max_batch_bytes", max_batch_bytes),
            ("max_blames", max_blames),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Expected {name} to be an int >= 1. Received: {name}={value!r}.")
        self.check_every, self.max_batch_bytes, self.offload = check_every, max_batch_bytes, offload
        self.raises, self.max_blames, self.verbose = raises, max_blames, verbose
        self.blames: list[Blame] = []
        self._training: Training | None = None

    def on_train_begin(self, logs=None):
        """Begins to see the steps of this `fit`."""
        if self.model.optimizer is None:  # nothing is trained
            return
        self._told = 0
        self._training = Training(self.model, self._before_step)
        self._replay = Replay(self._training, self.offload)
        self._look_after = 1

    def on_epoch_begin(self, epoch, logs=None):
        """Has the first step of the epoch start from a new copy: callbacks may have changed anything."""
        self._epoch, self._batch = epoch, 0
        self._is_new = True

    def on_epoch_end(self, epoch, logs=None):
        """Looks at the last steps of the epoch."""
        training = self._training
        if training is not None and self._replay.batches:
            with training.between_epochs():
                self._check()

    def on_train_end(self, logs=None):
        """Lets go of copies and batches."""
        self._training = self._replay = None

    def _before_step(self, batches):
        if self._training is None:
            return
        if self._is_new:
            self._is_new, self._resumed = False, time.perf_counter()
            self._training.logs = {}
            look = self._replay.look()
            self._replay.renew(look)
            if look.nonfinite is not None and not self._told:  # weights that `fit` was given
                self._tell(self._blame_of(batches[0], self._batch), _given(look), is_ruin=True)
        elif len(self._replay.batches) >= self._look_after or self._replay.bytes >= self.max_batch_bytes:
            self._check_and_time()
        if self._training is not None:
            self._replay.keep(batches)
            self._batch += len(batches)

    def _check_and_time(self):
        batches = len(self._replay.batches)
        self._replay.wait()  # the steps that the device has yet to do are no cost of looking
        started, told = time.perf_counter(), self._told
        self._check()
        seconds, batch_seconds = time.perf_counter() - started, (started - self._resumed) / batches
        needed = min(math.ceil(seconds / (_SHARE * batch_seconds)), _MOST_BATCHES) if self._told == told else 0
        self._look_after = max(min(2 * self._look_after, self.check_every), needed)
        self._resumed = time.perf_counter()

    def _check(self):
        """Looks; if there is something to see, finds the step that made it, and goes on from where training was."""
        training, replay = self._training, self._replay
        look = replay.look()
        if look.is_worse_than(replay.before):
            resume = on_host(training.values())
            found = replay.find(self.verbose)
            if found is None:
                start = self._batch - len(replay.batches)
                self._tell(None, _not_found(look, start, self._batch), look.ruins(replay.before))
            else:
                number = self._batch - len(replay.batches) + found.place
                is_ruin = found.after.ruins(found.before)
                blamed = self._blame_of(
                    found.batch,
                    number,
                    was_skipped=found.after.skipped_steps > found.before.skipped_steps,
                    ruined=found.after.nonfinite if is_ruin else None,
                )
                self._tell(blamed, _not_seen(found, number), is_ruin)
            training.set(resume())
            training.hide_state()
        if self._training is not None:
            replay.renew(look)
            replay.wait()

    def _blame_of(self, batch, number, **facts):
        """Returns what is not finite first in a step that is about to be run; None if its result alone is not."""
        training = self._training
        training.show_state()
        scale = _loss_scale(self.model.optimizer)
        found = blame(self.model, *keras.utils.unpack_x_y_sample_weight(training.whole(batch)), loss_scale=scale)
        training.hide_state()
        if found is None:
            found = self._blame_of_update(batch, scale)
        return found and dataclasses.replace(found, epoch=self._epoch, batch=number, **facts)

    def _blame_of_update(self, batch, scale):
        training = self._training
        before = on_host(training.values())
        training.step([batch])
        path = self._replay.look().nonfinite
        variable = next((v for group in training.variables[:2] for v in group if v.path == path), None)
        layer = None if variable is None else owner(self.model, variable)
        found = None
        if layer is not None:
            first = seen("update", *described(layer), variable.name, ops.convert_to_tensor(training.value_of(variable)))
            found = Blame(first, loss_scale=scale)
        training.set(before())
        return found

    def _tell(self, found, otherwise, is_ruin):
        """Raises, with the state from before the step in the model's variables, or prints."""
        message = otherwise if found is None else str(found)
        if found is not None:
            self.blames.append(found)
        if is_ruin if self.raises is None else self.raises:
            self._training.show_state()
            self._training = self._replay = None
            raise NonFiniteError(message, found)
        if self.verbose:
            print(message)
        self._told += 1
        if self._told == self.max_blames:
            self._training = self._replay = None


def _loss_scale(optimizer):
    scaling = scaling_of(optimizer)
    if scaling is not None:
        return float(ops.convert_to_numpy(scaling.loss_scale))
    return float(_bridge_optimizers.innermost(optimizer).loss_scale_factor or 1.0)


def _given(look: Look) -> str:
    return f"'{look.nonfinite}' held inf or NaN before training began. Load or initialise the model again."


def _not_found(look: Look, start: int, end: int) -> str:
    what = f"'{look.nonfinite}'" if look.nonfinite is not None else "A gradient or the loss"
    return (
        f"{what} is not finite since one of the batches {start} to {end - 1}. Trained on again, they gave finite values, so "
        "something in this model or in other callbacks gives other results each time: pass check_every=1."
    )


def _not_seen(found: Found, number: int) -> str:
    what = "skipped the step" if found.after.skipped_steps > found.before.skipped_steps else "made the loss inf or NaN"
    return (
        f"Batch {number} {what}, but run layer by layer all values are finite: the compiled step overflows within a layer, "
        "or a custom train_step computes something else."
    )

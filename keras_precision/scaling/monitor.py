"""Reports what the loss scale does while `fit` runs."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_precision import _bridge
from keras_precision.scaling.optimizer import LossScaleOptimizer


class Overflow(NamedTuple):
    """What a look at the optimizer found when steps had been skipped since the one before.

    Attributes:
        batch: how many batches were trained up to then, in all epochs.
        skipped_steps: steps skipped since the look before.
        loss_scale: the scale after them.
        layer: path of the layer that owns the first weight whose gradient was
            not finite, at the last of them.
        weight: that weight's path.
    """

    batch: int
    skipped_steps: int
    loss_scale: float
    layer: str
    weight: str


class LossScaleMonitor(keras.callbacks.Callback):
    """Reports the loss scale and skipped steps, names the layer that overflows, and stops a run that skips every step.

    `fit` adds one by itself where the optimizer scales the loss, so that its
    logs, and the callbacks that read them, carry `loss_scale` and
    `skipped_steps` at each epoch's end; pass one to set the arguments. Compiled
    steps cannot raise, so this looks at the optimizer now and then: it notes
    the scale at one look and reads it at the next, which spares waiting for
    the device.

    Args:
        check_every: int >= 1, in batches; None for the optimizer's
            `max_consecutive_skips`, so that a run that is stuck stops after
            three times that many batches at most.
        log_dir: directory for TensorBoard, written at each look; None for none.
        verbose: 1 to print a line when steps were skipped, 0 not to.

    Attributes:
        overflows: list of `Overflow`, what the looks have found.

    Raises:
        FloatingPointError: from `fit`, see `LossScaleOptimizer.raise_if_stuck`.
        ImportError: `log_dir` without tensorboard installed.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, name="head")], name="model")
        >>> model.compile(LossScaleOptimizer("sgd", initial_scale=4.0), "mse")
        >>> monitor = LossScaleMonitor(verbose=0)
        >>> data = ops.convert_to_tensor([[1.0], [float("inf")]])
        >>> history = model.fit(data, data, batch_size=1, shuffle=False, verbose=0, callbacks=[monitor])
        >>> history.history["loss_scale"], history.history["skipped_steps"], monitor.overflows[0].layer
        ([2.0], [1], 'model/head')
    """

    def __init__(self, check_every: int | None = None, log_dir: str | None = None, verbose: int = 1):
        super().__init__()
        if check_every is not None and check_every < 1:
            raise ValueError(f"Expected check_every >= 1 or None. Received: check_every={check_every}.")
        self.check_every = check_every
        self.verbose = verbose
        self.overflows: list[Overflow] = []
        self._writer = _Writer(log_dir) if log_dir else None
        self._batches = 0
        self._skipped = 0
        self._noted: tuple[Any, ...] | None = None

    @property
    def _optimizer(self):
        optimizer = self.model.optimizer
        return optimizer if isinstance(optimizer, LossScaleOptimizer) else None

    def on_train_begin(self, logs=None):
        """Notes how many steps were skipped before."""
        self._noted = None
        if self._optimizer is not None:
            self._skipped = int(ops.convert_to_numpy(self._optimizer.skipped_steps))

    # Not at a batch's end: a callback with that makes Keras wait for the device at every batch.
    def on_train_batch_begin(self, batch, logs=None):
        """Looks, once every `check_every` batches."""
        if self._optimizer is None:
            return
        every = self.check_every or self._optimizer.max_consecutive_skips
        if every and self._batches and self._batches % every == 0:
            before, self._noted = self._noted, self._note()
            self._report(before)
        self._batches += 1

    def on_epoch_end(self, epoch, logs=None):
        """Looks, and writes the logs."""
        if self._optimizer is None:
            return
        self._report(self._noted)
        self._noted = None
        noted = self._note()
        self._report(noted)
        if logs is not None:
            logs["loss_scale"], logs["skipped_steps"] = float(ops.convert_to_numpy(noted[1])), self._skipped

    def on_train_end(self, logs=None):
        """Closes what was written for TensorBoard."""
        if self._writer:
            self._writer.flush()

    def _note(self):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        optimizer = self._optimizer
        return (
            self._batches,
            optimizer.loss_scale,
            optimizer.skipped_steps,
            optimizer.consecutive_skips,
            optimizer.overflow_place,
        )

    def _report(self, noted):
        if noted is None:
            return
        batch, *values = noted
        scale, skipped, consecutive, place = (ops.convert_to_numpy(value).item() for value in values)
        if self._writer:
            self._writer.write({"loss_scale": scale, "skipped_steps": skipped}, batch)
        if skipped > self._skipped:
            weight = self._optimizer.trained[place]
            overflow = Overflow(batch, skipped - self._skipped, scale, _owner_path(self.model, weight), weight.path)
            self.overflows.append(overflow)
            self._skipped = skipped
            if self.verbose:
                print(
                    f"Up to batch {batch}: {overflow.skipped_steps} steps skipped, loss scale {scale:g}. Not finite first: "
                    f"the gradient of '{weight.path}' in layer '{overflow.layer}'."
                )
        self._optimizer.raise_if_stuck(consecutive)


def owner(model: keras.Model, variable: keras.Variable) -> keras.Layer | None:
    """Returns the layer that made a variable, None if none in the model did."""
    layers = _bridge.flatten_layers(model)
    return next((layer for layer in layers if any(v is variable for v in _bridge.own_variables(layer))), None)


def _owner_path(model, weight):
    found = owner(model, weight)
    return weight.path.rpartition("/")[0] if found is None else _bridge.layer_path(found)


class _Writer:
    """Writes scalars where TensorBoard reads them."""

    def __init__(self, log_dir):
        try:
            from tensorboard.summary import Writer
        except ImportError as e:
            raise ImportError(
                "Expected tensorboard for log_dir. Run pip install tensorboard, or leave log_dir out: the logs of fit "
                "hold the same at each epoch's end."
            ) from e
        self._writer = Writer(str(log_dir))

    def write(self, scalars, step):
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self):
        self._writer.flush()


def monitored(model: keras.Model, callbacks):
    """Returns the callbacks of a `fit`, a `LossScaleMonitor` first, whose logs the others then see.

    Args:
        model: compiled or not; left alone unless its optimizer scales the loss.
        callbacks: what `fit` got: None, a callback, a list or a `CallbackList`.
    """
    if not isinstance(getattr(model, "optimizer", None), LossScaleOptimizer):
        return callbacks
    if isinstance(callbacks, keras.callbacks.CallbackList):
        if not any(isinstance(callback, LossScaleMonitor) for callback in callbacks.callbacks):
            callbacks.callbacks.append(LossScaleMonitor(verbose=0))
            callbacks.set_model(model)
        callbacks.callbacks.sort(key=_comes_later)
        return callbacks
    found = list(keras.tree.flatten(callbacks)) if callbacks is not None else []
    if not any(isinstance(callback, LossScaleMonitor) for callback in found):
        found.append(LossScaleMonitor(verbose=0))
    return sorted(found, key=_comes_later)


def _comes_later(callback):
    return not isinstance(callback, LossScaleMonitor)

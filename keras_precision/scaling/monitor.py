"""Reports what the loss scale does while `fit` runs."""

import keras

from keras_precision.scaling.optimizer import LossScaleOptimizer


class LossScaleMonitor(keras.callbacks.Callback):
    """Adds `loss_scale` and `skipped_steps` to the logs of each epoch, and raises when every step is skipped.

    Compiled steps cannot raise, so this looks at the optimizer now and then.

    Args:
        check_every: int >= 1, in batches; None for the optimizer's
            `max_consecutive_skips`, so that a run that is stuck stops after at
            most twice that many batches. Looking waits for the device.

    Raises:
        FloatingPointError: from `fit`, see `LossScaleOptimizer.raise_if_stuck`.
    """

    def __init__(self, check_every: int | None = None):
        super().__init__()
        if check_every is not None and check_every < 1:
            raise ValueError(f"Expected check_every >= 1 or None. Received: check_every={check_every}.")
        self.check_every = check_every
        self._batches = 0

    @property
    def _optimizer(self):
        optimizer = self.model.optimizer
        return optimizer if isinstance(optimizer, LossScaleOptimizer) else None

    def on_train_batch_end(self, batch, logs=None):
        """Checks, once every `check_every` batches."""
        if self._optimizer is None:
            return
        self._batches += 1
        every = self.check_every or self._optimizer.max_consecutive_skips
        if every and self._batches % every == 0:
            self._check()

    def on_epoch_end(self, epoch, logs=None):
        """Checks, and writes the logs."""
        if self._optimizer is None:
            return
        self._check()
        if logs is not None:
            logs["loss_scale"] = self._optimizer.get_scale()
            logs["skipped_steps"] = int(keras.ops.convert_to_numpy(self._optimizer.skipped_steps))

    def _check(self):
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()
        self._optimizer.raise_if_stuck()

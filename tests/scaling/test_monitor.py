"""What fit's logs and errors say about the loss scale."""

import keras
import numpy as np
import pytest

from keras_precision.scaling import LossScaleMonitor, LossScaleOptimizer


def fit(bad_from, callbacks, epochs=1, **kwargs):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="head")])
    model.compile(LossScaleOptimizer("sgd", **kwargs), "mse")
    x = np.ones((20, 2), "float32")
    x[bad_from:] = np.inf
    return model.fit(x, x[:, :1], batch_size=2, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)


def test_logs_carry_the_scale():
    history = fit(16, [LossScaleMonitor()], epochs=2).history
    assert history["loss_scale"] == [2.0**13, 2.0**11]
    assert history["skipped_steps"] == [2, 4]


def test_a_run_that_is_stuck_raises():
    with pytest.raises(FloatingPointError, match="3 steps in a row.*head/kernel"):
        fit(6, [LossScaleMonitor()], max_consecutive_skips=3)
    fit(6, [LossScaleMonitor()], max_consecutive_skips=None)


def test_other_optimizers_are_left_alone():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    history = model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[LossScaleMonitor(check_every=1)])
    assert "loss_scale" not in history.history
    with pytest.raises(ValueError, match="Expected check_every"):
        LossScaleMonitor(check_every=0)

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


class CountsBatches(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1


class SeesLogs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(set(logs))


@pytest.mark.parametrize("given", ["none", "empty", "one", "list", "monitor last", "CallbackList"])
def test_logs_of_fit_carry_the_scale(given):
    sees = SeesLogs()
    callbacks = {
        "none": None,
        "empty": [],
        "one": sees,
        "list": [sees],
        "monitor last": [sees, LossScaleMonitor(verbose=0)],
        "CallbackList": keras.callbacks.CallbackList([sees], add_history=True),
    }[given]
    history = fit(16, callbacks, epochs=2).history
    assert history["loss_scale"] == [2.0**13, 2.0**11]
    assert history["skipped_steps"] == [2, 4]
    assert all({"loss_scale", "skipped_steps"} <= seen for seen in sees.seen)
    assert len(sees.seen) == (0 if given in ("none", "empty") else 2)


def test_a_run_that_is_stuck_raises():
    counts = CountsBatches()
    with pytest.raises(FloatingPointError, match="3 steps in a row.*head/kernel"):
        fit(14, None, max_consecutive_skips=3)
    with pytest.raises(FloatingPointError, match="2 steps in a row.*head/kernel"):
        fit(0, [LossScaleMonitor(check_every=2), counts], max_consecutive_skips=2)
    assert counts.batches == 4  # within the epoch: what the second batch showed is read at the fourth
    fit(6, None, max_consecutive_skips=None)


def test_an_overflow_names_the_layer(capsys):
    monitor = LossScaleMonitor(check_every=2)
    fit(16, [monitor], epochs=2)
    assert [(o.skipped_steps, o.loss_scale) for o in monitor.overflows] == [(2, 2.0**13), (2, 2.0**11)]
    assert [o.batch for o in monitor.overflows] == [10, 20]
    for overflow in monitor.overflows:
        assert overflow.layer.endswith("head") and overflow.weight.endswith("head/kernel")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and "2 steps skipped, loss scale 8192." in printed[0] and "head'" in printed[0]


def test_tensorboard_gets_the_scale(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tensor_util = pytest.importorskip("tensorboard.util.tensor_util")
    fit(16, [LossScaleMonitor(check_every=4, log_dir=tmp_path, verbose=0)], epochs=2)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    for name, last in (("loss_scale", 2.0**11), ("skipped_steps", 4)):
        points = events.Tensors(name)
        assert [point.step for point in points] == sorted(point.step for point in points)
        assert tensor_util.make_ndarray(points[-1].tensor_proto) == last
        assert points[-1].step == 20


def test_fit_without_a_loss_scale_gets_no_monitor():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert "loss_scale" not in model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0).history


def test_other_optimizers_are_left_alone():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    history = model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=[LossScaleMonitor(check_every=1)])
    assert "loss_scale" not in history.history
    with pytest.raises(ValueError, match="Expected check_every"):
        LossScaleMonitor(check_every=0)

"""Blame names the layer and the tensor that first overflows, exactly, and leaves training as it would have been."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_precision as kp
from keras_precision.report import replay

ROWS, BATCH = 48, 4
STEPS = ROWS // BATCH


@keras.saving.register_keras_serializable("blame")
class Apply(layers.Layer):
    """Applies a function of keras.ops."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def data(dtype="float32"):
    draw = np.random.default_rng(0)
    return draw.normal(size=(ROWS, 4)).astype(dtype), draw.normal(size=(ROWS, 2)).astype(dtype)


def network(policy="float32", optimizer=None, middle=None, loss="mse", noise=True, **compile_arguments):
    """A small network with dropout and a moving average, so that a replay that misses their states differs."""
    with kp.policy_scope(policy):
        x = inputs = keras.Input((4,))
        x = layers.Dense(8, name="first", kernel_initializer=keras.initializers.GlorotUniform(1))(x)
        if noise:
            x = layers.BatchNormalization(name="norm")(x)
            x = layers.Dropout(0.25, seed=3, name="drop")(x)
        if middle is not None:
            x = middle(x)
        outputs = layers.Dense(2, name="head", kernel_initializer=keras.initializers.GlorotUniform(2))(x)
        model = keras.Model(inputs, outputs, name="net")
    model.compile(optimizer or keras.optimizers.Adam(1e-2), loss, **compile_arguments)
    return model


def fit(model, x, y, *callbacks, **arguments):
    arguments = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0} | arguments
    return model.fit(x, y, callbacks=list(callbacks), **arguments)


def state(model):
    return [ops.convert_to_numpy(v.value) for v in [*model.variables, *model.optimizer.variables]]


def assert_same_state(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def blamed(model, x, y, watch=None, **arguments):
    """What a fit raises."""
    watch = watch or kp.BlameCallback(verbose=0)
    with pytest.raises(kp.NonFiniteError) as raised:
        fit(model, x, y, watch, **arguments)
    assert raised.value.blame is watch.blames[-1]
    assert str(raised.value) == str(watch.blames[-1])
    return watch.blames[-1]


@pytest.mark.parametrize("options", [{}, {"offload": True, "check_every": 2}, {"max_batch_bytes": 1}])
def test_a_healthy_run_is_the_same_with_it(options):
    plain, watched = network(), network()
    x, y = data()
    watch = kp.BlameCallback(verbose=0, **options)
    history, expected = fit(watched, x, y, watch), fit(plain, x, y)
    assert watch.blames == []
    assert history.history["loss"] == expected.history["loss"]
    assert_same_state(state(watched), state(plain))


@pytest.mark.parametrize("bad", [0, 1, 5, STEPS - 1])
def test_data_that_is_not_finite_is_named_and_the_state_before_it_is_kept(bad):
    x, y = data()
    x[bad * BATCH + 2, 1] = np.nan
    model = network()
    found = blamed(model, x, y)
    assert (found.first.kind, found.first.name, found.epoch, found.batch) == ("input", "x", 0, bad)
    assert (found.first.nans, found.first.infinities, found.first.elements) == (1, 0, BATCH * 4)
    assert found.first.largest_finite == np.nanmax(np.abs(x[bad * BATCH : (bad + 1) * BATCH]))
    assert f"batch {bad} of epoch 0" in str(found)
    expected = network()
    fit(expected, *data(), epochs=1, steps_per_epoch=bad) if bad else expected.optimizer.build(
        expected.trainable_variables
    )
    assert_same_state(state(model), state(expected))
    assert np.isfinite(fit(model, *data()).history["loss"]).all()  # goes on, without the callback in the way


def too_large(x):
    return x * 3e38


FAULTS = {
    "activation": (lambda: Apply(too_large, name="fault"), "activation", "fault"),
    # d sqrt(x^2) / dx is 0 / 0 where x is 0; the output is finite.
    "gradient": (
        lambda: Apply(lambda x: ops.sqrt(ops.square(x * 0)), name="fault"),
        "activation gradient",
        "first",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_layer_and_the_tensor_are_named(name):
    make, kind, layer = FAULTS[name]
    found = blamed(network(middle=make(), noise=False), *data())
    assert (found.first.kind, found.first.layer, found.batch) == (kind, layer, 0)


class LargestNormalized(layers.Layer):
    """Normalizes, and takes the maximum over an axis: its gradient is NaN if the two places compute other bits."""

    def build(self, shape):
        self.gamma = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.beta = self.add_weight(shape=(shape[-1],), initializer="zeros")

    def call(self, x):
        mean = ops.mean(x, -1, keepdims=True)
        inverse = ops.rsqrt(ops.mean((x - mean) ** 2, -1, keepdims=True) + 1e-3) * self.gamma
        return ops.max(x * inverse + (self.beta - mean * inverse) + 1, axis=1)


def test_a_maximum_of_what_is_computed_twice_is_no_false_alarm():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6, 4)), layers.Dense(5), LargestNormalized(), layers.Dense(2)])
    model.compile("sgd", "mse")
    x, y = np.random.default_rng(0).normal(size=(8, 6, 4)), np.ones((8, 2))
    assert kp.blame(model, x.astype("float32"), y) is None
    findings = kp.audit(model, x, y, policy="float32", verbose=0).findings
    assert [finding.message for finding in findings if finding.severity == "error"] == []


def test_the_largest_finite_value_is_exact():
    model = network(middle=Apply(lambda x: x * 1e38, name="fault"), noise=False)
    x, y = data()
    x[:BATCH] *= 10
    dense = model.get_layer("first")
    with np.errstate(over="ignore"):
        expected = ops.convert_to_numpy(dense(x[:BATCH])) * np.float32(1e38)
    found = blamed(model, x, y).first
    finite = np.isfinite(expected)
    assert (found.infinities, found.nans, found.elements) == ((~finite).sum(), 0, expected.size)
    assert 0 < found.infinities < found.elements
    assert found.largest_finite == np.abs(expected[finite]).max()


def test_a_loss_that_is_not_finite_is_named():
    def logarithm(y_true, y_pred):
        return ops.mean(ops.log(y_pred * 0), axis=-1)

    found = blamed(network(loss=logarithm, noise=False), *data())
    assert (found.first.kind, found.first.layer) == ("loss", "net")
    assert found.first.infinities == 1


def test_weights_that_fit_was_given_are_named():
    model = network()
    model.get_layer("head").set_weights([np.full((8, 2), np.inf), np.zeros(2)])
    found = blamed(model, *data())
    assert (found.first.kind, found.first.layer, found.first.name) == ("weight", "head", "kernel")


def test_a_weight_that_its_compute_dtype_cannot_hold_is_named():
    model = network("mixed_float16", noise=False)
    model.get_layer("head").set_weights([np.full((8, 2), 1e5), np.zeros(2)])
    watch = kp.BlameCallback(verbose=0)
    fit(model, *data(), watch, epochs=1)
    found = watch.blames[0]
    assert (found.first.kind, found.first.layer, found.first.dtype) == ("weight", "head", "float16")
    assert found.first.infinities == 16


def test_an_update_that_overflows_is_named():
    model = network(optimizer=keras.optimizers.SGD(3e38), noise=False)
    x, y = data()
    found = blamed(model, x, 10 * y)
    assert (found.first.kind, found.batch) == ("update", 0)
    assert found.ruined.endswith(found.first.name)
    assert_same_state(state(model)[:4], state(network(optimizer="sgd", noise=False))[:4])


@pytest.mark.parametrize("arguments", [{}, {"raises": True}])
def test_skipped_steps_are_told_and_training_goes_on_as_without(arguments):
    def scaled():
        return network("mixed_float16", kp.scaling.LossScaleOptimizer("adam", initial_scale=2.0**23), noise=False)

    x, y = data()
    model, plain = scaled(), scaled()
    watch = kp.BlameCallback(verbose=0, check_every=4, **arguments)
    if arguments:
        with pytest.raises(kp.NonFiniteError, match="loss was multiplied by 8.38861e"):
            fit(model, x, y, watch)
        assert float(model.optimizer.loss_scale) == 2.0**23  # the step has not been
        return
    fit(model, x, y, watch)
    fit(plain, x, y)
    assert_same_state(state(model), state(plain))
    assert 1 <= len(watch.blames) <= 3
    first = watch.blames[0]
    assert (first.batch, first.loss_scale, first.was_skipped, first.ruined) == (0, 2.0**23, True, None)
    assert first.first.kind.endswith("gradient")
    assert first.first.dtype == "float16"
    assert first.first.largest_finite <= 65504 == first.limit


def test_a_moving_average_that_loss_scaling_does_not_save_is_told():
    x, y = data()
    x[4 * BATCH] = 6e4
    model = network("mixed_float16")
    found = blamed(model, x, y)
    assert (found.batch, found.was_skipped) == (4, True)
    assert found.ruined.startswith("norm/moving_")
    assert found.first.kind == "activation"
    assert all(np.isfinite(v).all() for v in state(model))


def rows(x, y, weights):
    for start in range(0, ROWS, BATCH):
        part = slice(start, start + BATCH)
        yield x[part], y[part], weights[part]


@pytest.mark.parametrize(
    ("compile_arguments", "fit_arguments"),
    [
        ({"steps_per_execution": 5}, {}),
        ({"run_eagerly": True}, {"epochs": 1}),
        ({}, {"generator": True, "epochs": 1, "steps_per_epoch": STEPS}),
    ],
)
def test_every_way_to_run_steps(compile_arguments, fit_arguments):
    x, y = data()
    weights = np.ones(ROWS, "float32")
    weights[7 * BATCH + 1] = np.inf
    model = network(**compile_arguments)
    if fit_arguments.pop("generator", False):
        found = blamed(model, rows(x, y, weights), None, batch_size=None, **fit_arguments)
    else:
        found = blamed(model, x, y, sample_weight=weights, **fit_arguments)
    assert (found.first.kind, found.first.name, found.batch) == ("input", "sample_weight", 7)


def test_a_model_without_targets_that_adds_its_loss():
    class Adds(layers.Layer):
        def call(self, x):
            self.add_loss(ops.mean(ops.exp(x * 1e4)))
            return x

    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), Adds()])
    model.compile("sgd")
    found = blamed(model, data()[0], None, epochs=1)
    assert found.first.kind == "loss"


def test_it_stops_after_so_many_and_gives_the_model_its_function_back():
    model = network("mixed_float16", kp.scaling.LossScaleOptimizer("adam", initial_scale=2.0**24), noise=False)
    watch = kp.BlameCallback(verbose=0, check_every=1, max_blames=1)
    fit(model, *data(), watch)
    assert len(watch.blames) == 1
    assert type(model.train_function).__name__ == "function"

    class Fails(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyError("interrupted")

    with pytest.raises(KeyError, match="interrupted"):
        fit(model, *data(), kp.BlameCallback(verbose=0), Fails())
    assert type(model.train_function).__name__ == "function"


def test_a_step_that_does_not_fail_again_is_said_to(monkeypatch):
    failures = iter([True])
    stock = replay.Replay.look

    def look(self):
        seen = stock(self)
        return seen._replace(nonfinite="net/w") if len(self.batches) > 2 and next(failures, False) else seen

    monkeypatch.setattr(replay.Replay, "look", look)
    with pytest.raises(kp.NonFiniteError, match="Trained on again, they gave finite values") as raised:
        fit(network(), *data(), kp.BlameCallback(verbose=0, check_every=4))
    assert raised.value.blame is None


def test_it_prints_what_it_tells(capsys):
    model = network("mixed_float16", kp.scaling.LossScaleOptimizer("adam", initial_scale=2.0**24), noise=False)
    watch = kp.BlameCallback()
    fit(model, *data(), watch, epochs=1)
    assert str(watch.blames[0]) in capsys.readouterr().out
    assert watch.blames[0].to_dict()["first"]["layer"] == watch.blames[0].first.layer


def test_blame_of_a_batch_leaves_the_model_alone():
    model = network()
    x, y = data()
    fit(model, x, y, epochs=1)
    before, classes = state(model), [type(layer) for layer in model.layers]
    random = np.random.get_state()[1].copy()
    assert kp.blame(model, x, y) is None
    found = kp.blame(model, x * np.float32(1e38), y, sample_weight=np.ones(ROWS))
    assert found.first.kind == "activation"
    assert found.batch is None
    assert_same_state(state(model), before)
    assert [type(layer) for layer in model.layers] == classes
    assert (np.random.get_state()[1] == random).all()


@pytest.mark.parametrize("name", ["check_every", "max_batch_bytes", "max_blames"])
@pytest.mark.parametrize("value", [0, True, 1.5, "8"])
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ValueError, match=f"Expected {name} to be an int >= 1. Received: {name}="):
        kp.BlameCallback(**{name: value})


def test_a_model_that_is_not_compiled_is_refused():
    with pytest.raises(ValueError, match="Call model.compile"):
        kp.blame(keras.Sequential([keras.Input((1,)), layers.Dense(1)]), np.zeros((1, 1)))


REPLICAS = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import keras
import numpy as np

if keras.backend.backend() == "jax":
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    scope = __import__("contextlib").nullcontext()
else:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
import keras_precision as kp

with scope:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.BatchNormalization()])
    model.compile("adam", "mse")
x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
x[44, 2] = np.inf
try:
    model.fit(x, x[:, :1].repeat(8, 1), batch_size=8, shuffle=False, verbose=0, callbacks=[kp.BlameCallback(verbose=0)])
except kp.NonFiniteError as e:
    assert all(np.isfinite(w).all() for w in model.get_weights())
    print(e.blame.batch, e.blame.first.kind, e.blame.first.infinities, e.blame.first.elements)
"""


def test_replicas():
    root = Path(__file__).parent.parent.parent
    run = [sys.executable, "-c", REPLICAS]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "input", "1", "32"]

"""Replicas decide alike, and the examples run; each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TWO_DEVICES = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"

MIRRORED = """
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras

from keras_precision.scaling import LossScaleOptimizer

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    weight = keras.Variable(np.ones((2,)), dtype="float32")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), 8.0)
    optimizer.build([weight])


@tf.function
def step(bad_replica):
    def replica_step():
        here = tf.distribute.get_replica_context().replica_id_in_sync_group
        loss = optimizer.scale_loss(tf.constant(1.0))
        optimizer.apply([tf.fill((2,), tf.where(here == bad_replica, np.inf, loss))], [weight])

    strategy.run(replica_step)


expected = 1.0
for bad in (-1, 0, 1, -1):
    step(tf.constant(bad))
    expected -= 0.5 * 2 * (bad < 0)  # the sum of two replicas' gradients of 1
    for replica in strategy.experimental_local_results(weight.value):
        np.testing.assert_array_equal(replica, [expected] * 2)
assert optimizer.get_scale() == 2.0, optimizer.get_scale()
assert int(optimizer.skipped_steps) == 2
assert int(optimizer.iterations.numpy()) == 2
"""

SHARDED = """
import jax
import keras
import numpy as np

from keras_precision.scaling import LossScaleOptimizer

assert len(jax.devices()) == 2
results = []
for distribution in (None, keras.distribution.DataParallel()):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, dtype="mixed_float16")])
    model.compile(LossScaleOptimizer(keras.optimizers.Adam(0.1), 2.0**24, max_consecutive_skips=None), "mse")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 4)).astype("float32")
    model.fit(x, x[:, 0], batch_size=8, epochs=3, verbose=0, shuffle=False)
    assert 0 < int(model.optimizer.skipped_steps) < 16
    results.append([model.optimizer.get_scale(), int(model.optimizer.skipped_steps), *model.get_weights()])
for one, two in zip(*results):
    np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-3)  # float16 rounds 2**-11; two devices sum in other order
"""

LOW_MIRRORED = """
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras

from keras_precision.optimizers import LowPrecision

rng = np.random.default_rng(0)
gradients = rng.standard_normal((20, 2, 64)).astype("float32")
start = rng.standard_normal(64)


def train(strategy, rounding):
    with strategy.scope():
        weight = keras.Variable(start, dtype="bfloat16")
        optimizer = LowPrecision(keras.optimizers.AdamW(0.01), rounding)
        optimizer.build([weight])

    @tf.function
    def step(gradient):
        def replica_step(gradient):
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            parts = gradient[here : here + 1] if strategy.num_replicas_in_sync == 2 else gradient
            optimizer.apply([tf.reduce_sum(parts, 0)], [weight])

        strategy.run(replica_step, args=(gradient,))

    for gradient in gradients:
        step(tf.constant(gradient))
    return [value.numpy().astype("float32") for value in strategy.experimental_local_results(weight.value)]


for rounding in ("stochastic", "nearest", "kahan"):
    one = train(tf.distribute.get_strategy(), rounding)
    two = train(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), rounding)
    assert len(one) == 1 and len(two) == 2
    np.testing.assert_array_equal(two[0], two[1])  # the same bits on each replica
    np.testing.assert_array_equal(two[0], one[0])  # a sum of two gradients is exact in any order
    assert np.abs(one[0] - start).max() > 0.05
"""

LOW_SHARDED = """
import jax
import keras
import numpy as np

import keras_precision as kp

assert len(jax.devices()) == 2
rng = np.random.default_rng(0)
x = rng.standard_normal((64, 4)).astype("float32")
results = {}
for rounding in ("stochastic", "nearest", "kahan"):
    devices = keras.distribution.DeviceMesh((2,), ["model"])
    layouts = keras.distribution.LayoutMap(devices)
    layouts[".*kernel"] = (None, "model")
    parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="model")
    for distribution in (None, keras.distribution.DataParallel(), parallel):
        keras.distribution.set_distribution(distribution)
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, dtype="bfloat16")])
        model.compile(kp.optimizers.LowPrecision(keras.optimizers.Adam(0.05), rounding), "mse")
        model.fit(x, np.tile(x, (1, 2)), batch_size=8, epochs=3, verbose=0, shuffle=False)
        kernel = model.layers[0].kernel.value
        if distribution is parallel:
            assert tuple(kernel.sharding.spec) == (None, "model"), kernel.sharding
        elif distribution is not None:
            replicas = [np.asarray(shard.data, "float32") for shard in kernel.addressable_shards]
            assert len(replicas) == 2
            np.testing.assert_array_equal(replicas[0], replicas[1])
        results.setdefault(rounding, []).append(np.asarray(kernel, "float32"))
    for other in results[rounding][1:]:
        # Two devices sum gradients in another order: some weights round the other way, by 2**-8 of their size.
        np.testing.assert_allclose(other, results[rounding][0], rtol=0.05, atol=0.02)
"""

FLOAT64 = """
import keras
import numpy as np

import keras_precision as kp

kp.hardware.enable_float64()
kp.set_global_policy("64-true")
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)])
model.compile(keras.optimizers.SGD(0.125), "mse")
assert type(model.optimizer) is keras.optimizers.SGD
x = np.random.default_rng(0).standard_normal((8, 3)).astype("float32").astype("float64")  # fit gives JAX float32 data
y = (x[:, :1] ** 2).astype("float32").astype("float64")
w, b, v, c = [a.astype("float64") for a in model.get_weights()]
model.fit(x, y, batch_size=8, epochs=3, verbose=0, shuffle=False)
for _ in range(3):
    h = np.maximum(x @ w + b, 0)
    d = 2 * (h @ v + c - y) / len(x)
    e = (d @ v.T) * (h > 0)
    w, b, v, c = w - 0.125 * x.T @ e, b - 0.125 * e.sum(0), v - 0.125 * h.T @ d, c - 0.125 * d.sum(0)
for ours, exact in zip(model.get_weights(), (w, b, v, c), strict=True):
    assert ours.dtype == "float64"
    np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-14)
"""


def run(arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_mirrored_replicas_skip_together(backend):
    if backend != "tensorflow":
        pytest.skip("tf.distribute is TensorFlow's")
    run(["-c", MIRRORED])


def test_data_parallel_devices_skip_together(backend):
    if backend != "jax":
        pytest.skip("keras.distribution runs on JAX")
    run(["-c", SHARDED], XLA_FLAGS=TWO_DEVICES)


def test_mirrored_replicas_round_alike(backend):
    if backend != "tensorflow":
        pytest.skip("tf.distribute is TensorFlow's")
    run(["-c", LOW_MIRRORED])


def test_distributed_devices_round_alike(backend):
    if backend != "jax":
        pytest.skip("keras.distribution runs on JAX")
    run(["-c", LOW_SHARDED], XLA_FLAGS=TWO_DEVICES)


def test_float64_trains_in_float64():
    run(["-c", FLOAT64])


def test_example(backend):
    printed = run([str(ROOT / "examples" / f"loss_scale_{backend}.py")])
    losses = [float(line.split()[3]) for line in printed.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.1 * losses[0]
    assert "8 steps were skipped" in printed

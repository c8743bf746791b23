"""Replicas decide alike, and the examples run; each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

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
    run(["-c", SHARDED], XLA_FLAGS="--xla_force_host_platform_device_count=2")


def test_example(backend):
    printed = run([str(ROOT / "examples" / f"loss_scale_{backend}.py")])
    losses = [float(line.split()[3]) for line in printed.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.1 * losses[0]
    assert "8 steps were skipped" in printed

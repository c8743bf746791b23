"""Programs that are traced where the default device is an NVIDIA GPU, and run or exported elsewhere."""

import keras
import numpy as np
import pretended
import pytest
from keras import ops

import keras_precision as kp

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")

POLICIES = ("nf4", "int4-dq", "int8-weight-only", "int8", "llm-int8", "float8", "float8/row", "float8/delayed")
ROWS = (1, 64, 256)  # each by another kernel


def of_layer(mode, dtype):
    """A function of x (rows, 128) that gives what a layer returns and the gradient of its sum."""
    import jax

    policy = kp.get(f"{mode}_from_{dtype}")
    if mode.startswith("float8"):
        policy = kp.QuantizedFloat8DTypePolicy(mode, dtype, min_features=16)
    keras.utils.set_random_seed(0)
    layer = keras.layers.Dense(128, dtype=policy)
    layer.build((None, 128))
    return jax.value_and_grad(lambda x: ops.sum(layer(x) ** 2))


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("mode", POLICIES)
def test_what_a_gpus_process_computes_on_a_cpu(monkeypatch, mode, hopper):
    import jax

    dtype = "bfloat16" if hopper else "float32"
    x = np.random.default_rng(0).standard_normal((max(ROWS), 128), dtype="float32").astype(dtype)
    expected = [jax.jit(of_layer(mode, dtype))(x[:rows]) for rows in ROWS]
    pretended.with_nvidia_as_default(monkeypatch, hopper=hopper)
    function = of_layer(mode, dtype)
    for rows, wanted in zip(ROWS, expected, strict=True):
        for found, own in zip(jax.jit(function)(x[:rows]), wanted, strict=True):
            np.testing.assert_allclose(ops.cast(found, "float32"), ops.cast(own, "float32"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", POLICIES)
def test_what_a_gpus_process_exports(monkeypatch, mode):
    """Kernels for a GPU, operations for others."""
    import jax

    pretended.with_nvidia_as_default(monkeypatch)
    traced = jax.jit(of_layer(mode, "bfloat16")).trace(jax.ShapeDtypeStruct((64, 128), "bfloat16"))
    for platform, has_kernels in (("cuda", True), ("tpu", False), ("cpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("xla.gpu.triton" in text) == has_kernels


def test_arrays_of_another_device_are_multiplied_there(monkeypatch):
    """Outside of a program, where they say where they are."""
    from keras_precision.kernels import device

    monkeypatch.setattr(device, "platform", lambda: "gpu")
    found = device.on_nvidia(lambda x, scale: 0, lambda x, scale: x * scale)(ops.ones(3), scale=2)
    np.testing.assert_array_equal(found, 2 * np.ones(3))

"""Functions of rows run in loops and in kernels, the latter interpreted, against the same function of all rows."""

import types

import keras
import numpy as np
import pytest
from keras import ops
from row_runners import RUNNERS

from keras_precision.kernels import rows
from keras_precision.kernels.compiled import compiled

pytestmark = pytest.mark.skipif(not RUNNERS, reason="runs on two backends")
on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")
ROW_SHAPES = [(256,), (256,), (), (256,)]  # of what `step` changes and reads
TABLE = np.linspace(-1, 1, 256).astype("float32") ** 3


@pytest.fixture(params=RUNNERS)
def runner(request, monkeypatch):
    monkeypatch.setitem(rows._RUNNERS, "cpu", RUNNERS[request.param])


def step(changed, read, scalars, target):
    """A weight, codes with a scale a row, and what is added where a flag says so."""
    weight, codes, scale = changed
    rate, flag = scalars
    value = target.look_up(TABLE, codes) * scale[:, None] + read[0]
    greatest = ops.max(ops.abs(value), axis=-1)
    new = ops.cast(value / greatest[:, None] * 127 + 127.5, "uint8")
    return [weight - rate * value * ops.cast(flag, "float32"), new, greatest]


@pytest.mark.parametrize("n_rows", [1, 3, 8, 517, 1000, 1541])
@pytest.mark.parametrize("flag", [True, False])
def test_all_rows_are_replaced(runner, n_rows, flag):
    draw = np.random.default_rng(n_rows)
    weight, gradient = draw.standard_normal((2, n_rows, 256), dtype="float32")
    codes, scale = draw.integers(0, 256, (n_rows, 256)).astype("uint8"), draw.uniform(1, 2, n_rows).astype("float32")
    changed, scalars = [weight, codes, scale], [np.float32(0.1), np.bool_(flag)]
    run = compiled(lambda *x: rows.replaced(step, x[:3], x[3:4], ROW_SHAPES, x[4:], [TABLE]))
    expected = step(changed, [gradient], scalars, rows.Target(lambda table, codes: table[codes.astype("int32")]))
    for found, wanted in zip(run(*changed, gradient, *scalars), expected, strict=True):
        found, wanted = ops.convert_to_numpy(found), ops.convert_to_numpy(wanted)
        assert found.dtype == wanted.dtype
        if found.dtype == "uint8":  # a number near a whole one may be cut to either side
            assert (np.abs(np.asarray(found, int) - wanted) <= 1).all() and (found == wanted).mean() > 0.999
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@on_jax
@pytest.mark.parametrize("keep", [True, False])
def test_everything_stays_where_told(runner, keep):
    import jax
    import ml_dtypes

    draw = np.random.default_rng(0)
    weight = draw.standard_normal((300, 256), dtype="float32")
    codes = draw.integers(0, 120, (300, 256)).astype("uint8")
    float8 = codes.view(ml_dtypes.float8_e4m3fn)

    def step(changed, read, scalars, target):
        weight, codes, float8 = changed
        return [weight * np.nan, codes + codes.dtype.type(1), (float8.astype("float32") + 500).astype(float8.dtype)]

    run = jax.jit(lambda changed, keep: rows.replaced(step, changed, [], [(256,)] * 3, [], [], keep))
    found = run([weight, codes, float8], np.bool_(keep))
    assert [x.dtype for x in found] == [weight.dtype, codes.dtype, float8.dtype]
    same = [
        np.array_equal(np.asarray(x).view("uint8"), y.view("uint8")) for x, y in zip(found, (weight, codes, float8))
    ]
    assert same == [keep] * 3


def test_float8_stays_what_it_is(runner):
    import ml_dtypes

    codes = np.arange(256, dtype="uint8").view(ml_dtypes.float8_e4m3fn)[None].repeat(300, axis=0)
    weight = np.zeros((300, 256), "float32")
    run = compiled(lambda w, c: rows.replaced(lambda changed, *_: changed, [w, c], [], [(256,)] * 2, [], []))
    found = ops.convert_to_numpy(run(weight, ops.convert_to_tensor(codes))[1])
    assert found.dtype == codes.dtype
    same = np.asarray(found).view("uint8") == codes.view("uint8")
    assert (same | np.isnan(codes.astype("float32"))).all()


def test_runs_only_where_it_can_be_compiled():
    assert not rows.can_run(ops.zeros(3))
    assert compiled(lambda x: x + rows.can_run(x))(np.zeros(3))[0] == 1


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends have no graphs of their own")
def test_runs_in_graphs_without_a_strategy():
    import tensorflow as tf

    found = []
    tf.function(lambda x: found.append(rows.can_run(x)), input_signature=[tf.TensorSpec((None,))])(tf.zeros(3))
    tf.function(lambda x: found.append(rows.can_run(x)))(tf.zeros(3))
    compiled(lambda x: tf.cond(x[0] > 0, lambda: found.append(rows.can_run(x)) or x, lambda: x))(np.zeros(3))
    slices = tf.IndexedSlices(tf.zeros((1, 3)), tf.constant([0]), (2, 3))
    compiled(lambda x: found.append(rows.can_run(slices)) or x)(np.zeros(3))
    with tf.distribute.OneDeviceStrategy("CPU").scope():
        compiled(lambda x: found.append(rows.can_run(x)) or x)(np.zeros(3))
    assert found == [False, True, True, False, False]


@on_jax
@pytest.mark.parametrize(
    "platform, capability, runner",
    [
        ("gpu", "9.0", rows._by_kernel),
        ("gpu", "12.0", rows._by_kernel),
        ("gpu", "7.5", None),
        ("gpu", "gfx942", None),
        ("cpu", "", rows._on_cpu),
        ("tpu", "", None),
    ],
)
def test_the_device_decides(platform, capability, runner, monkeypatch):
    import jax

    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert rows._runner() is runner


@on_jax
def test_a_device_that_is_set_counts():
    import jax

    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            assert rows._runner() is rows._on_cpu

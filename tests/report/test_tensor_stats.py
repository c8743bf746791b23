"""Statistics of tensors against a slow reference in NumPy's float64."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_precision import dtypes
from keras_precision.report import tensor_stats
from keras_precision.report.tensor_stats import count, difference, stats

NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

# Normal float32 values and 0: CPUs may take smaller ones for 0.
VALUES = st.lists(
    st.one_of(
        st.just(0.0),
        st.floats(2.0**-120, 2.0**126, width=32),
        st.floats(-(2.0**20), -(2.0**-30), width=32),
        st.sampled_from([65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 2.0**-14, -(2.0**-15), 3.3895314e38]),
    ),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(values=VALUES, dtype=st.sampled_from(sorted(NUMPY)), scale=st.sampled_from([1.0, 2.0**10]))
def test_shares_are_those_of_rounding_each_value(values, dtype, scale):
    values = np.asarray(values, "float32")
    exact = values.astype("float64") * scale
    exact = exact[np.abs(exact) < 2.0**128] if scale > 1 else exact
    values = values[np.abs(values.astype("float64") * scale) < 2.0**128]
    if not len(values):
        return
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.abs(exact).astype("float32").astype(NUMPY[dtype]).astype("float64")
    nonzero = exact != 0
    made = stats(count(ops.convert_to_tensor(values), dtype, scale), dtype)
    present = max(nonzero.sum(), 1)
    assert made.elements == len(values)
    assert made.zeros == (~nonzero).sum()
    assert made.overflow == pytest.approx(np.isinf(rounded).sum() / present)
    assert made.underflow == pytest.approx(((rounded == 0) & nonzero).sum() / present)
    tiny = dtypes.info(dtype).tiny
    assert made.subnormal == pytest.approx(((rounded != 0) & (np.abs(exact) < tiny)).sum() / present)
    assert made.largest == np.abs(exact).max()
    exponents = [math.frexp(v)[1] - 1 for v in np.abs(exact[nonzero])]
    assert made.histogram == {e: exponents.count(e) for e in sorted(set(exponents))}


def test_values_that_are_not_finite_overflow_and_are_not_the_largest():
    made = stats(count(ops.convert_to_tensor(np.asarray([np.inf, np.nan, 3.0, 0.0], "float32")), "float16"), "float16")
    assert (made.elements, made.zeros, made.largest, made.histogram) == (4, 1, 3.0, {1: 1})
    assert made.overflow == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_runs_on_an_accelerator_gives_the_same(backend, monkeypatch, dtype):
    if backend != "jax":
        pytest.skip("on TensorFlow NumPy counts, wherever the tensor is")
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.normal(size=500) * 10.0 ** draw.integers(-20, 20, 500), [0.0, np.inf, np.nan]])
    tensor = ops.convert_to_tensor(values.reshape(1, -1), "bfloat16")
    reference = ops.cast(tensor, "float32") * 1.01
    on_host = count(tensor, dtype, 4.0), difference(tensor, reference)
    monkeypatch.setattr(tensor_stats, "_is_on_accelerator", lambda: True)
    tensor_stats._in_place.cache_clear()
    on_device = count(tensor, dtype, 4.0), difference(tensor, reference)
    tensor_stats._in_place.cache_clear()
    assert stats(on_device[0], dtype) == stats(on_host[0], dtype)
    assert on_device[1][:2] == on_host[1][:2]
    assert on_device[1].sqnr_db == pytest.approx(on_host[1].sqnr_db, abs=0.01)


def test_counts_add_up():
    first, second = np.asarray([1.0, 1e6], "float32"), np.asarray([0.0, 1e-9], "float32")
    added = count(ops.convert_to_tensor(first), "float16") + count(ops.convert_to_tensor(second), "float16")
    together = count(ops.convert_to_tensor(np.concatenate([first, second])), "float16")
    assert stats(added, "float16") == stats(together, "float16")


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_sqnr_is_that_of_float64(magnitude):
    draw = np.random.default_rng(0)
    reference = (draw.normal(size=1000) * magnitude).astype("float32")
    values = (reference * (1 + 0.01 * draw.normal(size=1000))).astype("float32")
    noise = values.astype("float64") - reference
    expected = 10 * np.log10((reference.astype("float64") ** 2).sum() / (noise**2).sum())
    made = difference(ops.convert_to_tensor(values), ops.convert_to_tensor(reference))
    assert made.sqnr_db == pytest.approx(expected, abs=0.01)
    assert difference(ops.convert_to_tensor(reference), ops.convert_to_tensor(reference)).sqnr_db is None


def test_values_that_are_not_finite_are_counted_apart():
    values = np.asarray([1.0, np.inf, np.nan, 2.0], "float32")
    made = difference(ops.convert_to_tensor(values), ops.convert_to_tensor(np.ones(4, "float32")))
    assert (made.nonfinite, made.elements, made.noise) == (2, 4, 1.0)

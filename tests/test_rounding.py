"""Rounding to 16 bits against exact arithmetic."""

import hypothesis
import hypothesis.strategies as st
import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_precision import rounding

DTYPES = ("bfloat16", "float16")
DRAWS = 100_000
# Between two neighbours of each dtype: normal, across a power of two, subnormal, below the smallest subnormal.
BETWEEN = {
    "bfloat16": [1.003, 1.9999, 3e38, 1e-30, -0.3, -7.01],
    "float16": [1.0003, 1.99999, 65503.0, 3.1e-5, 2.9e-7, 1.3e-8, -0.3, -2.9e-7],
}


def rounded(x, dtype, seed=0):
    x = np.asarray(x, "float32")
    return ops.convert_to_numpy(rounding.stochastic(ops.convert_to_tensor(x), dtype, rounding.random_bits(x.shape, seed)))


def neighbours(value, dtype):
    """Returns the largest value of `dtype` that is at most `value`, and the next one up."""
    near = np.asarray(value, "float32").astype(dtype)
    step = np.nextafter(near, np.asarray(np.inf, dtype)) if float(near) <= value else np.nextafter(near, np.asarray(-np.inf, dtype))
    return sorted(float(v) for v in (near, step))


@pytest.mark.parametrize("dtype, value", [(dtype, value) for dtype in DTYPES for value in BETWEEN[dtype]])
def test_stochastic_rounding_is_unbiased(dtype, value):
    value = float(np.float32(value))
    low, high = neighbours(value, dtype)
    draws = rounded(np.full(DRAWS, value), dtype).astype("float64")
    assert set(np.unique(draws)) <= {low, high}
    probability = (value - low) / (high - low)
    # A mean of n draws of a two-valued variable has standard error (high - low) sqrt(p (1 - p) / n).
    error = (high - low) * np.sqrt(probability * (1 - probability) / DRAWS)
    assert abs(draws.mean() - value) <= 4 * error


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_the_dtype_nan_and_inf_pass(dtype):
    info = ml_dtypes.finfo(dtype)
    # XLA and TensorFlow flush float32's subnormals, which bfloat16's are, to zero on some CPUs: left out there.
    tiny = float(info.tiny) if dtype == "bfloat16" else float(info.smallest_subnormal)
    exact = np.array([0.0, -0.0, 1.0, -1.5, info.max, -float(info.max), tiny, np.inf, -np.inf, np.nan], "float32")
    result = rounded(np.tile(exact, 100), dtype).astype("float32").reshape(100, -1)
    np.testing.assert_array_equal(result, np.tile(exact, (100, 1)))
    assert np.signbit(result[:, 1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_largest_finite_value_it_stays_finite(dtype):
    largest = float(ml_dtypes.finfo(dtype).max)
    beyond = np.nextafter(np.float32(largest), np.float32(np.inf))
    assert set(rounded(np.full(1000, beyond), dtype).astype("float64")) == {largest}
    assert set(rounded(np.full(1000, -beyond), dtype).astype("float64")) == {-largest}


@hypothesis.given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=20), st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=50, deadline=None)
def test_each_draw_is_a_neighbour(values, seed):
    values = [0.0 if abs(value) < 2.0**-126 else value for value in values]
    values += [0.0] * (20 - len(values))  # JAX compiles each length anew
    for dtype in DTYPES:
        for value, draw in zip(values, rounded(values, dtype, seed).astype("float64"), strict=True):
            assert draw in neighbours(value, dtype)


def test_draws_depend_on_position_and_seed_only():
    first, again, other = (ops.convert_to_numpy(rounding.random_bits((1000,), seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.99
    tail = ops.convert_to_numpy(rounding.random_bits((500,), 1, offset=500))
    np.testing.assert_array_equal(first[500:], tail)


def test_random_bits_are_uniform_and_neighbours_independent():
    bits = ops.convert_to_numpy(rounding.random_bits((DRAWS,), 7)).astype("uint32")
    ones = np.unpackbits(bits.view("uint8")).reshape(DRAWS, 32).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(DRAWS)  # the largest of 32, so 5 standard errors
    uniform = bits / 2.0**32 - 0.5
    correlation = (uniform[1:] * uniform[:-1]).mean() * 12
    assert abs(correlation) < 4 / np.sqrt(DRAWS)


def test_nearest_is_nearest_even():
    # 1 + 2**-8 lies halfway between bfloat16's 1 and 1 + 2**-7: the even one is 1.
    assert float(rounding.nearest(ops.full((), 1 + 2.0**-8), "bfloat16")) == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_kahan_keeps_what_nearest_loses(dtype):
    total = kept = ops.ones((), dtype)
    lost = ops.zeros((), dtype)
    for _ in range(1000):
        step = ops.full((), 1e-4)
        total = rounding.nearest(ops.cast(total, "float32") + step, dtype)
        kept, lost = rounding.kahan_add(kept, step, lost)
    assert float(total) == 1.0
    # One rounding of the total, of relative size eps / 2.
    assert abs(float(kept) - 1.1) <= 1.1 * float(ml_dtypes.finfo(dtype).eps) / 2 + 1e-4


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="Expected dtype in"):
        rounding.stochastic(ops.ones((1,)), "float32", rounding.random_bits((1,), 0))


@pytest.mark.default_xla
def test_stochastic_rounding_compiles(backend):
    x = np.linspace(-2, 2, 101).astype("float32")
    eager = rounded(x, "bfloat16")
    function = lambda value: rounding.stochastic(value, "bfloat16", rounding.random_bits((101,), 0))  # noqa: E731
    if backend == "jax":
        import jax

        compiled = jax.jit(function)(x)
    else:
        import tensorflow as tf

        compiled = tf.function(function, jit_compile=True)(tf.constant(x))
    np.testing.assert_array_equal(ops.convert_to_numpy(compiled), eager)
    assert keras.backend.standardize_dtype(compiled.dtype) == "bfloat16"


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_grid_is_the_cast_to_nearest(dtype):
    info = ml_dtypes.finfo(dtype)
    draw = np.random.default_rng(0)
    values = [
        draw.standard_normal(10_000) * 10.0 ** draw.integers(-9, 5, 10_000),
        np.asarray([info.max, info.tiny, info.smallest_subnormal], "float64"),
        np.array([65519.9, 65520.0, 1e5, 2.0**-25, 2.0**-25 * 1.001, 1.5 * 2.0**-24, 2.5 * 2.0**-24, 3e38, np.inf, np.nan]),
        np.float64(1) + np.arange(64) * 2.0**-10,  # ties between neighbours in both dtypes
        [0.0, -0.0],
    ]
    values = np.concatenate(values).astype("float32")
    if dtype == "bfloat16":  # float32's subnormals, which are bfloat16's, are flushed to zero on some CPUs
        values = values[(np.abs(values) >= float(info.tiny)) | (values == 0) | np.isnan(values)]
    values = np.concatenate([values, -values])
    on_grid = ops.convert_to_numpy(rounding.on_grid(ops.convert_to_tensor(values), dtype))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(on_grid, values.astype(dtype).astype("float32"))
    np.testing.assert_array_equal(np.signbit(on_grid), np.signbit(values))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads JAX's program")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_rounding_loses_is_not_read_off_a_cast_that_xla_may_drop(dtype):
    """With xla_allow_excess_precision, which GPUs use, XLA takes a cast to 16 bits and back as the identity."""
    import jax

    total, increment = np.ones(4, dtype), np.full(4, 1e-3, "float32")
    for program in (jax.make_jaxpr(rounding.kahan_add)(total, increment, total),):
        made_by = {outvar: eqn for eqn in program.eqns for outvar in eqn.outvars}
        casts = [eqn for eqn in program.eqns if eqn.primitive.name == "convert_element_type"]
        assert casts
        for eqn in casts:
            source = made_by.get(eqn.invars[0])
            assert source is None or source.primitive.name != "convert_element_type"

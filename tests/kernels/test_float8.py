"""Matmuls in 8-bit floating point against float64 arithmetic on rounded operands."""

import keras
import ml_dtypes
import numpy as np
import pretended
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_precision.kernels import cast_transpose, device, dispatch, float8

DTYPES = {float8.FORWARD: ml_dtypes.float8_e4m3fn, float8.GRADIENT: ml_dtypes.float8_e5m2}
LARGEST = {name: float(ml_dtypes.finfo(dtype).max) for name, dtype in DTYPES.items()}
on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")
draw = np.random.default_rng(0)
X, W = draw.standard_normal((32, 48), dtype="float32"), draw.standard_normal((48, 64), dtype="float32") * 0.1
G = draw.standard_normal((32, 64), dtype="float32") * 1e-4


def numbers(x):
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")), "float64")


def power_above(greatest, name):
    """The least power of two at which magnitudes are in range."""
    return np.exp2(np.ceil(np.log2(np.float64(greatest) / LARGEST[name])))


def values(x, name, axis=None):
    """What the codes of x stand for, a scale for each slice along `axis`, or one."""
    scale = power_above(np.abs(x).max(axis=axis, keepdims=axis is not None), name)
    return (x / scale).astype("float32").astype(DTYPES[name]).astype("float64") * scale


def products(function, x, w, upstream):
    """y, dx and dw of a function of x and w."""
    if keras.backend.backend() == "jax":
        import jax

        y, backward = jax.jit(lambda x, w: jax.vjp(function, x, w))(x, w)
        return y, *backward(upstream.astype(y.dtype))
    import tensorflow as tf

    with tf.GradientTape() as tape:
        x, w = tf.constant(x), tf.constant(w)
        tape.watch([x, w])
        y = function(x, w)
    return y, *tape.gradient(y, [x, w], tf.cast(upstream, y.dtype))


EXPECTED = {
    "tensor": lambda e4, e5: (
        values(X, e4) @ values(W, e4),
        values(G, e5) @ values(W, e4).T,
        values(X, e4).T @ values(G, e5),
    ),
    "row": lambda e4, e5: (
        values(X, e4, 1) @ values(W, e4, 0),
        values(G, e5, 1) @ values(W, e4, 1).T,
        values(X, e4, 0).T @ values(G, e5, 0),
    ),
}


@pytest.mark.parametrize("scaling", EXPECTED)
def test_products_are_those_of_rounded_operands(scaling):
    found = products(lambda x, w: float8.matmul(x, w, "float32", scaling), X, W, G)
    for result, expected in zip(found, EXPECTED[scaling](float8.FORWARD, float8.GRADIENT), strict=True):
        # Products of codes are exact, and 64 of them at most are added up in float32.
        np.testing.assert_allclose(numbers(result), expected, rtol=0, atol=64 * 2.0**-24 * np.abs(expected).max() * 8)


def test_scales_by_row_keep_small_rows():
    """One scale for all makes zeros of rows 2**-20 times the greatest; one for each keeps them as precise as others."""
    x = X * np.where(np.arange(32) % 2, 2.0**-20, 1.0)[:, None].astype("float32")
    by_tensor, by_row = (numbers(float8.matmul(x, W, "float32", scaling)) for scaling in ("tensor", "row"))
    assert not by_tensor[1::2].any()
    exact = x.astype("float64") @ W
    assert np.linalg.norm(by_row[1::2] - exact[1::2]) < 0.05 * np.linalg.norm(exact[1::2])


def test_results_have_the_dtypes_asked_for():
    x = ops.cast(X, "bfloat16")
    assert keras.backend.standardize_dtype(float8.matmul(x, W, "bfloat16").dtype) == "bfloat16"


@given(st.floats(0, 2.0**127, width=32, allow_subnormal=False), st.sampled_from(list(DTYPES)))
@settings(deadline=None, max_examples=50)
def test_scales_are_the_least_powers_of_two(greatest, name):
    scale = float(float8.scale_for(ops.convert_to_tensor(np.float32(greatest)), name))
    assert np.frexp(scale)[0] == 0.5 and greatest / scale <= LARGEST[name]
    assert scale == float8.SMALLEST_SCALE or greatest / scale > LARGEST[name] / 2 * (1 - 2.0**-23)


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_to_nearest_and_saturates(name):
    codes = np.arange(256, dtype="uint8").view(DTYPES[name]).astype("float32")
    codes = np.sort(codes[np.isfinite(codes)])
    between = (codes[1:] + codes[:-1]) / 2
    x = np.concatenate(
        [codes, between, np.nextafter(between, np.float32(1e9)), np.nextafter(between, np.float32(-1e9))]
    )
    found = numbers(float8.rounded(ops.convert_to_tensor(x * 4), 4.0, name))
    np.testing.assert_array_equal(found, x.astype(DTYPES[name]).astype("float64"))
    beyond = ops.convert_to_tensor(np.array([1e6, -1e6, np.inf, np.nan], "float32"))
    np.testing.assert_array_equal(
        numbers(float8.rounded(beyond, 1.0, name)), [*LARGEST[name] * np.array([1, -1, 1]), np.nan]
    )


@pytest.mark.parametrize(
    "name, unit, smallest", [(float8.FORWARD, 2.0**-4, 2.0**-10), (float8.GRADIENT, 2.0**-3, 2.0**-17)]
)
def test_rounding_is_within_its_bound(name, unit, smallest):
    x = draw.standard_normal(10_000, dtype="float32") * np.exp2(draw.uniform(-30, 0, 10_000)).astype("float32")
    scale = power_above(np.abs(x).max(), name)
    error = np.abs(numbers(float8.rounded(ops.convert_to_tensor(x), np.float32(scale), name)) * scale - x)
    assert (error <= np.maximum(unit * np.abs(x), scale * smallest)).all()
    assert error.max() > unit * np.abs(x).max() / 16  # the bound is not idle


@pytest.mark.parametrize("scaling", EXPECTED)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows(scaling, value):
    """Loss scaling must see an overflow in activations, weights or gradients."""
    for place in range(3):
        arrays = [X.copy(), W.copy(), G.copy()]
        arrays[place][3, 5] = value
        y, dx, dw = products(lambda x, w: float8.matmul(x, w, "float32", scaling), *arrays)
        for result, inputs in ((y, (0, 1)), (dx, (1, 2)), (dw, (0, 2))):
            assert np.isfinite(numbers(result)).all() == (place not in inputs)


@pytest.mark.parametrize("scaling", EXPECTED)
def test_an_empty_batch(scaling):
    y, dx, dw = products(lambda x, w: float8.matmul(x, w, "float32", scaling), X[:0], W, G[:0])
    assert tuple(y.shape) == (0, 64) and tuple(dx.shape) == (0, 48) and not numbers(dw).any()


def test_zeros_stay_zeros():
    for result in products(lambda x, w: float8.matmul(x, w, "float32"), X * 0, W, G * 0):
        assert not numbers(result).any()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_delayed_states_are_those_of_keras(length):
    """Scales and histories follow `keras.quantizers`' formulas over five steps; a skipped step's inf doesn't freeze them."""
    state = [(np.float32(1), np.zeros(length, "float32")) for _ in range(3)]
    expected = [tuple(map(ops.convert_to_tensor, pair)) for pair in state]
    tensors = [X, W, G]
    for step in range(5):
        x, w, g = (tensor * np.float32(1 + step) for tensor in tensors)
        flat = [part for pair in state for part in pair]
        found = gradients_of_states(x, w, g, flat)
        state = list(zip(found[::2], found[1::2], strict=True))
        for place, (tensor, name) in enumerate(
            zip((x, w, g), (float8.FORWARD, float8.FORWARD, float8.GRADIENT), strict=True)
        ):
            scale, history = expected[place]
            new = keras.quantizers.compute_float8_scale(ops.max(history), scale, LARGEST[name])
            expected[place] = new, keras.quantizers.compute_float8_amax_history(ops.convert_to_tensor(tensor), history)
            for one, other in zip(state[place], expected[place], strict=True):
                np.testing.assert_allclose(numbers(one), numbers(other), rtol=2.0**-22)
    frozen = [np.float32(1), np.array([np.inf, 44.8, np.nan], "float32")] * 3
    assert np.isclose(float(gradients_of_states(X, W, G, frozen)[0]), 0.1)


def gradients_of_states(x, w, upstream, flat):
    def function(*flat):
        return float8.matmul(x, w, "float32", "delayed", (flat[:2], flat[2:4], flat[4:]))

    if keras.backend.backend() == "jax":
        import jax

        return jax.vjp(function, *map(ops.convert_to_tensor, flat))[1](ops.convert_to_tensor(upstream))
    import tensorflow as tf

    flat = [tf.Variable(part) for part in flat]
    with tf.GradientTape() as tape:
        y = function(*map(ops.convert_to_tensor, flat))
    return tape.gradient(y, flat, upstream)


def test_delayed_products_are_those_of_keras_rounding():
    """With scales that fit, Keras's quantize-dequantize in float32 gives the same operands."""
    scales = [
        np.float32(np.abs(t).max() / LARGEST[n])
        for t, n in ((X, float8.FORWARD), (W, float8.FORWARD), (G, float8.GRADIENT))
    ]
    states = [(ops.convert_to_tensor(scale), ops.zeros((4,))) for scale in scales]
    found = products(lambda x, w: float8.matmul(x, w, "float32", "delayed", states), X, W, G)
    x, w, g = (
        numbers(keras.quantizers.quantize_and_dequantize(ops.convert_to_tensor(t), scale, name, "float32"))
        for t, scale, name in zip((X, W, G), scales, (float8.FORWARD, float8.FORWARD, float8.GRADIENT), strict=True)
    )
    for result, expected in zip(found, (x @ w, g @ w.T, x.T @ g), strict=True):
        # x / scale and x * (1 / scale) may fall on two sides of a tie: some of 4,608 codes differ by a unit.
        assert np.linalg.norm(numbers(result) - expected) < 5e-3 * np.linalg.norm(expected)


ROWS, COLUMNS = cast_transpose.LARGEST_TILE


@on_jax
@pytest.mark.parametrize("shape", [(2 * ROWS, 3 * COLUMNS), (3 * ROWS // 2, COLUMNS + COLUMNS // 8)], ids=str)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", DTYPES)
def test_the_kernel_gives_the_codes_and_their_transpose(name, dtype, by_row, shape):
    assert cast_transpose.can_run(shape)
    x = np.array(draw.standard_normal(shape) * 300, "float32")
    x[0, 0], x[1, 1], x[2, 2] = np.nan, np.inf, -np.inf
    x, scales = ops.cast(x, dtype), (np.float32(0.3), None)
    if by_row:
        scales = (
            draw.uniform(0.1, 9, (shape[0], 1)).astype("float32"),
            draw.uniform(0.1, 9, (1, shape[1])).astype("float32"),
        )
    codes, transposed, _ = cast_transpose.cast_transpose(x, *scales, name, LARGEST[name], interpret=True)
    expected, of_columns = (numbers(float8.rounded(x, scale, name)) for scale in (scales if by_row else scales[:1] * 2))
    np.testing.assert_array_equal(numbers(codes), expected)  # bits but for those of NaN
    np.testing.assert_array_equal(numbers(transposed), of_columns.T)


@on_jax
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("greatest, place", [(-3.5, (0, 0)), (1e30, (-1, -1)), (np.inf, (-1, 0)), (np.nan, (50, 200))])
def test_the_kernel_measures_the_greatest_magnitude(dtype, greatest, place):
    x = np.clip(draw.standard_normal((2 * ROWS, 3 * COLUMNS)), -3, 3)
    x[place] = greatest
    x, scale, name = ops.cast(x, dtype), np.float32(0.3), float8.FORWARD
    *_, found = cast_transpose.cast_transpose(x, scale, None, name, LARGEST[name], measures=True, interpret=True)
    assert found.shape == () and found.dtype == "float32"
    np.testing.assert_array_equal(found, np.abs(numbers(x)[place]))
    if not np.isnan(greatest):  # which XLA's own maximum passes over on a CPU
        assert found == float8.round_both(x, scale, None, name, True)[2]


@on_jax
def test_matrices_that_the_kernel_takes():
    for shape in ((ROWS * 3, COLUMNS), (ROWS * 3 + 16, COLUMNS), (16, 48)):
        assert cast_transpose.can_run(shape)
        assert not any(size % tile for size, tile in zip(shape, cast_transpose.tile_of(shape), strict=True))
    for shape in ((0, COLUMNS), (ROWS, 0), (ROWS * 3 + 1, COLUMNS), (ROWS, 8), (ROWS, COLUMNS * 2**16)):
        assert not cast_transpose.can_run(shape)


@pytest.fixture
def has_float8(monkeypatch):
    """Makes dispatch think that it is on a Hopper GPU."""
    pretended.on_nvidia(monkeypatch)


@on_jax
def test_matrix_units_multiply_all_three_products(has_float8):
    import jax

    x, w = jax.ShapeDtypeStruct((128, 256), "bfloat16"), jax.ShapeDtypeStruct((256, 384), "float32")

    def step(x, w):
        y, backward = jax.vjp(lambda x, w: float8.matmul(x, w, "bfloat16", steps=dispatch.float8_steps()), x, w)
        return backward(y)

    text = jax.jit(step).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == 3 and all(line.count("contracting_dims = [1] x [1]") == 1 for line in dots)  # the last axes
    kinds = ["f8E4M3FN" in line and "f8E5M2" in line for line in dots]
    assert kinds == [False, True, True] and all("xbf16>" in line.rpartition("->")[2] for line in dots)
    fast = ["allow_imprecise_accumulation = true" in line for line in dots]
    assert fast == [True, False, False]
    assert text.count("xla.gpu.triton") == 3  # x, w and the gradient, each once


@on_jax
@pytest.mark.parametrize("scaling, reads", [("tensor", True), ("row", True), ("delayed", False)])
def test_delayed_scaling_measures_as_it_rounds(has_float8, scaling, reads):
    """XLA reads the three matrices once more where their scales are made of themselves."""
    import jax

    states = ((1.0, np.zeros(4, "float32")),) * 3 if scaling == "delayed" else ((), (), ())
    x, w = jax.ShapeDtypeStruct((128, 256), "bfloat16"), jax.ShapeDtypeStruct((256, 384), "float32")

    def product(x, w):
        return float8.matmul(x, w, "bfloat16", scaling, states, dispatch.float8_steps())

    def step(x, w):
        y, backward = jax.vjp(product, x, w)
        return backward(y)

    text = jax.jit(step).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 3
    for shape in ("128x256xbf16", "256x384xf32", "128x384xbf16"):
        reduced = [line for line in text.splitlines() if "stablehlo.reduce(" in line and f"(tensor<{shape}>" in line]
        assert bool(reduced) == reads


@on_jax
def test_one_row_names_no_algorithm(has_float8):
    """XLA's program for it on a GPU raises "Unsupported dot precision algorithm"."""
    import jax

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 256), (256, 384))]
    function = jax.jit(lambda x, w: float8.matmul(x, w, "float32", steps=dispatch.float8_steps()))
    text = function.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.dot_general" in text and "accumulation" not in text


@on_jax
@pytest.mark.parametrize("dtype, bound", [("float32", 2.0**-20), ("bfloat16", 2.0**-7), ("float16", 2.0**-10)])
def test_matrix_units_and_emulation_agree(has_float8, monkeypatch, dtype, bound):
    """XLA multiplies float8 on a CPU too, where it takes no named algorithm."""
    import jax

    stock = jax.lax.dot_general

    def without_algorithm(*args, precision, **kwargs):
        return stock(*args, **kwargs)

    monkeypatch.setattr(jax.lax, "dot_general", without_algorithm)
    monkeypatch.setattr(device, "has_triton", lambda: False)
    x = ops.cast(X, dtype)
    found = products(lambda x, w: float8.matmul(x, w, dtype, steps=dispatch.float8_steps()), x, W, G)
    for result, expected in zip(found, products(lambda x, w: float8.matmul(x, w, dtype), x, W, G), strict=True):
        error = np.abs(numbers(result) - numbers(expected)).max()
        assert error <= bound * np.abs(numbers(expected)).max()


@on_jax
def test_no_kernel_under_a_distribution(has_float8, monkeypatch):
    monkeypatch.setattr(cast_transpose, "cast_transpose", None)
    mesh = keras.distribution.DeviceMesh((1,), ["data"], keras.distribution.list_devices()[:1])
    with keras.distribution.ModelParallel(layout_map=keras.distribution.LayoutMap(mesh)).scope():
        round_both = dispatch.float8_steps().round_both
        codes, transposed, greatest = round_both(ops.ones((64, 128)), np.float32(1), None, float8.FORWARD, True)
    assert codes.shape == (64, 128) and transposed.shape == (128, 64) and greatest == 1


def test_this_device_emulates():
    assert not dispatch.multiplies_float8() and dispatch.float8_steps() is float8.EMULATION

"""Products with the transposed stored weight, the kernel interpreted, against float64 arithmetic on the decoded weight."""

import dataclasses

import keras
import numpy as np
import pretended
import pytest
from stored_weights import UNIT, activations, numbers, scales_of, stored, tensors

from keras_precision.kernels import dispatch, measured, weight_only_transposed
from keras_precision.kernels.layout import Layout
from keras_precision.kernels.weight_only_transposed import TransposedTile

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")

NAMES = ("nf4", "fp4-dq", "int4", "int8-weight-only")
TILE = TransposedTile(16, 16, 16)
TF32 = 2.0**-11  # unit roundoff
# Even and odd, tiles' multiples and not, and less than a block, a tile or a byte.
SHAPES = [(128, 32), (77, 33), (1, 1)]


def multiplied(x, name, shape, dtype, tile=TILE):
    """By the kernel, interpreted."""
    codec, parts, weight = stored(name, *shape)
    arrays = parts["codes"], scales_of(parts), codec.layout(shape)
    return weight_only_transposed.transposed_product(x, *arrays, tile, dtype, interpret=True), weight


def assert_product(found, x, weight, dtype):
    """Within the documented bound."""
    x, n, unit = numbers(x), x.shape[-1], UNIT[dtype]
    of_operands = 2 * TF32 + TF32**2 if dtype == "float32" else unit
    exact = x @ weight.T
    bound = np.abs(x) @ np.abs(weight.T) * (of_operands + (n + 3) * 2.0**-24) + unit * np.abs(exact)
    assert found.dtype == dtype and found.shape == exact.shape
    assert (np.abs(numbers(found) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_any_shape(name, shape, dtype):
    x = activations(5, shape[1], dtype)
    found, weight = multiplied(x, name, shape, dtype)
    assert_product(found, x, weight, dtype)


@pytest.mark.parametrize("programs", [1, 3, 700])
@pytest.mark.parametrize("rows", [1, 16, 35])
def test_sums_of_several_programs_are_added(rows, programs):
    shape = (96, 300)
    x = activations(rows, shape[1], "bfloat16")
    found, weight = multiplied(x, "nf4", shape, "bfloat16", dataclasses.replace(TILE, programs=programs))
    assert_product(found, x, weight, "bfloat16")


@pytest.mark.parametrize("option", ["32", "256"])
def test_tiles_fit_blocks(option):
    shape, tile = (520, 48), TransposedTile(16, 64, 16)
    codec, _, _ = stored(f"nf4/{option}", *shape)
    assert tile.fitted(codec.layout(shape)).rows == min(64, int(option) // 2)
    x = activations(3, shape[1], "float16")
    found, weight = multiplied(x, f"nf4/{option}", shape, "float16", tile)
    assert_product(found, x, weight, "float16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_in_its_row(dtype, value):
    x = np.array(numbers(activations(3, 33, dtype)), "float32")
    x[1, 5] = value
    found = numbers(multiplied(keras.ops.cast(x, dtype), "nf4", (77, 33), dtype)[0])
    assert np.isfinite(found[[0, 2]]).all() and not np.isfinite(found[1]).any()


def test_numbers_are_rounded_to_tf32_and_nan_stays():
    given = np.array([1 + 2.0**-12, 1 + 3 * 2.0**-12, -(1 + 2.0**-10), np.inf, np.nan, 0], "float32")
    given = np.concatenate([given, np.array([0x7FFFFFFF], "uint32").view("float32")])
    found = np.asarray(weight_only_transposed._in_tf32(keras.ops.convert_to_tensor(given)))
    expected = [1, 1 + 2.0**-10, -(1 + 2.0**-10), np.inf, np.nan, 0, np.nan]
    np.testing.assert_array_equal(found, np.array(expected, "float32"))


@pytest.fixture
def interpreted(monkeypatch):
    """Makes dispatch run the kernel here; returns the tiles that it ran."""
    tiles, product = [], weight_only_transposed.transposed_product

    def run(*arguments):
        tiles.append(arguments[4])
        return product(*arguments, interpret=True)

    monkeypatch.setattr(weight_only_transposed, "transposed_product", run)
    return tiles


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_few_rows_take_it(name, hopper, interpreted, monkeypatch):
    import jax

    pretended.on_nvidia(monkeypatch, hopper=hopper)
    monkeypatch.setattr(dispatch, "_tile", lambda *_: None)  # forward kernels have tests of their own
    monkeypatch.setattr(dispatch.weight_only, "can_decode", lambda *_: False)
    shape = (77, 33)
    codec, parts, weight = stored(name, *shape)
    x, upstream = activations(3, shape[0], "bfloat16"), activations(3, shape[1], "bfloat16")
    _, backward = jax.vjp(lambda x: codec.matmul(x, tensors(parts), shape, "bfloat16"), x)
    assert_product(backward(upstream)[0], upstream, weight, "bfloat16")
    assert len(interpreted) == 1


def test_dispatch(monkeypatch):
    import jax

    pretended.on_nvidia(monkeypatch)
    layout = Layout((77, 33), (0.0,) * 16, 64)
    for dtype in UNIT:
        most = measured.transposed_tiles("table", dtype)[-1][0]
        assert isinstance(dispatch._transposed_tile(layout, most, dtype), TransposedTile)
        assert dispatch._transposed_tile(layout, most + 1, dtype) is None
    assert dispatch._transposed_tile(Layout((77, 33)), 1, "float32") is None  # XLA decodes such codes faster
    with jax.default_matmul_precision("highest"):
        assert dispatch._transposed_tile(layout, 1, "float32") is None
    assert dispatch._transposed_tile(Layout((77, 33), (0.0,) * 16, 16), 1, "bfloat16") is None  # blocks too small


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("shape", [(128, 32), (77, 33)])
@pytest.mark.parametrize("name", NAMES)
def test_measured_tiles_lower_for_cuda(name, shape, dtype):
    import jax

    codec, parts, _ = stored(name, *shape)
    layout = codec.layout(shape)
    tiles = measured.transposed_tiles(layout.kind, dtype)

    def products(codes, *scales):
        return [
            dispatch.transposed_product_by(tile)(
                jax.numpy.ones((rows, shape[1]), dtype), codes, scales, layout, tile, dtype
            )
            for rows, tile in tiles
        ]

    text = jax.jit(products).trace(parts["codes"], *scales_of(parts)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == len(tiles)

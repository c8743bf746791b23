"""float32 activations multiplied by kernels for float16, interpreted, against float64 arithmetic on decoded weights."""

import keras
import numpy as np
import pretended
import pytest
from interpreting import interpreter
from stored_weights import UNIT, activations, numbers, scales_of, stored, tensors

from keras_precision.formats import FORMATS
from keras_precision.kernels import device, dispatch, measured, scaled_halves
from keras_precision.kernels.scaled_halves import Halves
from keras_precision.kernels.warpgroup import Slab
from keras_precision.kernels.weight_only import Tile
from keras_precision.kernels.weight_only_transposed import TransposedTile

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")

NAMES = ("nf4", "fp4-dq", "int4", "int8-weight-only")
SHAPE = (256, 128)
FUNCTIONS = (scaled_halves.product, scaled_halves.transposed_product)


def multiplied(function, x, parts, layout, slab=Slab(8, 2, 2, programs=1)):  # noqa: B008 - frozen
    """By a kernel, interpreted."""
    parts = tensors(parts)
    return function(x, parts["codes"], scales_of(parts), layout, Halves(slab), "float32", interpret=interpreter())


def assert_product(found, x, weight):
    """Within the documented bound."""
    x, v, k = numbers(x), UNIT["float16"], x.shape[-1]
    bound = np.abs(x) @ np.abs(weight) * (2 * v + v**2 + (k + 3) * 2.0**-24)
    bound += k * 2.0**-38 * np.abs(x).max(axis=1, keepdims=True) * np.abs(weight).max() + k * 2.0**-94
    assert found.dtype == "float32"
    assert (np.abs(numbers(found) - x @ weight) <= bound).all()


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_size(name, function, programs):
    codec, parts, weight = stored(name, *SHAPE)
    axis = FUNCTIONS.index(function)
    x = activations(5, SHAPE[axis], "float32") * np.geomspace(1e-12, 1e12, 5, dtype="float32")[:, None]
    found = multiplied(function, x, parts, codec.layout(SHAPE), Slab(8, 2, 2, programs=programs))
    assert_product(found, x, weight.T if axis else weight)


@pytest.mark.parametrize("spread", [1e-9, 1e9])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_weights_beyond_float16(name, function, spread):
    weight = np.random.default_rng(0).standard_normal(SHAPE, dtype="float32") * np.float32(spread)
    weight[:, 3] /= 1e4
    codec = FORMATS[name]
    parts = codec.encode(weight)
    weight = numbers(codec.decode(tensors(parts), SHAPE, "float32"))
    axis = FUNCTIONS.index(function)
    x = activations(3, SHAPE[axis], "float32")
    assert_product(multiplied(function, x, parts, codec.layout(SHAPE)), x, weight.T if axis else weight)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_not_finite_stays_in_its_row(function, value):
    codec, parts, _ = stored("nf4", *SHAPE)
    x = np.array(activations(3, SHAPE[FUNCTIONS.index(function)], "float32"))
    x[1, 5], x[2] = value, 0
    found = numbers(multiplied(function, x, parts, codec.layout(SHAPE)))
    assert np.isfinite(found[0]).all() and not np.isfinite(found[1]).any() and not found[2].any()


@pytest.mark.parametrize("precision, kinds", [("default", (Halves, Halves)), ("highest", (Tile, type(None)))])
def test_dispatch(monkeypatch, precision, kinds):
    import jax

    pretended.on_nvidia(monkeypatch, hopper=True)
    layout = FORMATS["nf4"].layout(SHAPE)
    with jax.default_matmul_precision(precision):
        found = dispatch._tile(layout, 17, "float32"), dispatch._transposed_tile(layout, 17, "float32")
    assert tuple(map(type, found)) == kinds
    monkeypatch.setattr(device, "has_wgmma", lambda: False)
    assert isinstance(dispatch._tile(layout, 17, "float32"), Tile)
    found = [dispatch._transposed_tile(layout, rows, "float32") for rows in (17, 33)]
    assert list(map(type, found)) == [TransposedTile, type(None)]


@pytest.mark.parametrize("rows", [1, 2, 70])
@pytest.mark.parametrize("name", NAMES)
def test_products_and_gradients_lower_for_cuda(monkeypatch, name, rows):
    import jax

    pretended.with_nvidia_as_default(monkeypatch, hopper=True)
    codec, parts, _ = stored(name, *SHAPE)

    def product(x):
        return codec.matmul(x, tensors(parts), SHAPE, "float32")

    def both(x):
        found, backward = jax.vjp(product, x)
        return backward(found)

    x = jax.ShapeDtypeStruct((rows, SHAPE[0]), "float32")
    text = jax.jit(both).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == (1 if rows == 1 else 2) and text.count("xla.gpu.triton") == (rows == 1)


def test_every_number_of_rows_has_a_tile_on_hopper():
    for tiles in measured.HOPPER_TF32_TILES.values():
        assert measured.first_for(10**9, tiles) is not None

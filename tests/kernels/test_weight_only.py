"""Kernels that multiply with stored codes, interpreted, against float64 arithmetic on decoded weights; and lowered."""

import dataclasses

import keras
import numpy as np
import pretended
import pytest
from stored_weights import UNIT, activations, numbers, scales_of, stored, tensors

import keras_precision
from keras_precision.formats import FORMATS
from keras_precision.kernels import (
    device,
    dispatch,
    measured,
    reference,
    row_product,
    weight_only,
    weight_only_transposed,
)
from keras_precision.kernels.row_product import Strip
from keras_precision.kernels.weight_only import Tile

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")

KINDS = {"nf4": "table", "fp4-dq": "table", "int4": "whole", "int8-weight-only": "bytes"}
BY_NUMBER, BY_UNITS = Strip(16, 2, 4, 2, 4), Tile(16, 16, 16, decodes_ahead=True)
TF32 = 2.0**-11  # unit roundoff
# Even and odd, tiles' multiples and not, and less than a block, a tile or a byte.
SHAPES = [(128, 32), (77, 33), (1, 1)]


def product(x, codes, scales, layout, tile, *others):
    """The product by the kernel whose tile it is, interpreted."""
    return dispatch.product_by(tile)(x, codes, scales, layout, tile, *others, interpret=True)


def assert_product(found, x, weight, dtype, is_exact=False):
    """Within the bound that `weight_only.product` documents; where values aren't rounded, `row_product.product`."""
    x, k = numbers(x), x.shape[-1]
    unit = UNIT[dtype]
    is_float32 = dtype == "float32" and not device.multiplies_in_tf32()
    of_operands = 0 if is_exact or is_float32 else 2 * TF32 + TF32**2 if dtype == "float32" else unit
    bound = np.abs(x) @ np.abs(weight) * (of_operands + (k + 3) * 2.0**-24)
    exact = x @ weight
    assert (np.abs(numbers(found) - exact) <= bound + unit * np.abs(exact)).all()


@pytest.fixture(params=["highest", "high", "default"])
def precision(request):
    """JAX's matmul precision."""
    import jax

    with jax.default_matmul_precision(request.param):
        yield request.param


@pytest.mark.parametrize("name", KINDS)
def test_float32_products_are_as_precise_as_the_backends(name, precision):
    codec, parts, weight = stored(name, 128, 32)
    x = activations(16, 128, "float32")
    found = product(x, parts["codes"], scales_of(parts), codec.layout((128, 32)), BY_UNITS, "float32")
    assert device.multiplies_in_tf32() == (precision != "highest")
    assert_product(found, x, weight, "float32")
    # Which numbers are multiplied is seen where there is but one product.
    one = np.zeros((16, 128), "float32")
    one[0, 7] = 1 + 2.0**-12
    found = product(one, parts["codes"], scales_of(parts), codec.layout((128, 32)), BY_UNITS, "float32")
    is_rounded = np.abs(numbers(found)[0] - weight[7])[weight[7] != 0] < 2.0**-13 * np.abs(weight[7])[weight[7] != 0]
    if KINDS[name] != "table":  # whose values are rounded too
        assert is_rounded.all() if precision != "highest" else not is_rounded.any()


@pytest.mark.parametrize("tile", [BY_NUMBER, BY_UNITS], ids=["by_number", "by_units"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KINDS)
def test_products(name, shape, tile):
    codec, parts, weight = stored(name, *shape)
    layout = codec.layout(shape)
    assert layout.kind == KINDS[name]
    dtype = "bfloat16" if tile is BY_NUMBER else "float32"
    x = activations(3, shape[0], dtype)
    found = product(x, parts["codes"], scales_of(parts), layout, tile, dtype)
    assert found.shape == (3, shape[1]) and found.dtype == dtype
    assert_product(found, x, weight, dtype, is_exact=tile is BY_NUMBER)


def test_scales_expanded_before():
    codec, parts, weight = stored("fp4-dq", 128, 32)
    x = activations(3, 128, "float32")
    arrays = parts["codes"], scales_of(parts), codec.layout((128, 32))
    found = product(x, *arrays, Tile(64, 16, 16), "float32")
    assert_product(found, x, weight, "float32")


@pytest.mark.parametrize("block_size", [32, 4096])
@pytest.mark.parametrize("tile", [BY_NUMBER, Tile(16, 16, 16, 2), Tile(16, 16, 16, 2, decodes_ahead=True)], ids=str)
def test_blocks_of_any_size(block_size, tile):
    """Rows of a step never lie in two blocks."""
    codec = FORMATS["nf4"].with_option(str(block_size))
    weight = np.random.default_rng(0).standard_normal((200, 16), dtype="float32") * np.geomspace(1, 1e6, 200)[:, None]
    parts = codec.encode(weight.astype("float32"))
    exact = numbers(codec.decode(tensors(parts), weight.shape, "float32"))
    x = activations(1, 200, "float16")
    arrays = parts["codes"], [parts["scale"]], codec.layout(weight.shape)
    assert_product(product(x, *arrays, tile, "float16", "float32"), x, exact, "float16", tile is BY_NUMBER)


@pytest.mark.parametrize("programs", [1, 3, 7])
@pytest.mark.parametrize("tile", [BY_NUMBER, BY_UNITS], ids=["by_number", "by_units"])
def test_sums_of_several_programs_are_added(tile, programs):
    codec, parts, weight = stored("nf4", 640, 16)
    x = activations(1, 640, "float32")
    arrays = parts["codes"], scales_of(parts), codec.layout((640, 16))
    found = product(x, *arrays, dataclasses.replace(tile, programs=programs), "float32")
    assert_product(found, x, weight, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_decoded_weights_are_those_of_the_format(name, dtype):
    codec, parts, _ = stored(name, 128, 32)
    tile = Tile(1, 16, 8)
    layout = codec.layout((128, 32))
    assert weight_only.can_decode(layout, tile)
    assert not any(weight_only.can_decode(codec.layout(shape), tile) for shape in [(77, 33), (2**22, 16)])
    found = weight_only.decoded(parts["codes"], scales_of(parts), layout, tile, dtype, interpret=True)
    expected = codec.decode(tensors(parts), (128, 32), dtype)
    assert np.array_equal(numbers(found), numbers(expected))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(value):
    codec, parts, _ = stored("nf4", 128, 32)
    x = np.array(activations(2, 128, "float32"))
    x[1, 5] = value
    arrays = parts["codes"], scales_of(parts), codec.layout((128, 32))
    found = numbers(product(x, *arrays, BY_NUMBER, "float32"))
    assert np.isfinite(found[0]).all() and not np.isfinite(found[1]).any()


@pytest.fixture
def has_kernels(monkeypatch):
    """Makes dispatch run kernels here, interpreted, and count them."""
    calls = []

    def interpreted(function):
        def run(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs, interpret=True)

        return run

    pretended.on_nvidia(monkeypatch)
    kernels = [(row_product, "product"), (weight_only, "product"), (weight_only, "decoded")]
    for module, name in (*kernels, (weight_only_transposed, "transposed_product")):
        monkeypatch.setattr(module, name, interpreted(getattr(module, name)))
    plan = measured.Plan(((1, BY_NUMBER), (4, BY_UNITS)), Tile(1, 16, 8))
    monkeypatch.setattr(measured, "PLANS", dict.fromkeys(measured.PLANS, plan))
    return calls


@pytest.mark.parametrize("lead, kernel", [((), "product"), ((2, 2), "product"), ((3, 3), "decoded")])
def test_any_batch_is_multiplied(has_kernels, lead, kernel):
    codec, parts, weight = stored("nf4", 128, 32)
    x = activations(int(np.prod(lead)), 128, "bfloat16").reshape(*lead, 128)
    found = codec.matmul(x, tensors(parts), (128, 32), "bfloat16")
    assert has_kernels == [kernel] and found.shape == (*lead, 32)
    assert_product(found, x, weight, "bfloat16")


def test_transposed_activations(has_kernels):
    codec, parts, weight = stored("int4", 128, 32)
    x = activations(3, 128, "float16").T
    assert_product(codec.matmul(x.T, tensors(parts), (128, 32), "float16"), x.T, weight, "float16", is_exact=True)


@pytest.mark.parametrize("shape", [(128, 32), (77, 33)])
@pytest.mark.parametrize("rows", [1, 9])
def test_gradient_is_that_of_the_decoded_weight(has_kernels, shape, rows):
    import jax

    codec, parts, weight = stored("nf4", *shape)
    x, upstream = activations(rows, shape[0], "float32"), activations(rows + 1, shape[1], "float32")[:rows]

    @jax.jit
    def gradient(x, parts, upstream):
        return jax.vjp(lambda x: codec.matmul(x, parts, shape, "float32"), x)[1](upstream)[0]

    found = gradient(x, tensors(parts), upstream)
    assert has_kernels.count("transposed_product") == 1
    assert_product(found, upstream, weight.T, "float32")


def test_int8_activations_by_kernel(has_kernels):
    codec, parts, _ = stored("int8", 128, 32)
    x = activations(3, 128, "float32")
    found = codec.matmul(x, tensors(parts), (128, 32), "float32")
    assert has_kernels == ["product"]
    expected = reference.integer_matmul(x, *tensors(parts).values(), "float32")
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-6, atol=1e-5)


def test_int8_activations_in_parts(monkeypatch):
    monkeypatch.setattr(measured, "ROWS_OF_INTEGER_PARTS", 4)
    codec, parts, _ = stored("int8", 128, 32)
    x = activations(10, 128, "float32")
    arrays = tensors(parts)
    products = reference.Products(dispatch.scaled_products_in_parts)
    found = reference.integer_matmul(x, arrays["codes"], arrays["scale"], "float32", products)
    expected = reference.integer_matmul(x, arrays["codes"], arrays["scale"], "float32")
    np.testing.assert_array_equal(numbers(found), numbers(expected))


def test_kernels_run_where_they_can(monkeypatch):
    layout = FORMATS["nf4"].layout((128, 32))
    x, codes = activations(1, 128, "float32"), np.zeros((64, 32), "uint8")
    assert not dispatch.can_run(x, codes, layout, "bfloat16")  # a CPU
    monkeypatch.setattr(device, "has_triton", lambda: True)
    assert dispatch.can_run(x, codes, layout, "bfloat16")
    assert not dispatch.can_run(x, codes, layout, "float64")
    assert not dispatch.can_run(x[:0], codes, layout, "bfloat16")
    mesh = keras.distribution.DeviceMesh((1,), ["data"], keras.distribution.list_devices()[:1])
    with keras.distribution.ModelParallel(layout_map=keras.distribution.LayoutMap(mesh)).scope():
        assert not dispatch.can_run(x, codes, layout, "bfloat16")


@pytest.mark.parametrize("name", [*KINDS, "int8"])
def test_layers_compute_with_kernels_as_without(has_kernels, monkeypatch, name):
    monkeypatch.setattr(device, "multiplies_in_tf32", lambda: False)  # as a CPU
    layer = keras.layers.Dense(32, dtype=keras_precision.get(f"{name}_from_float32"))
    x = activations(3, 128, "float32")
    found = layer(x)
    assert has_kernels
    monkeypatch.setattr(device, "has_triton", lambda: False)
    np.testing.assert_allclose(numbers(found), numbers(layer(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", measured.PLANS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_measured_tiles_lower_for_cuda(kind, dtype):
    import jax

    name = next(name for name in KINDS if KINDS[name] == kind)
    codec, parts, _ = stored(name, 128, 32)
    layout, plan = codec.layout((128, 32)), measured.PLANS[kind]

    def products(codes, *scales):
        found = [
            dispatch.product_by(tile)(jax.numpy.ones((rows, 128), dtype), codes, scales, layout, tile, dtype)
            for rows, tile in plan.products
        ]
        tile = plan.decoding
        large = codec.layout((tile.rows * 4, tile.columns))
        codes = jax.numpy.zeros((large.byte_rows, tile.columns), codes.dtype)
        if len(scales) == 1:
            scales = [jax.numpy.ones((1, tile.columns) if layout.block_size else tile.columns)]
            found.append(weight_only.decoded(codes, scales, large, tile, dtype))
        return found

    traced = jax.jit(products).trace(parts["codes"], *scales_of(parts))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") >= len(plan.products)

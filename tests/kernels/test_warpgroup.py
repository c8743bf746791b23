"""Products by Hopper's matrix units: interpreted, against float64 arithmetic; lowered."""

import dataclasses
from importlib.metadata import version

import keras
import numpy as np
import pretended
import pytest
from keras import ops
from interpreting import interpreter
from stored_weights import UNIT, activations, numbers, scales_of, stored, tensors

from keras_precision.kernels import device, measured, reference, warpgroup, warpgroup_program, weight_only
from keras_precision.kernels.layout import Layout
from keras_precision.kernels.warpgroup import Slab
from keras_precision.kernels.weight_tiles import Straight

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")
KNOWS_CLUSTERS = pytest.mark.skipif(version("jax").startswith("0.10."), reason="jax 0.10 interprets no clusters")


def bound_of_sums(x, weight, unit):
    """What products document, before their result is rounded."""
    return np.abs(x) @ np.abs(weight) * (unit + (len(weight) + 3) * 2.0**-24)


# A slab of each number of parts and pairs, less than a slab and more, k split among programs and not, blocks in a step
# and steps in a block; programs that stay for several blocks of rows and of columns, or for one.
@pytest.mark.parametrize(
    "name, rows, shape, slab, dtype",
    [
        ("nf4", 3, (256, 128), Slab(8, 2, 2, programs=1), "bfloat16"),
        ("nf4", 9, (320, 128), Slab(8, 1, 2, programs=4), "float16"),
        ("int4/128", 1, (192, 128), Slab(8, 2, 2, pairs=2, programs=1), "bfloat16"),
        ("nf4-dq", 2, (320, 128), Slab(8, 4, 2, pairs=2, programs=1), "bfloat16"),
        ("int8-weight-only", 5, (128, 128), Slab(8, 1, 3, programs=1), "float16"),
        ("nf4-dq", 9, (192, 384), Slab(8, 1, 2, programs=4), "bfloat16"),
        ("nf4-dq", 3, (512, 128), Slab(8, 1, 2, programs=4), "bfloat16"),
        ("int4", 12, (128, 256), Slab(8, 2, 3, programs=3), "bfloat16"),
        pytest.param("nf4", 9, (192, 768), Slab(8, 1, 2, cluster=2, programs=4), "bfloat16", marks=KNOWS_CLUSTERS),
        pytest.param("nf4-dq", 3, (192, 256), Slab(8, 1, 2, cluster=2, programs=2), "float16", marks=KNOWS_CLUSTERS),
    ],
)
def test_products(name, rows, shape, slab, dtype):
    codec, parts, weight = stored(name, *shape)
    layout = codec.layout(shape)
    assert warpgroup.can_run(layout, dtype)
    x = activations(rows, shape[0], dtype)
    arrays = parts["codes"], scales_of(parts), layout
    found = warpgroup.product(x, *arrays, slab, dtype, "float32", interpret=interpreter())
    assert found.shape == (rows, shape[1]) and found.dtype == "float32"
    x = numbers(x)
    bound = bound_of_sums(x, weight, UNIT[dtype] if layout.block_size else 0)
    assert (np.abs(numbers(found) - x @ weight) <= bound + UNIT["float32"] * np.abs(x @ weight)).all()


# Two rows of blocks in a program, one, and one in several; several tiles a step; columns split among programs and not;
# programs that can't pair up in clusters.
@pytest.mark.parametrize(
    "name, rows, shape, slab, dtype",
    [
        ("nf4", 3, (256, 256), Slab(8, 2, 2, programs=1), "bfloat16"),
        ("nf4", 9, (128, 384), Slab(8, 2, 2, programs=4), "float16"),
        ("int4/128", 1, (256, 128), Slab(8, 2, 2, pairs=2, programs=1), "bfloat16"),
        ("nf4-dq", 2, (128, 640), Slab(8, 4, 2, pairs=2, programs=1), "bfloat16"),
        ("nf4-dq", 3, (128, 768), Slab(8, 2, 2, programs=3), "bfloat16"),
        ("nf4/256", 3, (512, 128), Slab(8, 2, 2, programs=1), "bfloat16"),
        ("int8-weight-only", 5, (384, 128), Slab(8, 1, 3, cluster=2, programs=1), "float16"),
    ],
)
def test_transposed_products(name, rows, shape, slab, dtype):
    codec, parts, weight = stored(name, *shape)
    layout = codec.layout(shape)
    assert warpgroup.can_run_transposed(layout, dtype)
    x = activations(rows, shape[1], dtype)
    arrays = parts["codes"], scales_of(parts), layout
    found = warpgroup.transposed_product(x, *arrays, slab, dtype, interpret=interpreter())
    assert found.shape == (rows, shape[0]) and found.dtype == dtype
    x = numbers(x)
    bound, exact = bound_of_sums(x, weight.T, UNIT[dtype]), x @ weight.T
    assert (np.abs(numbers(found) - exact) <= bound + UNIT[dtype] * (np.abs(exact) + bound)).all()


def test_unwritten_results_are_nan():
    """As results are where the interpreter runs a kernel that leaves some out, which comparisons then show."""
    import jax
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(x, result):
        result[:4] = x[:4]

    call = plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((8,), "float32"), interpret=interpreter())
    found = numbers(call(ops.ones(8)))
    np.testing.assert_array_equal(np.isnan(found), [False] * 4 + [True] * 4)


@pytest.mark.parametrize("programs", [1, 4])
def test_integer_products_are_exact(programs):
    _, parts, _ = stored("int8", 384, 128)
    draw = np.random.default_rng(0)
    x, x_scale = draw.integers(-127, 128, (9, 384)).astype("int8"), draw.uniform(0.5, 2, (9, 1)).astype("float32")
    arguments = [ops.convert_to_tensor(array) for array in (x, x_scale)] + [
        *map(tensors(parts).get, ("codes", "scale")),
        "float32",
    ]
    found = warpgroup.integer_product(*arguments, slab=Slab(8, 1, 2, programs=programs), interpret=interpreter())
    np.testing.assert_allclose(numbers(found), numbers(reference.scaled_products(*arguments)), rtol=3e-7)


@pytest.fixture
def settings(monkeypatch):
    """What kernels are called with."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    found, kernel = [], plgpu.kernel
    monkeypatch.setattr(
        plgpu, "kernel", lambda *arguments, **options: found.append(options) or kernel(*arguments, **options)
    )
    monkeypatch.setattr(device, "multiprocessors", lambda: 12)
    return found


@pytest.mark.parametrize("pairs", [1, 2])
def test_registers(pairs):
    """Threads wait forever for registers that aren't there."""
    fetching, multiplying = warpgroup_program._REGISTERS[pairs]
    of_program, threads = 65536, 128 * (1 + 2 * pairs)
    given_at_start = of_program // threads // 8 * 8 * threads
    assert 128 * fetching + 256 * pairs * multiplying <= given_at_start
    assert fetching % 8 == multiplying % 8 == 0


def trace(name, rows, shape, slab, dtype, splits=1):
    import jax

    codec, parts, _ = stored(name, *shape)
    x, layout = ops.ones((rows, shape[0]), dtype), codec.layout(shape)
    tiles = Straight(layout, dtype, slab.parts * slab.pairs)

    def run(x, codes, scales):
        return warpgroup_program.run(x, codes, scales, None, rows, tiles, slab, dtype, None, splits, 2)

    jax.eval_shape(run, x, tensors(parts)["codes"], scales_of(tensors(parts)))


@pytest.mark.parametrize(
    "rows, slab, expected",
    [
        (600, Slab(64, 1, 2, cluster=2, programs=8), (4, 1, 1)),
        (600, Slab(64, 1, 2, pairs=2, programs=8), (4, 1, 10)),
        (60, Slab(64, 1, 2, programs=8), (4, 2, 1)),
        (600, Slab(64, 1, 2), (12, 1, 1)),
        (600, Slab(64, 1, 2, stays=False), (4, 1, 10)),
    ],
)
def test_programs_that_stay(settings, rows, slab, expected):
    """As many as run at once, where there are more units of work, one pair of warpgroups and all of k."""
    trace("int8-weight-only", rows, (256, 512), slab, "bfloat16", expected[1])
    assert [options["grid"] for options in settings] == [expected]


@pytest.mark.parametrize("name, expected", [("nf4", True), ("int4", False)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tables_are_used(settings, name, dtype, expected):
    trace(name, 64, (256, 128), Slab(64, 1, 2, tabled=True), dtype)
    assert ["table" in options["scratch_types"] for options in settings] == [expected]


def test_what_can_run():
    assert warpgroup.can_run(Layout((4096, 14336), (0.0,) * 16, 64), "bfloat16")
    assert warpgroup.can_run(Layout((192, 128)), "float16")
    assert not warpgroup.can_run(Layout((192, 128)), "int8")
    assert not any(warpgroup.can_run(Layout(shape), "bfloat16") for shape in [(100, 128), (128, 100)])
    assert not warpgroup.can_run(Layout((4096, 128), (0.0,) * 16, 32), "bfloat16")
    assert not warpgroup.can_run(Layout((4096, 128)), "float32")
    assert warpgroup.can_run_transposed(Layout((256, 128), (0.0,) * 16, 64), "bfloat16")
    assert not warpgroup.can_run_transposed(Layout((192, 128), (0.0,) * 16, 64), "bfloat16")
    assert not warpgroup.can_run_transposed(Layout((256, 128)), "int8")


@pytest.mark.parametrize(
    "capability, version, expected",
    [(9.0, (0, 10, 2), True), (9.0, (0, 10, 1), False), (8.9, (0, 11, 2), False), (10.0, (0, 11, 2), False)],
)
def test_where_the_units_are(monkeypatch, capability, version, expected):
    import jax

    monkeypatch.setattr(device, "_capability", lambda: capability)
    monkeypatch.setattr(jax, "__version_info__", version)
    assert device.has_wgmma() is expected


@pytest.fixture
def on_hopper(monkeypatch):
    """Lets dispatch choose as on a Hopper GPU, and interprets what it chooses."""
    calls = []

    def interpreted(function):
        def run(*arguments, **options):
            calls.append(function.__name__)
            return function(*arguments, **options, interpret=interpreter())

        return run

    pretended.on_nvidia(monkeypatch, hopper=True)
    monkeypatch.setattr(weight_only, "can_decode", lambda *_: False)  # by a kernel that isn't interpreted here
    for name in ("product", "transposed_product", "integer_product"):
        monkeypatch.setattr(warpgroup, name, interpreted(getattr(warpgroup, name)))
    slabs = ((8, Slab(8, 1, 2, programs=1)),)
    for name in ("HOPPER_TILES", "TRANSPOSED_SLABS"):
        monkeypatch.setattr(measured, name, dict.fromkeys(getattr(measured, name), slabs))
    return calls


@pytest.mark.parametrize("name, kernel", [("nf4", "product"), ("int8", "integer_product")])
def test_dispatch(on_hopper, name, kernel):
    codec, parts, weight = stored(name, 128, 128)
    x = ops.convert_to_tensor(np.random.default_rng(0).standard_normal((2, 3, 128), dtype="float32"), "bfloat16")
    found = codec.matmul(x, tensors(parts), (128, 128), "bfloat16")
    assert on_hopper == [kernel] and found.shape == (2, 3, 128)
    np.testing.assert_allclose(numbers(found), numbers(x) @ weight, rtol=0.02, atol=0.5)


def gradient(name, shape, rows):
    """The gradient with respect to bfloat16 activations (*rows, k), that of the result, and the weight."""
    import jax

    codec, parts, weight = stored(name, *shape)
    draw = np.random.default_rng(0)
    x, upstream = (jax.numpy.asarray(draw.standard_normal((*rows, size)), "bfloat16") for size in shape)
    _, backward = jax.vjp(lambda x: codec.matmul(x, tensors(parts), shape, "bfloat16"), x)
    (found,) = backward(upstream)
    assert found.shape == x.shape and found.dtype == "bfloat16"
    return found, upstream, weight


@pytest.mark.parametrize("name", ["nf4", "int8-weight-only", "int8", "llm-int8"])
def test_dispatch_of_gradients(on_hopper, name):
    found, upstream, weight = gradient(name, (128, 256), (2, 3))
    assert on_hopper.count("transposed_product") == 1
    np.testing.assert_allclose(numbers(found), numbers(upstream) @ weight.T, rtol=0.02, atol=0.7)


@pytest.mark.parametrize("most, shape", [(2, (128, 256)), (8, (192, 128))])
def test_gradients_that_no_kernel_takes(on_hopper, monkeypatch, most, shape):
    """More rows than slabs are for, and a weight whose rows make no whole programs."""
    slabs = ((most, Slab(8, 1, 2, programs=1)),)
    monkeypatch.setattr(measured, "TRANSPOSED_SLABS", dict.fromkeys(measured.TRANSPOSED_SLABS, slabs))
    monkeypatch.setattr(measured, "TRANSPOSED_TILES", dict.fromkeys(measured.TRANSPOSED_TILES, ()))
    found, upstream, weight = gradient("nf4", shape, (3,))
    assert on_hopper == ["product"]
    np.testing.assert_allclose(numbers(found), numbers(upstream) @ weight.T, rtol=0.02, atol=0.7)


def test_gradients_have_gradients(on_hopper):
    """As a penalty on gradients needs them."""
    import jax

    codec, parts, weight = stored("nf4", 128, 256)
    x = jax.numpy.ones((2, 128), "bfloat16")

    def output(x, head):
        return (codec.matmul(x, tensors(parts), (128, 256), "bfloat16") * head).sum()

    def penalty(head):
        return (jax.grad(output)(x, head).astype("float32") ** 2).sum()

    head = np.random.default_rng(0).standard_normal(256).astype("float32")
    found = jax.grad(penalty)(jax.numpy.asarray(head))
    assert "transposed_product" in on_hopper
    expected = 2 * 2 * weight.T @ (weight @ head)
    np.testing.assert_allclose(numbers(found), expected, rtol=0.05, atol=0.02 * np.abs(expected).max())


def slabs_of(tiles):
    """(Rows, slab) as a large weight takes it, of which each program has all rows, and as one that several share."""
    for greatest, slab in tiles:
        if isinstance(slab, Slab):
            yield from ((int(min(greatest, 300)), each) for each in (dataclasses.replace(slab, programs=1), slab))


def lowered_kernels(function, *arguments):
    """How many kernels a function becomes for CUDA."""
    import jax

    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.parametrize("kind", measured.TRANSPOSED_SLABS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_measured_transposed_slabs_lower_for_cuda(kind, dtype):
    names = {"whole": ["int4", "int4-dq"], "table": ["nf4", "nf4-dq"], "bytes": "int8-weight-only"}
    for name in np.atleast_1d(names[kind]):
        codec, parts, _ = stored(name, 256, 2048)
        slabs = list(slabs_of(measured.TRANSPOSED_SLABS[kind]))

        def products(parts, codec=codec, slabs=slabs):
            for rows, slab in slabs:
                x, layout = ops.ones((rows, 2048), dtype), codec.layout((256, 2048))
                yield warpgroup.transposed_product(x, parts["codes"], scales_of(parts), layout, slab, dtype)

        assert lowered_kernels(lambda parts: list(products(parts)), tensors(parts)) == len(slabs)


@pytest.mark.parametrize("kind", measured.HOPPER_TILES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_measured_slabs_lower_for_cuda(kind, dtype):
    names = {"whole": "int4", "table": "nf4", "double-quantized whole": "int4-dq", "double-quantized table": "nf4-dq"}
    name = (names | {"bytes": "int8-weight-only", "integers": "int8"})[kind]
    codec, parts, _ = stored(name, 2048, 256)
    slabs = list(slabs_of(measured.HOPPER_TILES[kind]))

    def products(parts):
        for rows, slab in slabs:
            if kind == "integers":
                x, scale = ops.ones((rows, 2048), "int8"), ops.ones((rows, 1))
                found = warpgroup.integer_product(x, scale, parts["codes"], parts["scale"], dtype, slab)
            else:
                x, layout = ops.ones((rows, 2048), dtype), codec.layout((2048, 256))
                found = warpgroup.product(x, parts["codes"], scales_of(parts), layout, slab, dtype)
            assert found.shape == (rows, 256)
            yield found

    assert lowered_kernels(lambda parts: list(products(parts)), tensors(parts)) == len(slabs)

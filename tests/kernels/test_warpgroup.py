"""Products by Hopper's matrix units: interpreted, against float64 arithmetic; what lanes read, emulated; lowered."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops
from interpreting import interpreter
from stored_weights import UNIT, numbers, scales_of, stored, tensors

from keras_precision.kernels import device, dispatch, lanes, measured, reference, warpgroup
from keras_precision.kernels.layout import Layout
from keras_precision.kernels.warpgroup import Slab

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")


# A slab of each number of parts and pairs, less than a slab and more, k split among programs and not, blocks in a step
# and steps in a block.
@pytest.mark.parametrize(
    "name, rows, shape, slab, dtype",
    [
        ("nf4", 3, (256, 128), Slab(8, 2, 2, programs=1), "bfloat16"),
        ("nf4", 9, (320, 128), Slab(8, 1, 2, programs=4), "float16"),
        ("int4/128", 1, (192, 128), Slab(8, 2, 2, pairs=2, programs=1), "bfloat16"),
        ("nf4-dq", 2, (320, 128), Slab(8, 4, 2, pairs=2, programs=1), "bfloat16"),
        ("int8-weight-only", 5, (128, 128), Slab(8, 1, 3, programs=1), "float16"),
    ],
)
def test_products(name, rows, shape, slab, dtype):
    codec, parts, weight = stored(name, *shape)
    layout = codec.layout(shape)
    assert warpgroup.can_run(layout, dtype)
    x = ops.convert_to_tensor(np.random.default_rng(0).standard_normal((rows, shape[0]), dtype="float32"), dtype)
    arrays = parts["codes"], scales_of(parts), layout
    found = warpgroup.product(x, *arrays, slab, dtype, "float32", interpret=interpreter())
    assert found.shape == (rows, shape[1]) and found.dtype == "float32"
    x = numbers(x)
    # The bound that `product` documents.
    unit = UNIT[dtype] if layout.block_size else 0
    bound = np.abs(x) @ np.abs(weight) * (unit + (shape[0] + 3) * 2.0**-24)
    assert (np.abs(numbers(found) - x @ weight) <= bound + UNIT["float32"] * np.abs(x @ weight)).all()


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


def emulate(monkeypatch):
    """Lets `lanes` compute with Python's integers."""
    operations = {
        "addi": int.__add__,
        "muli": int.__mul__,
        "andi": int.__and__,
        "xori": int.__xor__,
        "shli": int.__lshift__,
        "shrui": int.__rshift__,
    }
    monkeypatch.setattr(lanes, "integer", lambda value: value)
    monkeypatch.setattr(lanes, "operation", lambda name, a, b: operations[name](a, b))


def lane_of(thread):
    """A lane as `Lane` makes it of a thread's number."""
    lane = object.__new__(lanes.Lane)
    lane.lane, lane.warp, lane.t = thread & 31, thread >> 5 & 7, thread & 3
    return lane


@pytest.mark.parametrize("row_of", ["row_of_bytes", "row_of_nibbles", "row_of_quads"])
def test_lanes_read_the_rows_that_they_multiply(monkeypatch, row_of):
    """ldmatrix gives the lane 4 g + t of each matrix the pairs of bytes g of its rows 2 t and 2 t + 1."""
    emulate(monkeypatch)
    rows = [[getattr(lane_of(0), row_of)(matrix, place) for place in range(8)] for matrix in range(4)]
    assert sorted(sum(rows, [])) == list(range(32))
    assert all(len({row % 8 for row in of_matrix}) == 8 for of_matrix in rows)  # banks don't collide
    for t in range(4):
        read = [tuple(of_matrix[2 * t : 2 * t + 2]) for of_matrix in rows]
        if row_of == "row_of_bytes":  # of 16 rows, wgmma's lane t multiplies 2 t, 2 t + 1, and both 8 further
            assert read == [(8 * matrix + 2 * t, 8 * matrix + 2 * t + 1) for matrix in range(4)]
        elif row_of == "row_of_nibbles":  # bytes of two rows: rows t and t + 4 of bytes
            assert read == [(8 * matrix + t, 8 * matrix + t + 4) for matrix in range(4)]
        else:  # 4 t to 4 t + 3 of 16, the latter first where t > 1
            for matrix in (0, 2):
                both = read[matrix : matrix + 2] if t < 2 else read[matrix : matrix + 2][::-1]
                assert sum(both, ()) == tuple(range(8 * matrix + 4 * t, 8 * matrix + 4 * t + 4))


def test_swizzled_addresses(monkeypatch):
    """Each lane's address is that of its row's 16 bytes, where a copy with a swizzle of 128 bytes puts them."""
    emulate(monkeypatch)
    addresses = []
    monkeypatch.setattr(lanes, "pointer", lambda reference, offset: offset)
    monkeypatch.setattr(lanes, "_as_integer", lambda address: address)
    monkeypatch.setattr(lanes, "assembly", lambda lines, inputs, *others, **options: addresses.extend(inputs))
    for thread in range(256):
        lane = lane_of(thread)
        lane.matrices(None, 32, lane.row_of_bytes)
    for thread, address in enumerate(addresses):
        row, part = 32 + thread % 32, thread // 32
        assert address == 128 * row + 16 * (part ^ row % 8)


def test_what_can_run():
    assert warpgroup.can_run(Layout((4096, 14336), (0.0,) * 16, 64), "bfloat16")
    assert warpgroup.can_run(Layout((192, 128)), "float16")
    assert not warpgroup.can_run(Layout((192, 128)), "int8")
    assert not any(warpgroup.can_run(Layout(shape), "bfloat16") for shape in [(100, 128), (128, 100)])
    assert not warpgroup.can_run(Layout((4096, 128), (0.0,) * 16, 32), "bfloat16")
    assert not warpgroup.can_run(Layout((4096, 128)), "float32")


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

    monkeypatch.setattr(device, "has_triton", lambda: True)
    monkeypatch.setattr(device, "has_wgmma", lambda: True)
    for name in ("product", "integer_product"):
        monkeypatch.setattr(warpgroup, name, interpreted(getattr(warpgroup, name)))
    slabs = ((8, Slab(8, 1, 2, programs=1)),)
    monkeypatch.setattr(measured, "HOPPER_TILES", dict.fromkeys(measured.HOPPER_TILES, slabs))
    return calls


@pytest.mark.parametrize("name, kernel", [("nf4", "product"), ("int8", "integer_product")])
def test_dispatch(on_hopper, name, kernel):
    codec, parts, weight = stored(name, 128, 128)
    x = ops.convert_to_tensor(np.random.default_rng(0).standard_normal((2, 3, 128), dtype="float32"), "bfloat16")
    found = codec.matmul(x, tensors(parts), (128, 128), "bfloat16")
    assert on_hopper == [kernel] and found.shape == (2, 3, 128)
    np.testing.assert_allclose(numbers(found), numbers(x) @ weight, rtol=0.02, atol=0.5)


@pytest.mark.parametrize("kind", measured.HOPPER_TILES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_measured_slabs_lower_for_cuda(kind, dtype):
    import jax

    names = {"whole": "int4", "table": "nf4", "double-quantized": "nf4-dq"}
    name = (names | {"bytes": "int8-weight-only", "integers": "int8"})[kind]
    codec, parts, _ = stored(name, 2048, 256)
    slabs = [(greatest, tile) for greatest, tile in measured.HOPPER_TILES[kind] if isinstance(tile, Slab)]

    def products(parts):
        for greatest, slab in slabs:
            rows = int(min(greatest, 300))
            # As a large weight takes it, of which each program has all rows, and one that several programs share.
            for each in (dataclasses.replace(slab, programs=1), slab):
                if kind == "integers":
                    x, scale = jax.numpy.ones((rows, 2048), "int8"), jax.numpy.ones((rows, 1))
                    found = warpgroup.integer_product(x, scale, parts["codes"], parts["scale"], dtype, each)
                else:
                    x, layout = jax.numpy.ones((rows, 2048), dtype), codec.layout((2048, 256))
                    found = dispatch.product_by(each)(x, parts["codes"], scales_of(parts), layout, each, dtype)
                assert found.shape == (rows, 256)
                yield found

    text = (
        jax.jit(lambda parts: list(products(parts))).trace(tensors(parts)).lower(lowering_platforms=("cuda",)).as_text()
    )
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2 * len(slabs)

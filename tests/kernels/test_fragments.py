"""What lanes hold of tiles for Hopper's matrix units: their code run for a pair of warpgroups, an element a thread."""

import operator

import keras
import ml_dtypes
import numpy as np
import pytest
from ptx import LANES, executed

from keras_precision.formats import FORMATS
from keras_precision.kernels import byte_table, decoded_words, fragments, lanes, stored_scales, transposed_fragments
from keras_precision.kernels.layout import Layout, group_of_scale
from keras_precision.kernels.weight_tiles import Straight, Transposed

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")
THREADS = 256
UNWRITTEN = 0xFFFFFFFF
WARP, LANE = np.divmod(np.arange(THREADS), LANES)
G, T = np.divmod(LANE, 4)
DTYPES = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LAYOUTS = {
    "nf4": Layout((256, 256), FORMATS["nf4"].codebook.values, 64),
    "int4": Layout((256, 256), FORMATS["int4"].codebook.values, 64),
    "from -7": Layout((256, 256), tuple(range(-7, 9)), 64),
    "from 0": Layout((256, 256), tuple(range(16)), 64),
    "int8": Layout((256, 256)),
}


class Tile:
    """A tile in shared memory, as a copy with a swizzle of 128 bytes leaves it."""

    def __init__(self, codes):
        row, column = np.indices(codes.shape)
        self.bytes = np.zeros(codes.size, "uint8")
        self.bytes[128 * row + 16 * (column // 16 ^ row % 8) + column % 16] = codes.view("uint8")

    def halfwords(self, addresses):
        """The two bytes at each address; its parity is a multiple of theirs."""
        assert not (addresses % 2).any()
        return self.bytes.view("uint16")[addresses // 2].astype("uint32")

    def ldmatrix(self, addresses):
        """ldmatrix.x4.trans: a lane 4 g + t has of each matrix the pairs of bytes g of its rows 2 t and 2 t + 1."""
        of_warps = addresses.reshape(-1, LANES)
        rows = of_warps.reshape(len(of_warps), 4, 8)
        assert not (rows % 16).any()
        assert all(len(set(matrix)) == 8 for matrix in (rows // 16 % 8).reshape(-1, 8))  # banks don't collide
        own = rows[WARP]
        pairs = [self.halfwords(own[np.arange(THREADS), :, 2 * T + i] + 2 * G[:, None]) for i in range(2)]
        return list((pairs[0] | pairs[1] << 16).T)


@pytest.fixture
def in_threads(monkeypatch):
    """Lets `lanes` compute with arrays of all threads; returns words of shared memory, where a table begins at 0."""
    memory = np.full(256 * 64, UNWRITTEN, "uint32")
    operations = {"addi": operator.add, "muli": operator.mul, "andi": operator.and_, "xori": operator.xor}
    operations |= {"shli": operator.lshift, "shrui": operator.rshift}
    monkeypatch.setattr(lanes, "thread_index", lambda: np.arange(THREADS))
    monkeypatch.setattr(lanes, "integer", lambda value: value)
    monkeypatch.setattr(lanes, "operation", lambda name, a, b: operations[name](a, b))
    monkeypatch.setattr(lanes, "pointer", lambda reference, offset: (reference, offset))
    monkeypatch.setattr(lanes, "_as_integer", lambda pointer: pointer)
    monkeypatch.setattr(lanes, "address", lambda table: np.zeros(THREADS, int))
    monkeypatch.setattr(lanes, "choose", lambda values, lane: np.array(values, "float32").view("uint32")[lane % 16])
    monkeypatch.setattr(lanes.Lane, "if_upper_half", lambda lane, no, yes: np.where(lane.t > 1, yes, no))
    monkeypatch.setattr(
        lanes.Lane, "pair", lambda lane, numbers, place: [numbers.view("uint32")[place + i] for i in range(2)]
    )

    def assembly(lines, inputs, n_results, has_side_effects=False):
        if lines[0].startswith("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"):
            ((tile, addresses),) = inputs
            return tile.ldmatrix(addresses)
        if any(line.startswith("ld.shared.b16") for line in lines):
            ((tile, addresses),) = inputs
            return [tile.halfwords(addresses)]
        assert has_side_effects == any("shfl" in line or "st." in line for line in lines)
        warps = [[array[first : first + LANES].tolist() for array in inputs] for first in range(0, THREADS, LANES)]
        found = [executed("\n".join(lines), n_results, arrays, memory) for arrays in warps]
        return list(np.concatenate(np.array(found, "uint32"), axis=1)) if n_results else []

    monkeypatch.setattr(lanes, "assembly", assembly)
    return memory


def stored(layout, shape):
    """Random codes of a tile, and the numbers (rows, columns) that they stand for."""
    draw = np.random.default_rng(0)
    if layout.values is None:
        codes = draw.integers(-128, 128, shape).astype("int8")
        return codes, codes.astype("float32")
    codes = draw.integers(0, 256, (shape[0] // 2, shape[1])).astype("uint8")
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).reshape(shape)
    return codes, np.array(layout.values, "float32")[nibbles]


def operand(registers, dtype):
    """The left operand (128, contracted) that threads hold, as PTX's manual shows it; a warp's rows g, g + 8 are 2 g, 2 g + 1."""
    dtype = np.dtype(dtype)
    each = 4 // dtype.itemsize
    found = np.zeros((16 * THREADS // LANES, len(registers) // 4 * 8 * each), dtype)
    for place, register in enumerate(registers):
        row = 16 * WARP + 2 * G + place % 2
        column = each * (8 * (place // 4) + 4 * (place // 2 % 2) + T)
        for i, value in enumerate(np.ascontiguousarray(register, "uint32").view(dtype).reshape(-1, each).T):
            found[row, column + i] = value
    return found


KINDS = list(LAYOUTS)


def decoded(name, dtype, table=None, has_scales=True):
    """An operand of a tile, and what it should be before it is rounded."""
    codes, values = stored(LAYOUTS[name], (64, 128))
    scales = np.random.default_rng(1).standard_normal(128).astype("float32") if has_scales else None
    registers = fragments._decoded(Tile(codes), scales, table, lanes.Lane(), LAYOUTS[name], dtype)
    return operand(registers, DTYPES[dtype]), (values if scales is None else values * scales).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("has_scales", [True, False])
def test_operands(in_threads, name, dtype, has_scales):
    found, expected = decoded(name, dtype, has_scales=has_scales)
    if name == "nf4" or dtype == "float16" or not has_scales:
        np.testing.assert_array_equal(found, expected.astype(DTYPES[dtype]))
    else:  # bfloat16 scales in two parts
        error = np.abs(found.astype("float64") - expected)
        assert (error <= (2.0**-8 + 2.0**-15) * np.abs(expected)).all()
        assert (found == expected.astype(DTYPES[dtype])).mean() > 0.99


@pytest.mark.parametrize("block, column", [(0, 0), (4, 128), (5, 0), (2, 256)])
def test_scales_beyond_the_weight_are_the_last(in_threads, monkeypatch, block, column):
    """Nothing is read beyond an array: what follows the last step is asked for too."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = Layout((320, 256), LAYOUTS["nf4"].values, 64, 1e30)
    codes, absmax = np.arange(5 * 256), np.arange(5, dtype="float32")
    monkeypatch.setattr(plgpu, "inline_mgpu", lambda **_: lambda run: lambda *arguments: run(None, *arguments))
    for name in ("load", "load_byte"):
        monkeypatch.setattr(lanes, name, lambda array, place: array[place])
    monkeypatch.setattr(lanes, "scalar", int)
    monkeypatch.setattr(lanes, "as_integer", np.asarray)
    monkeypatch.setattr(stored_scales, "_of_threads", lambda numbers, dtype: numbers[:128])
    found, factors = stored_scales.read(codes, [absmax], block, column, layout, interpret=False)
    block, columns = min(block, 4), min(column, 128) + np.arange(128)
    np.testing.assert_array_equal(found, codes.reshape(5, 256)[block, columns])
    np.testing.assert_array_equal(factors, group_of_scale(block, columns, layout))


def fill_table(monkeypatch, values, n_threads):
    for first in range(0, n_threads, THREADS):
        monkeypatch.setattr(lanes, "thread_index", lambda first=first: first + np.arange(THREADS))
        byte_table.fill(object(), values, n_threads // LANES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_threads", [THREADS, 2 * THREADS])
def test_operands_by_table(in_threads, monkeypatch, n_threads, dtype):
    values = LAYOUTS["nf4"].values
    fill_table(monkeypatch, values, n_threads)
    of_lanes, rest = np.split(in_threads.reshape(256, 2 * LANES), 2, axis=1)
    expected = np.array(values, "float16")[np.stack(np.divmod(np.arange(256), 16), -1)].view("uint32")
    np.testing.assert_array_equal(of_lanes, np.broadcast_to(expected, of_lanes.shape))
    assert (rest == UNWRITTEN).all()
    found, exact = decoded("nf4", dtype, table=object())
    ones, _ = decoded("nf4", "float16", table=object(), has_scales=False)
    scales = np.random.default_rng(1).standard_normal(128).astype("float32")
    np.testing.assert_array_equal(found, (ones.astype("float32") * scales[:, None]).astype(DTYPES[dtype]))
    unit = (np.finfo("float16") if dtype == "float16" else ml_dtypes.finfo(dtype)).eps / 2
    assert (np.abs(found.astype("float64") - exact) <= (unit + 1.01 * 2.0**-11) * np.abs(exact)).all()


@pytest.mark.parametrize(
    "tiles, name, dtype, expected",
    [
        (Straight, "nf4", "bfloat16", True),
        (Straight, "nf4", "float16", True),
        (Straight, "int4", "bfloat16", False),
        (Straight, "int8", "bfloat16", False),
        (Transposed, "nf4", "bfloat16", False),
    ],
)
def test_what_has_a_table(tiles, name, dtype, expected):
    assert tiles(LAYOUTS[name], dtype, 2).has_table is expected


@pytest.mark.parametrize(
    "least, greatest, expected", [(0, 1, True), (2.0**-14, 65504, True), (1e-5, 1, False), (1, 1e5, False)]
)
def test_what_a_table_can_hold(least, greatest, expected):
    values = -float(greatest), *[0.5] * 14, float(least)
    assert byte_table.can_hold(values) is expected
    assert Straight(Layout((256, 256), values, 64), "bfloat16", 2).has_table is expected


@pytest.mark.parametrize("value", [2.0**-100, 2.0**-120, -(2.0**119), np.nan])
def test_parts_of_scales(in_threads, value):
    scale = np.full(THREADS, 1.2345678 * value, "float32")
    upper, rest = (
        np.ascontiguousarray(part, "uint32").view(ml_dtypes.bfloat16).astype("float64")
        for part in decoded_words.parts_of(scale.view("uint32"))
    )
    np.testing.assert_allclose((upper + rest) / 64, np.repeat(scale, 2).astype("float64"), rtol=2.0**-16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("first", [0, 64])
def test_transposed_operands(in_threads, name, dtype, first):
    codes, values = stored(LAYOUTS[name], (128, 128))
    scales = np.random.default_rng(1).standard_normal(64).astype("float32")
    expected = (values[:, first : first + 64] * scales).astype(DTYPES[dtype])
    arguments = Tile(codes), scales, lanes.Lane(), first, LAYOUTS[name], dtype
    np.testing.assert_array_equal(operand(transposed_fragments._decoded(*arguments), DTYPES[dtype]), expected)


def test_codes_as_they_are(in_threads):
    codes, _ = stored(LAYOUTS["int8"], (128, 128))
    np.testing.assert_array_equal(operand(fragments._bytes_as_they_are(Tile(codes), lanes.Lane()), "int8"), codes.T)

"""Machine code of functions of rows against the same functions of JAX."""

import importlib.util
import re
import threading

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs on JAX only")
jax = pytest.importorskip("jax")
jnp, lax = jax.numpy, jax.lax

from keras_precision.kernels import native_rows, row_function, rows
from keras_precision.kernels.llvm_values import Uncompilable
from keras_precision.kernels.row_operations import OPERATIONS

TARGET = rows.Target(row_function.look_up, lambda numbers: numbers.max(axis=-1))
# Subnormal numbers are left out: XLA takes them for zeros on a CPU.
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    np.inf,
    -np.inf,
    np.nan,
    0.5,
    -2.5,
    1e-30,
    3e38,
    448.0,
    464.0,
    465.0,
    2.0**-9,
    -(2.0**-10),
]


def natively(function, changed, read=(), scalars=(), row_shapes=None):
    """Returns what compiled code makes of arrays, which have rows along their first axis if not told otherwise."""
    row_shapes = row_shapes or [x.shape[1:] for x in (*changed, *read)]
    run = jax.jit(lambda *x: native_rows.replaced(function, *split(x, changed, read, row_shapes), TARGET))
    return [np.asarray(x) for x in run(*changed, *read, *scalars)]


def split(arrays, changed, read, row_shapes):
    """Returns (changed, read, row_shapes, scalars)."""
    end = len(changed) + len(read)
    return arrays[: len(changed)], arrays[len(changed) : end], row_shapes, arrays[end:]


def assert_same(found, expected, rtol=0.0):
    """Bit for bit but for NaN, or to within some roundings."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if found.dtype.kind in "biu":
        np.testing.assert_array_equal(found, expected)
    else:
        found, expected = found.astype("float32"), expected.astype("float32")
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=0)
        assert (np.signbit(found) == np.signbit(expected))[~np.isnan(expected)].all()


def floats(draw, shape=(6, 64)):
    values = draw.standard_normal(shape).astype("float32") * np.exp2(draw.integers(-20, 20, shape)).astype("float32")
    values.reshape(-1)[: len(SPECIAL)] = SPECIAL
    return values


def integers(draw, dtype="int32", shape=(6, 64)):
    info = jnp.iinfo(dtype)
    values = draw.integers(info.min, int(info.max) + 1, shape).astype(dtype)
    values.reshape(-1)[:3] = 0, info.min, info.max
    return values


def as_integers(x):
    return lax.convert_element_type(x, "int32")


FLOATS = {
    "abs": jnp.abs,
    "add": lambda x, y: x + y,
    "ceil": jnp.ceil,
    "clamp": lambda x, y: lax.clamp(np.float32(-1), x, np.float32(2)),
    "copy": lambda x, y: jnp.copy(x),
    "div": lambda x, y: x / y,
    "eq": lambda x, y: as_integers(x == y),
    "floor": jnp.floor,
    "ge": lambda x, y: as_integers(x >= y),
    "gt": lambda x, y: as_integers(x > y),
    "integer_pow": lambda x, y: x**3,
    "is_finite": lambda x, y: as_integers(lax.is_finite(x)),
    "le": lambda x, y: as_integers(x <= y),
    "lt": lambda x, y: as_integers(x < y),
    "max": jnp.maximum,
    "min": jnp.minimum,
    "mul": lambda x, y: x * y,
    "ne": lambda x, y: as_integers(x != y),
    "neg": lambda x, y: -x,
    "rsqrt": lambda x, y: lax.rsqrt(jnp.abs(x)),
    "select_n": lambda x, y: jnp.where(x > y, x, y),
    "sign": lambda x, y: jnp.sign(x),
    "sqrt": lambda x, y: jnp.sqrt(jnp.abs(x)),
    "square": lambda x, y: lax.square(x),
    "sub": lambda x, y: x - y,
}
ROUNDED = {"rsqrt": 3e-7, "integer_pow": 2e-7}  # in other steps, of 2**-24 each
INTEGERS = {
    "abs": jnp.abs,
    "add": lambda x, y: x + y,
    "and": lambda x, y: x & y,
    "eq": lambda x, y: as_integers(x == y),
    "gt": lambda x, y: as_integers(x > y),
    "lt": lambda x, y: as_integers(x < y),
    "max": jnp.maximum,
    "min": jnp.minimum,
    "mul": lambda x, y: x * y,
    "ne": lambda x, y: as_integers(x != y),
    "neg": lambda x, y: -x,
    "not": lambda x, y: ~x,
    "or": lambda x, y: x | y,
    "shift_left": lambda x, y: lax.shift_left(x, y & 63),
    "shift_right_arithmetic": lambda x, y: lax.shift_right_arithmetic(x, y & 63),
    "shift_right_logical": lambda x, y: lax.shift_right_logical(x, y & 63),
    "sub": lambda x, y: x - y,
    "xor": lambda x, y: x ^ y,
}


def one_operand(function):
    return lambda x, y: function(x) if function in (jnp.abs, jnp.ceil, jnp.floor) else function(x, y)


DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int32", "uint32", "uint8", "int8", "bool"]


def test_every_operation_is_tested():
    elsewhere = {"bitcast_convert_type", "convert_element_type", "copy_p"}
    assert {*FLOATS, *INTEGERS, *elsewhere} == {*OPERATIONS}


@pytest.mark.parametrize("width", ["wide", "narrow", "scalar"])
@pytest.mark.parametrize("name", FLOATS)
def test_operations_of_floats(name, width, draw):
    check(FLOATS[name], floats(draw), floats(draw)[:, ::-1], width, ROUNDED.get(name, 0.0))


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
@pytest.mark.parametrize("name", INTEGERS)
def test_operations_of_integers(name, dtype, draw):
    check(INTEGERS[name], integers(draw, dtype), integers(draw, dtype)[:, ::-1], "wide")


def check(function, x, y, width, rtol=0.0):
    """An operation of numbers of each element, of one a row, or of one number."""
    function = one_operand(function)
    if width == "narrow":
        x, y = x.reshape(-1), y.reshape(-1).copy()
    elif width == "scalar":
        x, y = x[:, :8].copy(), y[:, :8].copy()
        expected = np.asarray(function(x, y))
        run = jax.jit(
            lambda out, a, b: native_rows.replaced(
                lambda changed, read, scalars, target: [changed[0] * 0 + function(*scalars)],
                [out],
                [],
                [(8,)],
                [a, b],
                TARGET,
            )[0]
        )
        for place in np.ndindex(x.shape[0], 3):
            found = run(np.zeros((2, 8), expected.dtype), x[place], y[place])
            assert_same(found, np.full((2, 8), expected[place] + np.zeros((), expected.dtype)), rtol)
        return
    expected = np.asarray(jax.jit(function)(x, y))

    def step(changed, read, scalars, target):
        return [function(*read)]

    (found,) = natively(step, [np.zeros_like(expected)], [x, np.ascontiguousarray(y)])
    assert_same(found, expected, rtol)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_conversions(source, target, draw):
    if source == "float32":
        x = floats(draw)
    elif source == "float8_e4m3fn":
        x = np.arange(256, dtype="uint8").reshape(4, 64).view(jnp.float8_e4m3fn)
    elif source == "bool":
        x = draw.integers(0, 2, (6, 64)).astype(bool)
    elif jnp.issubdtype(source, jnp.floating):
        x = np.asarray(jnp.asarray(floats(draw)).astype(source))
    else:
        x = integers(draw, source)
    if target in ("float16", "bfloat16", "float8_e4m3fn") and source not in ("float32", "float8_e4m3fn", "bool"):
        x = np.asarray(jnp.clip(jnp.asarray(x).astype("float32"), 0, 100).astype(source))  # what float32 holds exactly
    expected = np.asarray(lax.convert_element_type(jnp.asarray(x), target))

    def step(changed, read, scalars, target_):
        return [lax.convert_element_type(read[0], target)]

    (found,) = natively(step, [np.zeros(x.shape, expected.dtype)], [x])
    assert_same(found, expected)


def test_patterns_are_viewed_as_numbers(draw):
    x = floats(draw)
    step = lambda changed, read, *_: [
        lax.bitcast_convert_type(lax.bitcast_convert_type(read[0], "int32") ^ 1, "float32")
    ]
    (found,) = natively(step, [np.zeros_like(x)], [x])
    np.testing.assert_array_equal(found.view("int32"), x.view("int32") ^ 1)


def many_steps(changed, read, scalars, target):
    """Reductions of what depends on reductions, a table, pairs, and what is kept from one walk to the next."""
    weight, codes, scale, pairs = changed
    (gradient,) = read
    rate, keep = scalars
    value = target.look_up(TABLE, codes) * scale[:, None] + gradient
    greatest = target.greatest(jnp.abs(value))
    centred = value / greatest[:, None] - rate
    second = target.greatest(lax.bitcast_convert_type(jnp.abs(centred), "int32"))
    second = lax.bitcast_convert_type(second, "float32")
    new = (centred / second[:, None] * 100 + 100.5).astype("uint8")
    nibbles = lax.broadcast_in_dim(pairs.astype("int32"), (*pairs.shape, 2), (0, 1)) >> jnp.array([4, 0])
    nibbles = (nibbles & 15).reshape(*weight.shape) ^ (codes & 1).astype("int32")
    packed = (nibbles.reshape(*pairs.shape, 2) << jnp.array([4, 0])).sum(-1).astype("uint8")
    return [
        jnp.where(keep, weight, weight - rate * second[:, None] * value),
        jnp.where(keep, codes, new),
        jnp.where(keep, scale, greatest * second),
        jnp.where(keep, pairs, packed),
    ]


TABLE = np.linspace(-1, 1, 256).astype("float32") ** 3


@pytest.mark.parametrize("width", [16, 32, 48, 256, 1024])
@pytest.mark.parametrize("n_rows", [1, 2, 7, 130, 5000])
@pytest.mark.parametrize("keep", [False, True])
def test_walks_through_rows(n_rows, width, keep, draw):
    weight, gradient = draw.standard_normal((2, n_rows, width), dtype="float32")
    codes, pairs = integers(draw, "uint8", (n_rows, width)), integers(draw, "uint8", (n_rows, width // 2))
    changed, scalars = (
        [weight, codes, draw.uniform(1, 2, n_rows).astype("float32"), pairs],
        [np.float32(0.1), np.bool_(keep)],
    )
    by_jax = rows.Target(lambda table, places: jnp.asarray(table)[places], lambda numbers: numbers.max(axis=-1))
    expected = jax.jit(lambda c, r, s: many_steps(c, r, s, by_jax))(changed, [gradient], scalars)
    for one, other in zip(natively(many_steps, changed, [gradient], scalars), expected, strict=True):
        if one.dtype == "uint8" and not keep:  # a number near a whole one may be cut to either side
            assert (np.abs(one.astype(int) - np.asarray(other, int)) <= 1).mean() == 1 and (one == other).mean() > 0.999
        else:
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


def test_arrays_of_any_shape_hold_rows(draw):
    x = draw.standard_normal((3, 5, 64), dtype="float32")
    scale = draw.standard_normal((3, 10), dtype="float32")
    step = lambda changed, *_: [changed[0] * changed[1][:, None], changed[1] + 1]
    found, added = natively(step, [x, scale], row_shapes=[(32,), ()])
    np.testing.assert_array_equal(found, (x.reshape(-1, 32) * scale.reshape(-1)[:, None]).reshape(x.shape))
    np.testing.assert_array_equal(added, scale + 1)


@pytest.mark.default_xla
def test_donated_arrays_are_written_in_place(draw):
    x, codes = jnp.asarray(floats(draw, (64, 8192))), jnp.asarray(integers(draw, "uint8", (64, 8192)))

    def step(changed, read, scalars, target):
        return [changed[0] + 1, changed[1] + np.uint8(1)]

    run = jax.jit(
        lambda *arrays: native_rows.replaced(step, arrays, [], [(256,)] * 2, [], TARGET), donate_argnums=(0, 1)
    )
    program = run.lower(x, codes).compile()
    assert "custom-call" in program.as_text() and " copy" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes == 0
    before = [array.unsafe_buffer_pointer() for array in (x, codes)]
    assert [array.unsafe_buffer_pointer() for array in run(x, codes)] == before


def test_what_is_used_again_is_not_written_over(draw):
    x = draw.standard_normal((6, 64), dtype="float32")
    run = jax.jit(lambda x: (native_rows.replaced(lambda c, *_: [c[0] + 1], [x], [], [(64,)], [], TARGET)[0], x * 2))
    found, twice = run(x)
    np.testing.assert_array_equal(found, x + 1)
    np.testing.assert_array_equal(twice, x * 2)


def test_many_calls_at_a_time(draw):
    """More handlers than XLA has threads wait for no thread that another one holds."""
    arrays = [draw.standard_normal((500, 256), dtype="float32") for _ in range(8)]

    def step(changed, read, scalars, target):
        return [changed[0] / target.greatest(jnp.abs(changed[0]))[:, None]]

    expected = [x / np.abs(x).max(-1, keepdims=True) for x in arrays]
    run = jax.jit(lambda arrays: [native_rows.replaced(step, [x], [], [(256,)], [], TARGET)[0] for x in arrays])
    failed = []

    def call_often():
        for _ in range(20):
            same = [np.array_equal(found, wanted) for found, wanted in zip(run(arrays), expected, strict=True)]
            failed.extend(x for x in same if not x)

    threads = [threading.Thread(target=call_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failed


@pytest.mark.parametrize(
    "step",
    [
        lambda c, *_: [jnp.exp(c[0])],
        lambda c, *_: [jnp.abs(c[0]) ** np.float32(0.3)],
        lambda c, *_: [jnp.cumsum(c[0], axis=-1)],
        lambda c, *_: [c[0][:, ::-1]],
        lambda c, *_: [c[0] - c[0].mean(axis=-1, keepdims=True)],
        lambda c, *_: [(c[0].astype("float16") + 1).astype("float32")],
        lambda c, *_: [jnp.tile(c[0][:, :32], (1, 2))],
        lambda c, *_: [lax.fori_loop(0, 3, lambda i, x: x * 2, c[0])],
    ],
    ids=["exp", "power", "cumsum", "reversed", "mean", "float16", "tiled", "loop"],
)
def test_what_has_no_instruction_is_left_to_a_loop(step, draw):
    x = draw.standard_normal((6, 64), dtype="float32")
    with pytest.raises(Uncompilable):
        natively(step, [x])
    (found,) = jax.jit(lambda x: rows._on_cpu(step, [x], [], [(64,)], [], []))(x)
    np.testing.assert_allclose(found, step([x])[0], rtol=1e-6, atol=1e-6)


def test_what_is_closed_over_must_be_known(draw):
    with pytest.raises(Uncompilable):
        jax.jit(lambda x, y: native_rows.replaced(lambda c, *_: [c[0] + y], [x], [], [(64,)], [], TARGET))(
            floats(draw), floats(draw)[0]
        )


@pytest.mark.parametrize("missing", ["llvmlite", "linux", "other devices"])
def test_a_loop_runs_where_code_can_not(missing, monkeypatch, draw):
    native_rows._is_installed.cache_clear()
    if missing == "llvmlite":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif missing == "linux":
        monkeypatch.setattr(native_rows.sys, "platform", "win32")
    else:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not native_rows.is_there()
    program = jax.jit(lambda x: rows._on_cpu(lambda c, *_: [c[0] + 1], [x], [], [(64,)], [], [])).lower(floats(draw))
    assert not re.search("keras_precision_rows", program.as_text())
    monkeypatch.undo()
    native_rows._is_installed.cache_clear()
    assert native_rows.is_there()


def test_code_is_compiled_once(draw, monkeypatch):
    made = []
    compiled = native_rows._compiled
    monkeypatch.setattr(native_rows, "_compiled", lambda text: made.append(text) or compiled(text))
    step = lambda c, *_: [c[0] * np.float32(1.2345)]
    for n_rows in (3, 5):
        natively(step, [floats(draw, (n_rows, 64))])
    assert len(made) == 1


@pytest.fixture
def draw():
    return np.random.default_rng(0)

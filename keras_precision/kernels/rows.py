"""Runs a function of rows on all rows of arrays, replacing some of them in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_precision import _bridge_variables
from keras_precision.kernels import device, native_rows, row_function
from keras_precision.kernels.compiled import triton_call
from keras_precision.kernels.llvm_values import Uncompilable

# 8 elements a thread: with more of them codecs spill registers (H100, dynamic8: 5.7 ms for 1e9 weights, 6.6 with 16).
_ELEMENTS_OF_A_KERNEL = 256
_WARPS = 1
# A round of a CPU's cores: 2 MB of the float32 values of two slots. With half of it they wait more for each other, and a
# step takes 6 to 9% longer (32M weights on 2 cores, dynamic8, medians in turn).
_ELEMENTS_OF_A_LOOP = 262144
_LANES = 32
_CODES = "uint8"
# XLA's CPU compiler would convert a whole array of float8 in each round. TensorFlow views none as integers.
_STORED_AS = {"jax": {"float8_e4m3fn": _CODES}}.get(keras.backend.backend(), {})
_CHANGED_ON_TENSORFLOW = ("float32", _CODES)
_PARTS = "keras_precision/rows"  # of a graph of TensorFlow


def _look_up(table, places):
    return ops.take(ops.convert_to_tensor(table), ops.cast(places, "int32"))


def _greatest(numbers):
    """Returns the greatest along the last axis, in two steps on a CPU: XLA has vector instructions for the first.

    4M integers in rows of 256 take 0.2 ms, in one step 1.7 (one core, jax 0.10.2).
    """
    width = numbers.shape[-1]
    if width > _LANES and width % _LANES == 0 and not _is_on_gpu():
        numbers = functools.reduce(ops.maximum, (numbers[..., i : i + _LANES] for i in range(0, width, _LANES)))
    return ops.max(numbers, axis=-1)


def _is_on_gpu():
    return keras.backend.backend() == "jax" and device.default().platform == "gpu"


class Target(NamedTuple):
    """What functions of rows leave to where they run.

    Attributes:
        look_up: function of a NumPy array and of integers, which returns the
            array's numbers in those places, all of them within it.
        greatest: function of integers (..., n), which returns the greatest of each n.
        computes: whether numbers are computed in less time than they are looked up.
    """

    look_up: Callable[[np.ndarray, Any], Any] = _look_up
    greatest: Callable[[Any], Any] = _greatest
    computes: bool = False


ANY = Target()
"""Eager or compiled operations."""


def can_run(tensor, dtypes: Iterable[str] = ()) -> bool:
    """Returns whether `replaced` runs here, on some devices in code that is compiled, or will be by `assign_replaced`.

    Args:
        tensor: that the code has.
        dtypes: of the arrays that would be changed.
    """
    is_traced = _IS_TRACED.get(keras.backend.backend())
    if is_traced is None or not is_traced(tensor) or _runner() is None:
        return False
    return keras.backend.backend() != "tensorflow" or all(dtype in _CHANGED_ON_TENSORFLOW for dtype in dtypes)


def _is_in_jaxpr(tensor):
    import jax

    return isinstance(tensor, jax.core.Tracer)


def _is_in_graph(tensor):
    import tensorflow as tf

    is_dense = isinstance(tensor, tf.Tensor) and tensor.shape.is_fully_defined()
    return is_dense and not tf.executing_eagerly() and not tf.distribute.has_strategy()


def replaced(
    function: Callable,
    changed: Sequence,
    read: Sequence,
    row_shapes: Sequence[tuple[int, ...]],
    scalars: Sequence,
    tables: Sequence[np.ndarray],
    keep=None,
) -> list:
    """Returns what a function makes of arrays, computed some rows at a time.

    On a GPU, and on a CPU with JAX and llvmlite, one kernel reads all arrays
    once and writes the changed ones over themselves where they are donated;
    else a loop does.

    Args:
        function: called as function(changed, read, scalars, target) with some
            rows of each array, and with a Target that looks up in `tables`
            only. Returns the new rows of the changed ones, each result
            depending on what is in its own row only.
        changed: arrays of one row after the other, of any shape.
        read: likewise.
        row_shapes: of a row of each of the changed arrays and then of those that are read.
        scalars: arrays of shape ().
        tables: arrays (n,).
        keep: bool array of shape (), whether everything is to stay as it is
            after all; None if not. Selecting afterwards would need copies of
            the arrays.

    Returns:
        The changed arrays.
    """
    arrays = list(changed), list(read), list(row_shapes)
    if keep is None:
        return _runner()(function, *arrays, list(scalars), list(tables))

    def kept_or_new(changed, read, scalars, target):
        import jax

        new = function(changed, read, scalars[:-1], target)
        return [jax.numpy.where(scalars[-1], old, rows) for old, rows in zip(changed, new, strict=True)]

    return _runner()(kept_or_new, *arrays, [*scalars, keep], list(tables))


def assign_replaced(
    function: Callable,
    variables: Sequence,
    read: Sequence,
    row_shapes: Sequence[tuple[int, ...]],
    scalars: Sequence,
    tables: Sequence[np.ndarray],
    keep,
    same: Hashable,
) -> None:
    """Assigns to variables what `replaced` makes of their rows.

    TensorFlow's `fit` compiles nothing with XLA on a machine without an
    accelerator, and neither does a plain tf.function: there XLA compiles this
    alone. Assigning in what it compiles lets it write over what the variables
    hold.

    Args:
        function: as for `replaced`.
        variables: keras.Variables that store rows one after the other.
        read: as for `replaced`.
        row_shapes: likewise.
        scalars: likewise.
        tables: likewise.
        keep: likewise.
        same: functions with equal ones are the same but for the arrays that
            they are called with, and are compiled once.
    """

    def assign(variables, read, scalars):
        new = replaced(function, list(map(_tensor_of, variables)), read, row_shapes, scalars, tables, keep)
        for variable, array in zip(variables, new, strict=True):
            variable.assign(array)

    if keras.backend.backend() == "tensorflow" and not is_in_xla_context():
        assign = _compiled_part(assign, same)
        variables = [variable.value for variable in variables]
    assign(list(variables), list(read), list(scalars))


def _tensor_of(variable):
    return variable.read_value() if hasattr(variable, "read_value") else _bridge_variables.tensor_of(variable)


def is_in_xla_context() -> bool:
    """Returns whether XLA compiles the graph that is being traced (TensorFlow only)."""
    import tensorflow as tf

    return tf.__internal__.get_enclosing_xla_context() is not None


def _compiled_part(function, same):
    """Returns a function compiled by XLA as a part of the graph that is being traced, the same for equal `same`."""
    import tensorflow as tf

    graph = tf.compat.v1.get_default_graph()
    parts = graph.get_collection_ref(_PARTS)
    if not parts:
        parts.append({})
    return parts[0].setdefault(same, tf.function(function, jit_compile=True, autograph=False))


def writes_in_place() -> bool:
    """Returns whether `replaced` is a kernel, whose arguments and results lie in memory as a whole."""
    return _runner() is _by_kernel


def _runner():
    """Returns what runs functions on the device that is computed on by default, None where nothing does."""
    platform = device.platform()
    if platform == "gpu" and platform in _RUNNERS and not device.has_triton():
        return None
    return _RUNNERS.get(platform)


def _rows_of_a_round(shape):
    """Returns how many of an array's rows a loop works on at once."""
    n_rows, width = shape
    most = max(1, min(n_rows, _ELEMENTS_OF_A_LOOP // width))
    # A rest would be compiled on its own.
    return next((size for size in range(most, most // 2, -1) if n_rows % size == 0), most)


def _on_cpu(function, changed, read, row_shapes, scalars, tables):
    if native_rows.is_there():
        try:
            return _by_native_code(function, changed, read, row_shapes, scalars, tables)
        except Uncompilable:
            pass
    return _by_loop(function, changed, read, row_shapes, scalars, tables)


def _by_native_code(function, changed, read, row_shapes, scalars, tables):
    target = Target(row_function.look_up, lambda numbers: numbers.max(axis=-1), computes=True)
    return native_rows.replaced(function, changed, read, row_shapes, scalars, target)


def _as_rows(arrays, row_shapes):
    return [ops.reshape(x, (-1, *shape)) for x, shape in zip(arrays, row_shapes, strict=True)]


def _by_loop(function, changed, read, row_shapes, scalars, tables):
    shapes = [x.shape for x in changed]
    changed, read = _as_rows(changed, row_shapes[: len(changed)]), _as_rows(read, row_shapes[len(changed) :])
    n_rows = changed[0].shape[0]
    size = _rows_of_a_round(changed[0].shape)
    count, rest = divmod(n_rows, size)
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in changed]
    stored = [_STORED_AS.get(dtype, dtype) for dtype in dtypes]

    def made(start, size, arrays):
        """Returns new rows by the places of their arrays."""

        def cut(array):
            return ops.slice(array, _start(start, array), (size, *array.shape[1:]))

        old = [_viewed(cut(x), dtype) for x, dtype in zip(arrays, dtypes, strict=True)]
        new = function(old, [cut(x) for x in read], scalars, ANY)
        return {i: _viewed(x, dtype) for i, (x, dtype) in enumerate(zip(new, stored, strict=True))}

    def put(arrays, new, start):
        return [ops.slice_update(x, _start(start, x), new[i]) if i in new else x for i, x in enumerate(arrays)]

    arrays = list(map(_viewed, changed, stored))
    # XLA computes on one core what it writes into a slice. What takes the most work, codes, it computes on all cores
    # into arrays of their own, as the next round copies them, which is little work.
    late = [i for i, dtype in enumerate(stored) if dtype == _CODES]

    def step(i, arrays, last):
        arrays = put(arrays, last, ops.maximum(i - 1, 0) * size)
        new = made(i * size, size, arrays)
        last = {i: new.pop(i) for i in late}
        return i + 1, put(arrays, new, i * size), last

    def finish(i, arrays, last):
        arrays = put(arrays, last, (i - 1) * size)
        if rest:
            arrays = put(arrays, made(n_rows - rest, rest, arrays), n_rows - rest)
        return i + 1, arrays, last

    state = (ops.convert_to_tensor(0, "int32"), arrays, {i: arrays[i][:size] for i in late})
    state = ops.while_loop(lambda i, *_: i < count, step, state)
    # Outside of a loop XLA would copy whole arrays before it writes into them.
    _, arrays, _ = ops.while_loop(lambda i, *_: i < count + 1, finish, state)
    return [ops.reshape(_viewed(x, dtype), shape) for x, dtype, shape in zip(arrays, dtypes, shapes, strict=True)]


def _viewed(array, dtype):
    return array if keras.backend.standardize_dtype(array.dtype) == dtype else ops.view(array, dtype)


def _start(row, array):
    return row, *(0,) * (len(array.shape) - 1)


def _by_kernel(function, changed, read, row_shapes, scalars, tables, interpret=False):
    import jax
    from jax.experimental import pallas as pl

    shapes = [x.shape for x in changed]
    changed, read = _as_rows(changed, row_shapes[: len(changed)]), _as_rows(read, row_shapes[len(changed) :])
    n_rows, width = changed[0].shape
    size = np.gcd(n_rows, max(1, _ELEMENTS_OF_A_KERNEL // width)).item()

    def kernel(*refs):
        refs = iter(refs)

        def take(arrays):
            return [next(refs) for _ in arrays]

        old, others, numbers, tables_here = take(changed), take(read), take(scalars), take(tables)
        # Kernels load no booleans.
        numbers = [ref[0].astype(x.dtype) for ref, x in zip(numbers, scalars, strict=True)]

        def look_up(table, codes):
            place = next(i for i, other in enumerate(tables) if other is table)
            return tables_here[place][codes.astype("int32")]

        target = Target(look_up, lambda numbers: numbers.max(axis=-1))
        new = function([x[...] for x in old], [x[...] for x in others], numbers, target)
        for ref, rows in zip(refs, new, strict=True):
            ref[...] = rows

    def some_rows(array):
        return pl.BlockSpec((size, *array.shape[1:]), lambda i: (i, *(0,) * (array.ndim - 1)))

    def whole(array):
        return pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)

    numbers = [x.reshape(1).astype("int32" if x.dtype == bool else x.dtype) for x in scalars]
    tables_in = [jax.numpy.asarray(table) for table in tables]
    run = triton_call(
        kernel,
        grid=(n_rows // size,),
        in_specs=[*map(some_rows, [*changed, *read]), *map(whole, [*numbers, *tables_in])],
        out_specs=[some_rows(x) for x in changed],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed],
        input_output_aliases={i: i for i in range(len(changed))},
        warps=_WARPS,
        interpret=interpret,
    )
    new = run(*changed, *read, *numbers, *tables_in)
    return [x.reshape(shape) for x, shape in zip(new, shapes, strict=True)]


_IS_TRACED = {"jax": _is_in_jaxpr, "tensorflow": _is_in_graph}
_RUNNERS = {"jax": {"cpu": _on_cpu, "gpu": _by_kernel}, "tensorflow": {"cpu": _by_loop}}.get(
    keras.backend.backend(), {}
)

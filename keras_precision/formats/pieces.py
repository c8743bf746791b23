"""Work on a matrix in pieces, so that no second matrix of its size is needed."""

import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_precision import hardware
from keras_precision.formats import host
from keras_precision.kernels.compiled import compiled

LARGE = 2**20
"""Elements from which on a matrix is worth the 0.2 s that XLA takes to compile; NumPy encodes as many in 15 ms."""

# Elements a piece: NumPy's arrays of so many stay in a core's second-level cache, XLA's work makes up for the call.
_HOST_ELEMENTS = 2**17
_COMPILED_ELEMENTS = 2**19
_COLUMNS = 2048
# Fewer pieces are not worth threads; more threads would take a tenth of a 400 MB weight's memory for their pieces.
_FEW = 8
_MAX_THREADS = 4


def as_matrix(weight):
    """Returns a weight as what can be cut into pieces: a NumPy array, or a large tensor where its accelerator has it.

    Raises:
        ValueError: it is no matrix of floats with elements.
    """
    if isinstance(weight, keras.Variable):
        weight = ops.stop_gradient(weight.value)  # a tensor, where TensorFlow's variables become a copy
    if not (ops.is_tensor(weight) and not hardware.device_class().startswith("cpu")):
        weight = np.asarray(weight)  # no copy of what lies in the host's memory
    shape, dtype = tuple(weight.shape), keras.backend.standardize_dtype(weight.dtype)
    if len(shape) != 2 or 0 in shape or not dtype.startswith(("float", "bfloat")):
        raise ValueError(
            "Expected a float weight of shape (k, n), k and n > 0. "
            f"Received: shape={shape}, dtype={dtype}. Reshape it so that axis 0 is the contracted one."
        )
    return weight if shape[0] * shape[1] >= LARGE else np.asarray(weight)


@dataclass(frozen=True)
class Grid:
    """How a matrix is cut: into pieces of one shape, those at the ends padded with zeros.

    Attributes:
        rows: of a piece.
        columns: of a piece.
        block_size: rows of a block; divides those of a piece.
        is_compiled: whether XLA works on the pieces, NumPy otherwise.
    """

    rows: int
    columns: int
    block_size: int
    is_compiled: bool

    @classmethod
    def of(cls, shape: tuple[int, int], block_size: int, is_compiled: bool) -> "Grid":
        """Returns the grid for a matrix (k, n).

        Compiled pieces have few shapes, since each takes XLA's time anew: a
        power of two or a multiple of 256 columns, a multiple of 128 rows.
        """
        k, n = shape
        if not is_compiled:
            columns = min(n, _COLUMNS)
            rows = max(_HOST_ELEMENTS // columns // block_size, 1) * block_size
            return cls(min(rows, _round_up(k, block_size)), columns, block_size, False)
        columns = _share(n, min(_COLUMNS, max(_COMPILED_ELEMENTS // block_size, 256)))
        columns = 1 << (columns - 1).bit_length() if columns < 256 else _round_up(columns, 256)
        rows = _share(k, max(_COMPILED_ELEMENTS // columns, block_size))
        return cls(_round_up(rows, max(block_size, 128)), columns, block_size, True)


def _share(size, limit):
    """The size of each of the fewest equal shares of at most `limit`."""
    return -(-size // -(-size // limit))


def _round_up(size, unit):
    return -(-size // unit) * unit


def fill(outputs: tuple[np.ndarray, ...], work: Callable, weight, grid: Grid, per_column: tuple[np.ndarray, ...] = ()):
    """Calls `work` on each piece and puts what it returns where it belongs.

    Args:
        outputs: arrays to fill, of n columns and as many rows as the weight
            has groups of some number of rows, the last one maybe not whole.
        work: (run, grouped, *per_column) -> an array for each output, with the
            rows and columns of the piece. `grouped` is float32 (n_blocks,
            block_size, columns); `run(function, *arguments)` gives
            function(xp, *arguments) for a function without state, where xp is
            `host`, or keras.ops and the function compiled.
        weight: what `as_matrix` returned.
        grid: how to cut it.
        per_column: arrays (1, n) that `work` gets its columns' part of.
    """
    k, n = weight.shape
    run = _run_compiled if grid.is_compiled else _run_on_host
    buffers = threading.local()

    def fill_piece(row, column):
        columns = slice(column, column + grid.columns)
        grouped = _grouped_piece(weight[row : row + grid.rows, columns], grid, buffers)
        arrays = work(run, grouped, *(_padded(array[:, columns], (1, grid.columns)) for array in per_column))
        for output, array in zip(outputs, arrays, strict=True):
            first = row * len(array) // grid.rows
            room = output[first : first + len(array), columns]
            room[...] = np.asarray(array)[: room.shape[0], : room.shape[1]]

    places = list(itertools.product(range(0, k, grid.rows), range(0, n, grid.columns)))
    fill_piece(*places[0])  # by itself, so that it is compiled once
    with ThreadPoolExecutor(_threads() if len(places) > _FEW else 1) as pool:
        for done in [pool.submit(fill_piece, *place) for place in places[1:]]:
            done.result()


def _threads():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, _MAX_THREADS)


def _run_on_host(function, *arguments):
    with np.errstate(invalid="ignore"):  # infinities are found in the results
        return function(host, *arguments)


def _run_compiled(function, *arguments):
    return _compiled(function)(*arguments)


@functools.cache
def _compiled(function):
    return compiled(functools.partial(function, ops))


def _grouped_piece(part, grid, buffers):
    """Returns part of a weight as float32 (n_blocks, block_size, columns), padded with zeros to the size of a piece."""
    shape = (grid.rows, grid.columns)
    grouped = (-1, grid.block_size, grid.columns)
    if not isinstance(part, np.ndarray):
        return ops.reshape(ops.cast(_padded(part, shape), "float32"), grouped)
    if not grid.is_compiled:
        return _padded(host.cast(part, "float32"), shape).reshape(grouped)
    if not hasattr(buffers, "piece"):
        buffers.piece = _aligned(shape)
    rows, columns = part.shape
    buffers.piece[rows:] = 0
    buffers.piece[:rows, columns:] = 0
    with np.errstate(over="ignore"):
        buffers.piece[:rows, :columns] = part
    piece = buffers.piece.reshape(grouped)
    # What is to go to an accelerator goes there once, for all functions that are run on it.
    return piece if hardware.device_class().startswith("cpu") else ops.convert_to_tensor(piece)


def _aligned(shape):
    """An empty float32 array at a multiple of 64 bytes: JAX takes it as it is, where it copies others (3 ns a number)."""
    memory = np.empty(shape[0] * shape[1] * 4 + 64, "uint8")
    start = -memory.ctypes.data % 64
    return memory[start : start + memory.size - 64].view("float32").reshape(shape)


def _padded(array, shape):
    padding = [(0, size - have) for size, have in zip(shape, array.shape, strict=True)]
    if not any(after for _, after in padding):
        return array
    return np.pad(array, padding) if isinstance(array, np.ndarray) else ops.pad(array, padding)


def check_finite(scale: np.ndarray, weight, block_size: int) -> None:
    """Raises ValueError if the weight holds what is not finite in float32, naming the first place.

    Args:
        scale: (n_blocks, n), not finite where a block of the weight is not.
        weight: what `as_matrix` returned.
        block_size: rows a block.
    """
    wrong = np.argwhere(~np.isfinite(scale))
    if len(wrong):
        block, column = (int(index) for index in wrong[0])
        rows = np.asarray(weight[block * block_size : (block + 1) * block_size, column])
        row = int(np.argmin(np.isfinite(host.cast(rows, "float32"))))
        raise ValueError(
            "Expected a weight that is finite in float32. "
            f"Received: {rows[row]} at [{block * block_size + row}, {column}]. "
            "Quantize weights from before they overflowed."
        )

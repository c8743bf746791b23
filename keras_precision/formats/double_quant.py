"""Scales stored as 8-bit codes (Dettmers et al. 2023, QLoRA, section 3, "Double Quantization")."""

from functools import cache

import numpy as np
from keras import ops

from keras_precision.formats import blocks
from keras_precision.formats.base import Part
from keras_precision.kernels.layout import SCALES_PER_BLOCK

# The arrays that this takes at once fit in a core's second-level cache.
_BLOCKS_AT_ONCE = 64
# Points of the even grid on [-1, 1] to which bitsandbytes rounds on a CPU before it takes the nearest code.
_GRID_POINTS = 65536
_GRID_STEPS = np.float32((_GRID_POINTS - 1) / 2)


@cache
def dynamic_map() -> np.ndarray:
    """Returns the 256 values, ascending, of 8-bit dynamic codes (Dettmers et al. 2022, 8-bit optimizers, section 1.3).

    The values of decade i, for i from 0 to 6, are 10**(i - 6) times the middles
    of the 2**i equal intervals of [0.1, 1], with both signs; 0 and 1 complete
    them. They are rounded as bitsandbytes rounds them: an interval's end is
    start + j * step in the lower half and end - j * step in the upper one, each
    with one rounding.
    """
    start, end = np.float32(0.1), np.float32(1)
    values = [np.float32(0), end]
    for decade in range(7):
        intervals = 2**decade
        step = np.float64((end - start) / np.float32(intervals))
        index = np.arange(intervals + 1)
        ends = np.where(index <= intervals // 2, start + step * index, end - step * (intervals - index))
        ends = ends.astype("float32")
        middles = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [*middles, *-middles]
    return np.sort(np.array(values, "float32"))


@cache
def _grid_codes():
    """uint8 (65536,): the code nearest to each point of the grid."""
    values = dynamic_map().astype("float64")
    grid = np.arange(_GRID_POINTS) / float(_GRID_STEPS) - 1
    return np.searchsorted((values[:-1] + values[1:]) / 2, grid).astype("uint8")


def parts(scale_shape: tuple[int, int]) -> dict[str, Part]:
    """Returns what `encode` stores of scales of shape (n_blocks, n)."""
    n_blocks, n = scale_shape
    return {
        "scale_codes": Part((n_blocks, n), "uint8", (0, 1)),
        "scale_absmax": Part((blocks.count(n_blocks * n, SCALES_PER_BLOCK),), "float32", (None,)),
        "scale_offset": Part((), "float32", ()),
    }


def encode(scale: np.ndarray) -> dict[str, np.ndarray]:
    """Returns 8-bit codes of scales.

    A scale is approximately dynamic_map[code] * absmax + offset: the offset is
    the mean of all, and each absmax is the greatest distance from it among 256
    scales, taken in the order of the transposed matrix (n, n_blocks). The
    error is at most 0.0071 * absmax, half of the map's widest gap, and codes
    equal those that bitsandbytes gives on a CPU.

    Args:
        scale: float32 (n_blocks, n), finite.
    """
    offset = np.float32(np.mean(scale, dtype="float64"))
    distances = np.ravel(scale.T)
    codes = np.empty(distances.size, "uint8")
    absmax = np.empty(blocks.count(distances.size, SCALES_PER_BLOCK), "float32")
    for start in range(0, absmax.size, _BLOCKS_AT_ONCE):
        piece = slice(start * SCALES_PER_BLOCK, (start + _BLOCKS_AT_ONCE) * SCALES_PER_BLOCK)
        distance = distances[piece] - offset
        firsts = np.arange(0, distance.size, SCALES_PER_BLOCK)
        greatest = np.maximum.reduceat(np.abs(distance), firsts)
        greatest[greatest < blocks.SMALLEST] = 0
        absmax[start : start + _BLOCKS_AT_ONCE] = greatest
        reciprocal = 1 / np.where(greatest == 0, np.float32(np.inf), greatest)
        distance *= np.repeat(reciprocal, SCALES_PER_BLOCK)[: distance.size]
        position = (distance + np.float32(1)) * _GRID_STEPS + np.float32(0.5)
        np.take(_grid_codes(), position.astype("int32"), out=codes[piece], mode="clip")
    return {
        "scale_codes": np.ascontiguousarray(codes.reshape(scale.shape[::-1]).T),
        "scale_absmax": absmax,
        "scale_offset": np.array(offset),
    }


def arrays(parts) -> list:
    """Returns what kernels take as scales: float32 ones or, to be expanded, codes, absmax, offset and the map."""
    if "scale" in parts:
        return [parts["scale"]]
    stored = [parts[name] for name in ("scale_codes", "scale_absmax", "scale_offset")]
    return [*stored, ops.convert_to_tensor(dynamic_map())]


def decode(parts, n_blocks: int, largest, columns=None):
    """Returns the scales that the parts stand for.

    Args:
        parts: tensors, as `parts` describes them.
        n_blocks: blocks a column.
        largest: float32 number that no scale's magnitude may exceed.
        columns: integer tensor (m,), the columns wanted; None for all.

    Returns:
        float32 tensor (n_blocks, n), or (n_blocks, m).
    """
    codes = parts["scale_codes"]
    if columns is None:
        columns = ops.arange(codes.shape[1], dtype="int32")
    else:
        codes = ops.take(codes, columns, axis=1)
    position = ops.cast(columns, "int32") * n_blocks + ops.expand_dims(ops.arange(n_blocks, dtype="int32"), 1)
    absmax = ops.take(parts["scale_absmax"], ops.floor_divide(position, SCALES_PER_BLOCK))
    product = ops.take(ops.convert_to_tensor(dynamic_map()), ops.cast(codes, "int32")) * absmax
    # 8 bits may take a scale beyond what is finite. And XLA contracts a product and a sum into one operation that rounds
    # once, which it can't do with the minimum between them.
    offset = parts["scale_offset"]
    return ops.maximum(ops.minimum(product, largest - offset), -largest - offset) + offset

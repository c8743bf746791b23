"""Blocks of rows that share a scale."""

import numpy as np
from keras import ops

from keras_precision.formats import host

TINY = np.finfo("float32").tiny
"""The smallest normal float32 number, 2**-126. Lesser numbers count as zeros, since some devices flush them to zero."""

SMALLEST = np.float32(2.0**-110)
"""Blocks whose numbers all lie below count as zeros.

Then every scale times every code's value is a normal number or zero, since the
least of both are 1 / 127 and 1 / 192; and so is a scale's reciprocal.
"""

UNIT = np.float32(256)
"""Numbers are divided by scales in multiples of 1 / UNIT: a scale above 2**126 has a subnormal reciprocal."""


def count(rows: int, block_size: int) -> int:
    """Returns the number of blocks that hold `rows` rows."""
    return -(-rows // block_size)


def absmax(xp, grouped):
    """Returns the greatest magnitude of each block; NaN or inf where a block holds one.

    Args:
        xp: `keras.ops` or `host`.
        grouped: float32 array or tensor (n_blocks, block_size, n).

    Returns:
        float32 (n_blocks, n).
    """
    # Bit patterns without the sign are in the order of magnitudes, NaN above inf, while XLA's greatest float on a CPU
    # (jax 0.10) passes over NaN.
    magnitudes = xp.bitwise_and(xp.view(grouped, "int32"), np.int32(0x7FFFFFFF))
    return xp.view(xp.max(magnitudes, axis=1), "float32")


def absmax_of_piece(run, grouped) -> np.ndarray:
    """Returns what `absmax` does, as NumPy array, of one of the pieces of `pieces.fill`."""
    # On a CPU XLA takes two to three times as long as NumPy.
    return absmax(host, grouped) if isinstance(grouped, np.ndarray) else np.asarray(run(absmax, grouped))


def leans_up(xp, grouped):
    """Returns whether the number of greatest magnitude is positive, and no negative one has the same.

    Args:
        xp: `keras.ops` or `host`.
        grouped: float32 array or tensor (n_blocks, block_size, n).

    Returns:
        bool (n_blocks, n); of no meaning where a block holds NaN.
    """
    return xp.max(grouped, axis=1) > -xp.min(grouped, axis=1)


def largest_scale(reach) -> np.float32:
    """Returns the scale that is still finite, with some room for rounding, when it is multiplied with `reach`."""
    return np.finfo("float32").max / np.float32(reach) * np.float32(1 - 2**-20)


def scale_of(absmax: np.ndarray, reach) -> np.ndarray:
    """Returns the scales with which `reach` stands for the greatest magnitudes of blocks.

    NumPy's division rounds to nearest; a GPU's may not, and codes are to be the
    same wherever they are made.

    Args:
        absmax: float32, what the function of this name returned.
        reach: float32 number, >= 1.

    Returns:
        float32 array, 0 or >= 2**-117; not finite where `absmax` isn't.
    """
    scale = absmax / np.float32(reach)
    scale[absmax < SMALLEST] = 0
    return np.where(np.isfinite(absmax), np.minimum(scale, largest_scale(reach)), absmax)


def reciprocal(scale: np.ndarray) -> np.ndarray:
    """Returns UNIT / scale, and 0 where the scale is 0.

    Args:
        scale: what `scale_of` returned.
    """
    return np.float32(1) / np.where(scale == 0, np.float32(np.inf), scale / UNIT)


def spread(scale, block_size: int, rows: int):
    """Returns the scale of each row.

    Args:
        scale: tensor (ceil(rows / block_size), n).
        block_size: rows a block.
        rows: of the result.

    Returns:
        Tensor (rows, n).
    """
    n_blocks, n = ops.shape(scale)  # n is not known where a table's rows are looked up for batches of any size
    repeated = ops.broadcast_to(ops.expand_dims(scale, 1), (n_blocks, block_size, n))
    return ops.reshape(repeated, (n_blocks * block_size, n))[:rows]

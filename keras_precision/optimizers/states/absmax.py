"""The number of greatest magnitude in each block of a slot."""

from keras import ops

from keras_precision.kernels.rows import ANY, Target

SMALLEST = 2.0**-100
"""Blocks whose magnitudes all lie below count as zeros.

Then every product of a scale and a code's value, 2**-22 at least, is a normal
number: on some devices subnormal ones are zeros.
"""

_INF = float("inf")
_MAGNITUDE = 0x7FFFFFFF
_ORDER = -_MAGNITUDE  # the first bit and the last one


def absmax(grouped, target: Target = ANY):
    """Returns the greatest magnitude of each block, 0 where it is below SMALLEST, NaN where it is not finite.

    Args:
        grouped: float32 tensor (..., block_size).
        target: what it runs on.

    Returns:
        float32 tensor (...).
    """
    return _checked(ops.view(target.greatest(_magnitude(ops.view(grouped, "int32"))), "float32"))


def peak(grouped, target: Target = ANY):
    """Returns `absmax` with the sign of the number that has it; of two, one of each sign, the positive counts."""
    patterns = ops.view(grouped, "int32")
    # One reduction: the pattern's sign bit goes to the end, so that magnitudes come first, and the flipped bits put
    # these in the integers' order and the positive number above the negative one.
    keys = ops.left_shift(patterns, 1) ^ (ops.right_shift(patterns, 31) & 1) ^ _ORDER
    greatest = target.greatest(keys) ^ _ORDER
    pattern = (ops.right_shift(greatest, 1) & _MAGNITUDE) | ops.left_shift(greatest, 31)
    return _checked(ops.view(pattern, "float32"))


def is_positive(grouped):
    """Returns which numbers are positive, subnormal ones included, which compiled code on a CPU takes for zeros."""
    # By pattern. "Without its sign, not 0" would not do: LLVM makes a comparison of floats of it (jax 0.10).
    return ops.view(grouped, "int32") > 0


def reciprocal(scale, unit: float = 1.0):
    """Returns unit / scale, and 0 where the scale is 0, with an axis to multiply blocks with.

    XLA would divide a block by a tensor as this does, but with a reciprocal of
    1 / scale: above 2**126 that is subnormal, and the whole block would be 0.

    Args:
        scale: float32 tensor (...), 0 or >= 2**-110.
        unit: power of two that makes the reciprocal of the largest scale normal.

    Returns:
        float32 tensor (..., 1).
    """
    return (unit / ops.where(scale == 0, _INF, scale))[..., None]


def _magnitude(patterns):
    """Returns the patterns without their signs: as integers they are in the numbers' order, NaN above all."""
    # XLA's greatest float on a CPU (jax 0.10) passes over NaN.
    return patterns & _MAGNITUDE


def _checked(number):
    magnitude = ops.abs(number)
    return ops.where(magnitude < _INF, ops.where(magnitude < SMALLEST, 0.0, number), float("nan"))

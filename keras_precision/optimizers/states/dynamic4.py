"""4-bit codes in blocks (Li et al. 2023, "Memory Efficient Optimizers with 4-bit States")."""

from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_precision.optimizers.states import absmax
from keras_precision.optimizers.states.base import StateFormat, register_state_format
from keras_precision.optimizers.states.dynamic_map import DynamicMap, dynamic_values

_INTEGERS = np.float32(2**23)  # from here to 2**24 a float32 is its integer, and so are its last bits
SIGNED = DynamicMap(dynamic_values(4, is_signed=True))


@dataclass(frozen=True)
class Dynamic4(StateFormat):
    """Stores a signed value[i] as scale[block of i] * map[codes[i]], an unsigned one by its root.

    Signed, as `Dynamic8` with 16 values: the error is at most 0.1125 times the
    block's greatest magnitude, and zeros stay zero.

    Unsigned, value[i] is (scale[block of i] * (codes[i] + 1) / 16)**2, the
    scale the greatest root: a root's error is at most 1/32 of the greatest, and
    1/16 below the least value. There is no zero among the values (section 4.1):
    numbers below 1/256 of the block's greatest, zeros included, become that, and
    an Adam whose second moment is too large makes a smaller step.
    """

    def tables(self, is_signed):
        """Returns the values of the codes."""
        return (SIGNED.array,) if is_signed else ()

    def _quantized(self, grouped, is_signed, target):
        if is_signed:
            scale = absmax.peak(grouped, target)
            return SIGNED.nearest(grouped, scale), scale
        scale = ops.sqrt(absmax.absmax(grouped, target))
        sixteenths = ops.sqrt(ops.abs(grouped)) * absmax.reciprocal(scale, 16.0)
        # The sum's last bits are the nearest integer. Floats would be cut to [1, 16] and converted in five times as
        # many instructions, most of them for NaN.
        nearest = ops.view(sixteenths + _INTEGERS, "int32") - int(_INTEGERS.view("int32"))
        return ops.clip(nearest, 1, 16) - 1, scale

    def _dequantized(self, codes, scale, is_signed, target):
        if is_signed:
            return SIGNED.decode(codes, target) * scale
        return ops.square(ops.cast(ops.cast(codes, "int32") + 1, "float32") * (scale * (1 / 16)))

    def _stored(self, codes):
        if codes.shape[-1] % 2:
            codes = ops.pad(codes, [[0, 0]] * (len(codes.shape) - 1) + [[0, 1]])
        pairs = ops.reshape(codes, (*codes.shape[:-1], codes.shape[-1] // 2, 2))
        # Slices of every second code would make XLA compute them twice: 8e7 numbers a second on a CPU against 3e8.
        return ops.cast(ops.sum(ops.left_shift(pairs, _shifts(pairs)), axis=-1), "uint8")

    def _loaded(self, codes, cols):
        pairs = ops.broadcast_to(ops.cast(codes, "int32")[..., None], (*codes.shape, 2))
        nibbles = ops.right_shift(pairs, _shifts(pairs)) & 15
        return ops.reshape(nibbles, (*codes.shape[:-1], 2 * codes.shape[-1]))[..., :cols]


def _shifts(pairs):
    """Returns the places of nibbles in a byte, as many as there are pairs: the first is the high one."""
    return ops.broadcast_to(4 - 4 * ops.arange(2, dtype="int32"), pairs.shape)


DYNAMIC4 = register_state_format(Dynamic4("dynamic4", bits=4, block_size=128))

"""8-bit dynamic codes in blocks (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization")."""

from dataclasses import dataclass

from keras import ops

from keras_precision.formats.double_quant import dynamic_map
from keras_precision.optimizers.states import absmax
from keras_precision.optimizers.states.base import StateFormat, register_state_format
from keras_precision.optimizers.states.dynamic_map import DynamicMap, dynamic_values

SIGNED = DynamicMap(tuple(dynamic_map().tolist()))
UNSIGNED = DynamicMap(dynamic_values(8, is_signed=False))


@dataclass(frozen=True)
class Dynamic8(StateFormat):
    """Stores value[i] as scale[block of i] * map[codes[i]].

    The scale is the block's number of greatest magnitude, with its sign if the
    slot is signed: it stands for 1, which is among the values where -1 is not.
    The error is at most half of the map's widest gap times the greatest
    magnitude, 0.0071 signed and 0.0036 unsigned. Of a number within 1, 2 or 3
    decades of the greatest it is at most 0.062, 0.11 or 0.18 of the number
    signed, and 0.033, 0.062 or 0.11 unsigned. Zeros stay zero. Positive numbers
    of an unsigned slot are raised to the least value, 3.25e-7 of the greatest.
    """

    def tables(self, is_signed):
        """Returns the values of the codes."""
        return ((SIGNED if is_signed else UNSIGNED).array,)

    def _quantized(self, grouped, is_signed, target):
        if is_signed:
            scale = absmax.peak(grouped, target)
            return SIGNED.nearest(grouped, scale), scale
        scale = absmax.absmax(grouped, target)
        least = ops.cast(absmax.is_positive(grouped), "int32")
        return ops.maximum(UNSIGNED.nearest(grouped, scale), least), scale

    def _dequantized(self, codes, scale, is_signed, target):
        return (SIGNED if is_signed else UNSIGNED).decode(codes, target) * scale


DYNAMIC8 = register_state_format(Dynamic8("dynamic8", bits=8, block_size=256))

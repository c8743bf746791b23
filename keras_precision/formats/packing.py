"""Two 4-bit codes a byte."""

import numpy as np
from keras import ops


def pack(codes):
    """Returns bytes that hold the codes of two rows each, the even row in the high nibble.

    Args:
        codes: uint8 array or tensor (2 * m, n), < 16.

    Returns:
        uint8 (m, n).
    """
    return codes[0::2] * np.uint8(16) + codes[1::2]


def unpack(packed, rows: int):
    """Returns the codes that `pack` packed.

    Args:
        packed: uint8 tensor (ceil(rows / 2), ...).
        rows: of the result; if odd, the last low nibble is padding.

    Returns:
        uint8 tensor (rows, ...).
    """
    low = ops.bitwise_and(packed, ops.convert_to_tensor(15, "uint8"))
    nibbles = ops.stack([ops.right_shift(packed, 4), low], axis=1)
    return ops.reshape(nibbles, (-1, *ops.shape(packed)[1:]))[:rows]

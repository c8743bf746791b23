"""NumPy under the names of keras.ops that encoding uses."""

import numpy as np

bitwise_and = np.bitwise_and
max = np.max
min = np.min
minimum = np.minimum
reshape = np.reshape
round = np.rint
where = np.where


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """Returns `x` as `dtype`; numbers that it can't hold become inf."""
    if x.dtype == bool and dtype == "uint8":
        return x.view(dtype)
    with np.errstate(over="ignore"):
        return x.astype(dtype, copy=False)


def view(x: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the bits of `x` as numbers of another dtype of the same width."""
    return x.view(dtype)

"""How the backend multiplies float32 matrices."""

from collections.abc import Callable
from typing import Literal, get_args

import keras

MatmulPrecision = Literal["highest", "high", "default"]


def set_matmul_precision(precision: MatmulPrecision) -> None:
    """Sets how float32 matrix products and convolutions are computed, from now on and on all devices.

    16-bit and float64 products stay as they are. Functions that are compiled
    already are compiled again on JAX; on TensorFlow the device's kernels ask
    each time.

    | precision | meaning | JAX | TensorFlow | PyTorch |
    |---|---|---|---|---|
    | "highest" | 24 significant bits | "highest" | TF32 off | "highest" |
    | "high" | about 11 bits or more, where that is faster: TF32 on GPUs from Ampere on, three bfloat16 products on TPUs | "high" | TF32 on | "high" |
    | "default" | what the backend does if not told | TF32 on such GPUs, bfloat16 on TPUs | TF32 on | "highest", convolutions in TF32 |

    `describe().default_matmul_precision` tells what is set, in the backend's
    own words.

    Args:
        precision: "highest", "high" or "default".

    Raises:
        ValueError: another word, or a backend without such a setting.

    Example:
        >>> from keras_precision import hardware
        >>> hardware.set_matmul_precision("highest")
        >>> hardware.describe().default_matmul_precision in ("highest", "float32")
        True
        >>> hardware.set_matmul_precision("default")
    """
    if precision not in get_args(MatmulPrecision):
        raise ValueError(
            f"Expected a precision in {get_args(MatmulPrecision)}. Received: precision={precision!r}. Pass 'high' for "
            "TF32 on a GPU, 'highest' for float32."
        )
    backend = keras.backend.backend()
    if backend not in _SETTERS:
        raise ValueError(
            f"Expected a backend in {sorted(_SETTERS)}. Received: '{backend}', which has no such setting. "
            "Set KERAS_BACKEND to one of them."
        )
    _SETTERS[backend](precision)


def _set_jax(precision):
    import jax

    jax.config.update("jax_default_matmul_precision", None if precision == "default" else precision)


def _set_tensorflow(precision):
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(precision != "highest")


def _set_torch(precision):
    import torch

    torch.set_float32_matmul_precision("highest" if precision == "default" else precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


_SETTERS: dict[str, Callable[[MatmulPrecision], None]] = {
    "jax": _set_jax,
    "tensorflow": _set_tensorflow,
    "torch": _set_torch,
}

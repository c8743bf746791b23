"""The check of a layer's dtypes against the device that it builds on."""

import warnings
from collections.abc import Iterable
from typing import Any

import keras

from keras_precision.dtypes import is_float
from keras_precision.dtypes import name
from keras_precision.hardware.cells import X64_IS_OFF
from keras_precision.hardware.matrix import support_matrix


class PrecisionWarning(UserWarning):
    """Warns that a dtype runs, but worse than the user will expect."""


# What passed before, by dtype, backend and the backend's settings.
_PASSED: set[tuple[Any, ...]] = set()
_WARNED: set[str] = set()


def check_dtypes(dtypes: Iterable[Any], layer_path: str | None = None) -> None:
    """Raises or warns if the current device can't run floating dtypes well.

    Called for every layer that builds: once a dtype has passed on a backend
    and its settings, it costs one set lookup. float32 always passes, without
    a look at the device.

    Args:
        dtypes: Names or dtype objects. None and non-floating ones are
            ignored.
        layer_path: Path of the layer, for the messages.

    Raises:
        ValueError: If the device or the backend can't compute in one of them:
            float64 on JAX without `jax_enable_x64`, float8 on TensorFlow.

    Warns:
        PrecisionWarning: Once a process for each dtype that the support matrix
            calls "slow".

    Example:

    >>> from keras_precision import hardware
    >>> hardware.check_dtypes(["float32", "int32"], layer_path="dense")
    """
    for dtype in dtypes:
        if dtype is None or dtype == "float32":
            continue
        key = (dtype, *_settings())
        if key in _PASSED:
            continue
        if is_float(dtype):
            _check(name(dtype), layer_path)
        _PASSED.add(key)


def _settings() -> tuple[Any, ...]:
    """Returns what the answer for a dtype depends on, cheaply."""
    backend = keras.config.backend()
    if backend != "jax":
        return (backend,)
    import jax

    return backend, jax.config.jax_enable_x64, jax.config.jax_default_device


def _check(dtype: str, layer_path: str | None) -> None:
    cell = support_matrix().current(dtype)
    where = "" if layer_path is None else f" in layer '{layer_path}'"
    if cell == X64_IS_OFF:
        raise ValueError(
            "Expected dtypes that JAX keeps while jax_enable_x64 is off. "
            f"Received: dtype='{dtype}'{where}, which JAX would silently make "
            "float32. Call keras_precision.hardware.enable_float64() before "
            "building the model, set the environment variable "
            "JAX_ENABLE_X64=1, or use float32."
        )
    if cell.status == "unsupported":
        raise ValueError(
            "Expected a dtype that this device computes in. Received: "
            f"dtype='{dtype}'{where} on the {keras.config.backend()} backend. "
            f"{cell.reason} Use bfloat16 or float32."
        )
    if cell.status == "slow" and dtype not in _WARNED:
        # Marked first: under "error" filters the warning leaves as an exception.
        _WARNED.add(dtype)
        warnings.warn(
            "Expected a dtype that this device runs at least about as fast as "
            f"float32. Received: dtype='{dtype}'{where} on the "
            f"{keras.config.backend()} backend. {cell.reason} Use "
            "float32, or mixed_bfloat16 for speed.",
            PrecisionWarning,
            stacklevel=3,
        )


def enable_float64() -> None:
    """Makes float64 available: turns on `jax_enable_x64` under JAX.

    Other backends have float64 always, and nothing happens. Call it before
    building models: what JAX has already made float32 stays so. No cache needs
    clearing, since JAX compiles, and `check_dtypes` remembers, per setting.

    Example:

    >>> from keras_precision import hardware
    >>> hardware.enable_float64()  # doctest: +SKIP
    """
    if keras.config.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)

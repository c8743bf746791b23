"""What is computed on here, and whether kernels run there."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import keras

# The oldest that Hopper's kernels were lowered with; they ran with 0.11.2.
_OLDEST_JAX_WITH_WGMMA = (0, 10, 2)
_PRECISIONS_IN_TF32 = ("default", "bfloat16", "high", "tensorfloat32", "tf32_tf32_f32")
MOST_PROGRAMS_ON_AN_AXIS = 65535
"""CUDA's limit for all axes of a grid of programs but the first."""


def default() -> Any:
    """Returns the device that JAX computes on by default."""
    import jax

    device = jax.config.jax_default_device or jax.devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def platform() -> str:
    """Returns "cpu", "gpu" or another name of the default device's kind."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return min((x.device_type for x in tf.config.get_visible_devices()), key="CPU".__eq__).lower()
    return default().platform


def has_triton() -> bool:
    """Returns whether the default device runs Pallas kernels through Triton: NVIDIA GPUs from Ampere on."""
    # JAX says that Pallas's Triton backend will go.
    return _capability() >= 8 and importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def has_wgmma() -> bool:
    """Returns whether Pallas kernels reach Hopper's matrix units on the default device; no later GPU has them."""
    if _capability() != 9.0:
        return False
    import jax

    return jax.__version_info__ >= _OLDEST_JAX_WITH_WGMMA


def multiplies_in_tf32() -> bool:
    """Returns whether JAX multiplies float32 matrices in TF32 on NVIDIA GPUs from Ampere on, as its precision is set."""
    import jax

    return (jax.config.jax_default_matmul_precision or "default").lower() in _PRECISIONS_IN_TF32


def multiprocessors() -> int:
    """Returns how many multiprocessors the default device has, for other devices than GPUs as many as an H100."""
    return getattr(default(), "core_count", None) or 132


def has_float8() -> bool:
    """Returns whether the default device multiplies float8 matrices: NVIDIA GPUs from Ada on."""
    return _capability() >= 8.9


def on_nvidia(kernel: Callable, otherwise: Callable) -> Callable:
    """Returns what computes as `kernel` in programs for NVIDIA GPUs and as `otherwise` in all others (JAX only).

    A program that is traced where the default device is a GPU may be exported
    for a TPU, or be given arrays of a CPU.

    Args:
        kernel: function of arrays, and of settings by name.
        otherwise: one with results of the same shapes and dtypes.
    """
    import jax

    def run(*arrays, **settings):
        cuda, default = (functools.partial(function, **settings) for function in (kernel, otherwise))
        present = [
            x for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        ]
        if any(place.platform != platform() for x in present for place in x.devices()):
            return default(*arrays)  # outside of a program JAX would ask for the default device
        return jax.lax.platform_dependent(*arrays, cuda=cuda, default=default)

    return run


def _capability():
    """Returns the compute capability of an NVIDIA GPU, 0 for other devices."""
    device = default()
    capability = getattr(device, "compute_capability", "")
    is_nvidia = device.platform == "gpu" and re.fullmatch(r"\d+\.\d+", capability)  # ROCm's are no numbers
    return float(capability) if is_nvidia else 0.0

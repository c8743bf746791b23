"""What JAX computes on here, and whether kernels run there."""

from __future__ import annotations

import importlib.util
import re
from typing import Any


def default() -> Any:
    """Returns the device that JAX computes on by default."""
    import jax

    device = jax.config.jax_default_device or jax.devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def has_triton() -> bool:
    """Returns whether the default device runs Pallas kernels through Triton: NVIDIA GPUs from Ampere on."""
    device = default()
    # ROCm's capabilities are no numbers. And JAX says that Pallas's Triton backend will go.
    capability = getattr(device, "compute_capability", "")
    is_new = bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8
    return (
        device.platform == "gpu" and is_new and importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    )

"""The backend and the devices that Keras would compute on."""

import dataclasses
import functools
import importlib
import pathlib
import platform
import re
from collections.abc import Callable
from typing import Any
from typing import Literal

import keras

DeviceKind = Literal["cpu", "gpu", "tpu"]

# The flags of /proc/cpuinfo that decide how fast a low-precision operation is.
CPU_FLAGS = (
    "amx_bf16",
    "amx_tile",
    "amx_int8",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "avx512f",
    "avx2",
    "f16c",
)

_CPUINFO = pathlib.Path("/proc/cpuinfo")


@dataclasses.dataclass(frozen=True)
class HardwareDescription:
    """The backend and its devices, as far as precision depends on them.

    Attributes:
        backend: Name of the Keras backend.
        backend_version: Its version.
        devices: Pairs (kind, name), kind one of "cpu", "gpu", "tpu". The first
            is the one that Keras computes on by default.
        compute_capability: "major.minor" of that device if it is an NVIDIA
            GPU, else None.
        cpu_flags: Those of `CPU_FLAGS` that the host's processor has. Empty
            outside Linux on x86.
        cpu_name: Model of the host's processor.
        is_x64_enabled: Whether float64 stays float64. False only on JAX
            without `jax_enable_x64`, which makes it float32.
        default_matmul_precision: How the backend multiplies float32 matrices
            unless told otherwise, in its own words; None if it has no such
            setting, or leaves it to the device.

    Example:

    >>> from keras_precision import hardware
    >>> described = hardware.describe()
    >>> kind, name = described.devices[0]
    >>> kind in ("cpu", "gpu", "tpu")
    True
    """

    backend: str
    backend_version: str
    devices: tuple[tuple[DeviceKind, str], ...]
    compute_capability: str | None
    cpu_flags: tuple[str, ...]
    cpu_name: str
    is_x64_enabled: bool
    default_matmul_precision: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the description as plain data, ready for JSON."""
        fields = dataclasses.asdict(self)
        fields["devices"] = [list(device) for device in self.devices]
        fields["cpu_flags"] = list(self.cpu_flags)
        return fields


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What only the backend knows."""

    devices: tuple[tuple[DeviceKind, str], ...]
    compute_capability: str | None = None
    is_x64_enabled: bool = True
    default_matmul_precision: str | None = None


def describe() -> HardwareDescription:
    """Returns the backend and its devices, the default device first.

    The default device is the first local one on JAX (or `jax_default_device`,
    which `keras.device` sets), the first of the current `tf.distribute`
    strategy or else the first visible GPU on TensorFlow, and CUDA, then MPS,
    then the CPU on PyTorch. `keras.device` and `tf.device` scopes of
    TensorFlow can't be read and are not seen.

    Importing this module starts no device. This call does, on JAX.

    Returns:
        The `HardwareDescription`.

    Example:

    >>> from keras_precision import hardware
    >>> hardware.describe().backend in ("jax", "tensorflow", "torch")
    True
    """
    backend = keras.config.backend()
    reading = _READERS.get(backend, _read_host)()
    cpu_name, cpu_flags = read_cpu()
    return HardwareDescription(
        backend=backend,
        backend_version=importlib.import_module(backend).__version__,
        devices=reading.devices,
        compute_capability=reading.compute_capability,
        cpu_flags=cpu_flags,
        cpu_name=cpu_name,
        is_x64_enabled=reading.is_x64_enabled,
        default_matmul_precision=reading.default_matmul_precision,
    )


def _read_jax() -> _Reading:
    import jax

    default = jax.config.jax_default_device
    if isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    local = jax.local_devices()
    if default is not None:
        local = [default, *(one for one in local if one != default)]
    # JAX calls CUDA and ROCm both "gpu"; on ROCm the compute capability is an
    # architecture such as "gfx942".
    capability = getattr(local[0], "compute_capability", None)
    return _Reading(
        devices=tuple(
            _device(
                one.platform if one.platform in ("cpu", "tpu") else "gpu",
                one.device_kind,
            )
            for one in local
        ),
        compute_capability=_only_cuda(capability),
        is_x64_enabled=bool(jax.config.jax_enable_x64),
        default_matmul_precision=jax.config.jax_default_matmul_precision,
    )


def _read_tensorflow() -> _Reading:
    import tensorflow as tf

    # get_visible_devices() does not start the runtime, so that memory growth
    # and logical devices can still be set afterwards.
    visible = tf.config.get_visible_devices()
    gpus = [one for one in visible if one.device_type == "GPU"]
    details = [tf.config.experimental.get_device_details(one) for one in gpus]
    devices = [
        _device("gpu", detail.get("device_name", gpu.name))
        for gpu, detail in zip(gpus, details, strict=True)
    ]
    devices += [
        _device("tpu", one.name) for one in visible if one.device_type == "TPU"
    ]
    devices += [
        _device("cpu", one.name) for one in visible if one.device_type == "CPU"
    ]
    if tf.distribute.has_strategy():
        workers = tf.distribute.get_strategy().extended.worker_devices
        kind = tf.DeviceSpec.from_string(workers[0]).device_type.lower()
        if not any(one[0] == kind for one in devices):
            devices.append(_device(kind, workers[0]))
        devices.sort(key=lambda one: one[0] != kind)
    allows_tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    precision = "tensorfloat32" if allows_tf32 else "float32"
    if devices[0][0] != "gpu":
        # Processors multiply in float32 whatever is allowed.
        return _Reading(tuple(devices), default_matmul_precision=None if allows_tf32 else precision)
    return _Reading(
        devices=tuple(devices),
        compute_capability=_only_cuda(details[0].get("compute_capability")),
        default_matmul_precision=precision,
    )


def _read_torch() -> _Reading:
    import torch

    precision = torch.get_float32_matmul_precision()
    host = _read_host().devices
    if torch.cuda.is_available():
        names = [
            torch.cuda.get_device_name(index)
            for index in range(torch.cuda.device_count())
        ]
        is_rocm = torch.version.hip is not None
        capability = None if is_rocm else torch.cuda.get_device_capability(0)
        return _Reading(
            devices=tuple(_device("gpu", one) for one in names) + host,
            compute_capability=_only_cuda(capability),
            default_matmul_precision=precision,
        )
    if torch.backends.mps.is_available():
        return _Reading((_device("gpu", "mps"), *host), None, True, precision)
    return _Reading(host, default_matmul_precision=precision)


def _read_host() -> _Reading:
    """Returns the reading of a backend without accelerators, such as NumPy."""
    return _Reading((_device("cpu", "cpu"),))


_READERS: dict[str, Callable[[], _Reading]] = {
    "jax": _read_jax,
    "tensorflow": _read_tensorflow,
    "torch": _read_torch,
}


def _device(kind: DeviceKind, name: str) -> tuple[DeviceKind, str]:
    # Backends call every processor "cpu"; its model says more.
    return kind, read_cpu()[0] if kind == "cpu" else name


def _only_cuda(capability: Any) -> str | None:
    """Returns "major.minor", or None for anything but an NVIDIA capability."""
    if isinstance(capability, tuple):
        capability = ".".join(str(part) for part in capability)
    if capability is None or not re.fullmatch(r"\d+\.\d+", str(capability)):
        return None
    return str(capability)


@functools.cache
def read_cpu() -> tuple[str, tuple[str, ...]]:
    """Returns the processor's model and those of `CPU_FLAGS` that it has."""
    fallback = platform.processor() or platform.machine()
    if not _CPUINFO.exists():
        return fallback, ()
    found: dict[str, str] = {}
    for line in _CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    present = set(found.get("flags", "").split())
    return (
        found.get("model name", fallback),
        tuple(flag for flag in CPU_FLAGS if flag in present),
    )

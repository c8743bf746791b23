"""The support matrix: how well each class of device runs each dtype."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras

from keras_precision import dtypes
from keras_precision.hardware.cells import BACKEND_CELLS
from keras_precision.hardware.cells import CELLS
from keras_precision.hardware.cells import ROWS
from keras_precision.hardware.cells import X64_IS_OFF
from keras_precision.hardware.cells import Cell
from keras_precision.hardware.description import HardwareDescription
from keras_precision.hardware.description import describe


@dataclasses.dataclass(frozen=True)
class SupportMatrix:
    """Which dtype runs how well on which class of device.

    Attributes:
        dtypes: The rows. "float8" stands for both of its variants.
        device_classes: The columns, as `device_class` returns them.
        cells: The cells by device class and dtype, as far as they hold for
            every backend; `lookup` knows where a backend differs.

    Example:

    >>> from keras_precision import hardware
    >>> matrix = hardware.support_matrix()
    >>> matrix.lookup("bfloat16", "gpu-9.0").status
    'fast'
    """

    dtypes: tuple[str, ...]
    device_classes: tuple[str, ...]
    cells: Mapping[str, Mapping[str, Cell]]

    def lookup(
        self, dtype: Any, device_class: str, backend: str | None = None
    ) -> Cell:
        """Returns how a class of device runs a dtype.

        Args:
            dtype: A row, or a dtype that one stands for.
            device_class: A column.
            backend: Name of a Keras backend; None for the current one.

        Returns:
            The cell, with its status and reason. float64 on JAX is given as
            with `jax_enable_x64`; `current` looks whether that is on.

        Raises:
            ValueError: If there is no such row or column.
        """
        row = self._row(dtype)
        if device_class not in self.cells:
            raise ValueError(
                f"Expected device_class in {self.device_classes}. Received: "
                f"device_class={device_class!r}. Pass what device_class() returns."
            )
        backend = keras.config.backend() if backend is None else backend
        general = self.cells[device_class][row]
        anywhere = BACKEND_CELLS.get((backend, None, row), general)
        return BACKEND_CELLS.get((backend, device_class, row), anywhere)

    def current(self, dtype: Any) -> Cell:
        """Returns how the current default device and backend run a dtype.

        Args:
            dtype: A row, or a dtype that one stands for.

        Returns:
            The cell; "unsupported" for float64 while JAX has it off.

        Raises:
            ValueError: If there is no such row.
        """
        description = describe()
        if self._row(dtype) == "float64" and not description.is_x64_enabled:
            return X64_IS_OFF
        return self.lookup(dtype, device_class(description), description.backend)

    def to_rows(self, backend: str | None = None) -> list[dict[str, str]]:
        """Returns the statuses as a table, one dict a row, ready to print.

        Args:
            backend: Name of a Keras backend; None for the current one.

        Returns:
            Dicts whose first key is "dtype", the others the device classes.
        """
        return [
            {"dtype": row}
            | {
                column: self.lookup(row, column, backend).status
                for column in self.device_classes
            }
            for row in self.dtypes
        ]

    def _row(self, dtype: Any) -> str:
        if isinstance(dtype, str) and dtype in self.dtypes:
            return dtype
        row = dtypes.name(dtype).partition("_")[0]
        if row not in self.dtypes:
            raise ValueError(
                f"Expected a dtype of the matrix, one of {self.dtypes}. Received: "
                f"dtype={dtype!r}. Pass one of these."
            )
        return row


_MATRIX = SupportMatrix(ROWS, tuple(CELLS), CELLS)

# GPU columns by rising capability, as (major, minor).
_CAPABILITIES = sorted(
    tuple(int(part) for part in column.removeprefix("gpu-").split("."))
    for column in CELLS
    if column.startswith("gpu-") and column != "gpu-other"
)


def support_matrix() -> SupportMatrix:
    """Returns the matrix of float and int8 dtypes against classes of device.

    Returns:
        The `SupportMatrix`; the sources of its cells are in their reasons.

    Example:

    >>> from keras_precision import hardware
    >>> row = hardware.support_matrix().to_rows(backend="jax")[0]
    >>> row["dtype"], row["gpu-7.0"]
    ('float16', 'fast')
    """
    return _MATRIX


def device_class(description: HardwareDescription | None = None) -> str:
    """Returns the column of the support matrix that a machine belongs to.

    That is "cpu", "cpu-amx" (bfloat16 by AMX), "tpu", "gpu-other" (no NVIDIA
    GPU), or "gpu-" and the last capability in the matrix that is not above the
    GPU's own: an unknown newer one counts as the newest known, one older than
    6.0 as 6.1, which has no fast half precision either.

    Args:
        description: What to classify; None for this machine.

    Returns:
        One of `support_matrix().device_classes`.

    Example:

    >>> from keras_precision import hardware
    >>> hardware.device_class() in hardware.support_matrix().device_classes
    True
    """
    description = describe() if description is None else description
    kind = description.devices[0][0]
    if kind == "tpu":
        return "tpu"
    if kind == "cpu":
        return "cpu-amx" if "amx_bf16" in description.cpu_flags else "cpu"
    if description.compute_capability is None:
        return "gpu-other"
    major, minor = description.compute_capability.split(".")
    own = (int(major), int(minor))
    reached = [one for one in _CAPABILITIES if one <= own]
    return "gpu-{}.{}".format(*(reached[-1] if reached else (6, 1)))


def best_policy(description: HardwareDescription | None = None) -> str:
    """Returns the name of the policy that "auto" stands for.

    Mixed precision in the first of bfloat16 and float16 that the support
    matrix calls fast, else float32: bfloat16 needs no loss scaling, so it goes
    first. That gives "mixed_bfloat16" on a TPU, on an NVIDIA GPU from
    capability 8.0 and on a CPU with AMX under TensorFlow, "mixed_float16" on
    capability 7.x, and "float32" elsewhere. GPUs of other makers get "float32"
    too: most run bfloat16, but nothing tells us that it pays there.

    Args:
        description: The machine to choose for; None for this one.

    Returns:
        "mixed_bfloat16", "mixed_float16" or "float32".

    Example:

    >>> import dataclasses
    >>> from keras_precision import hardware
    >>> v100 = dataclasses.replace(
    ...     hardware.describe(),
    ...     devices=(("gpu", "Tesla V100"),),
    ...     compute_capability="7.0",
    ... )
    >>> hardware.best_policy(v100)
    'mixed_float16'
    """
    description = describe() if description is None else description
    column = device_class(description)
    for dtype in ("bfloat16", "float16"):
        if _MATRIX.lookup(dtype, column, description.backend).status == "fast":
            return f"mixed_{dtype}"
    return "float32"

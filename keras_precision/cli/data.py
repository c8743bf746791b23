"""Data that commands read from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import keras
import numpy as np


class Data(NamedTuple):
    """Inputs of a model, an array (n, ...) or a dict of them, and targets (n, ...) or None."""

    x: Any
    y: np.ndarray | None


def takes_data(command: Callable) -> Callable:
    """Adds the options --data and --targets."""
    command = click.option(
        "--targets", type=click.Path(path_type=Path), metavar="Y.npy", help="Targets, where --data is a .npy file."
    )(command)
    return click.option(
        "--data",
        type=click.Path(path_type=Path),
        required=True,
        metavar="D.npz|X.npy",
        help="Arrays x and y in a .npz file (or one array for each input, by name, and y), or x in a .npy file.",
    )(command)


def load_data(model: keras.Model, data: Path, targets: Path | None, option: str = "--data") -> Data:
    """Returns a model's inputs and targets from files.

    Args:
        model: that the inputs are for.
        data: a .npz file with `x`, or with an array for each of the model's inputs by name, and `y`; or a .npy file.
        targets: a .npy file, or None.
        option: what the user calls `data`.

    Raises:
        click.BadParameter: a file is missing or damaged, lacks arrays, or holds arrays of other shapes.
    """
    found = _read(data, option)
    if isinstance(found, np.ndarray):
        found = {"x": found}
    if targets is not None:
        y = _read(targets, "--targets")
        if not isinstance(y, np.ndarray):
            raise _bad(f"Expected a .npy file. Received: '{targets}'.", "--targets")
        found["y"] = y
    names = [tensor.name for tensor in model.inputs or ()]
    if "x" in found:
        x = found["x"]
    elif names and set(names) <= set(found):
        x = {name: found[name] for name in names}
    else:
        wanted = "'x'" + (f", or {names}" if names else "")
        raise _bad(f"Expected arrays {wanted} and 'y'. Received: '{data}' with {sorted(found)}.", option)
    _require_shapes(model, x, data, option)
    y = found.get("y")
    first = x if isinstance(x, np.ndarray) else next(iter(x.values()))
    for array in (first, y):
        if array is not None and array.dtype.kind not in "biuf":
            raise _bad(f"Expected numbers. Received: '{data}' with {array.dtype}.", option)
    if y is not None and (y.ndim == 0 or len(y) != len(first)):
        raise _bad(
            f"Expected as many targets as inputs. Received: {len(first)} inputs and targets of shape {y.shape}.", option
        )
    return Data(x, y)


def _read(path, option):
    """Returns an array, or a dict of them."""
    if not path.is_file():
        raise _bad(f"Expected a file. Received: '{path}', which does not exist.", option)
    if path.suffix not in (".npy", ".npz"):
        raise _bad(f"Expected a .npz or .npy file. Received: '{path}'.", option)
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except Exception as error:  # zip, format and pickle errors alike
        reason = " ".join(str(error).split())
        raise _bad(f"Expected arrays written by NumPy. Received: '{path}'. {reason}", option) from error


def _require_shapes(model, x, path, option):
    arrays = [x] if isinstance(x, np.ndarray) else list(x.values())
    tensors = model.inputs or ()
    if tensors and len(arrays) != len(tensors):
        names = [tensor.name for tensor in tensors]
        raise _bad(f"Expected an array for each input, {names}. Received: '{path}' with 'x' alone.", option)
    for array, tensor in zip(arrays, tensors, strict=False):
        sizes = zip(array.shape[1:], tensor.shape[1:], strict=False)
        if array.ndim != len(tensor.shape) or any(own is not None and size != own for size, own in sizes):
            raise _bad(
                f"Expected inputs of shape {_text(tensor.shape)}. Received: '{path}' with shape {array.shape}.", option
            )


def _text(shape):
    return f"({', '.join('n' if size is None else str(size) for size in shape)})"


def _bad(message, option):
    return click.BadParameter(message, param_hint=option)

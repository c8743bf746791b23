"""Models that commands read from files and write to them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import keras

from keras_precision import _bridge
from keras_precision.files import written_whole

SUFFIXES = (".keras", ".h5")


def takes_model(command: Callable) -> Callable:
    """Adds the argument MODEL and the options that loading it needs; the command gets `model`, loaded."""

    @functools.wraps(command)
    def with_model(model: Path, custom_objects: tuple[str, ...], unsafe: bool, **options: Any) -> Any:
        return command(model=load_model(model, custom_objects, unsafe), **options)

    parameters = (
        click.argument("model", type=click.Path(path_type=Path)),
        click.option(
            "--custom-objects",
            multiple=True,
            metavar="MODULE|FILE.py",
            help="Module or Python file that defines the model's own classes; it is run. May be repeated.",
        ),
        click.option(
            "--unsafe",
            is_flag=True,
            help="Run code that the file itself holds, such as Lambda layers. Only if trusted.",
        ),
    )
    for parameter in reversed(parameters):
        with_model = parameter(with_model)
    return with_model


def takes_output(what: str, required: bool = False) -> Callable:
    """Returns a decorator that adds --output, of a model's file, and --overwrite."""

    def decorate(command):
        command = click.option("--overwrite", is_flag=True, help="Replace output files that exist.")(command)
        return click.option(
            "-o", "--output", type=click.Path(path_type=Path), required=required, metavar="OUT.keras", help=what
        )(command)

    return decorate


def load_model(path: Path, custom_objects: tuple[str, ...] = (), unsafe: bool = False) -> keras.Model:
    """Returns the model in a file.

    Args:
        path: a .keras file, or Keras 2's .h5.
        custom_objects: modules or Python files to import first.
        unsafe: whether to run code that the file holds.

    Raises:
        click.BadParameter: there is no such file, it is no model, or it needs what was not given.
    """
    if not path.is_file():
        raise _bad(f"Expected a file. Received: '{path}', which does not exist.")
    if path.suffix not in SUFFIXES or (path.suffix == ".keras" and not zipfile.is_zipfile(path)):
        raise _bad(f"Expected a Keras model, written by model.save('name.keras'). Received: '{path}', which is none.")
    found = {name: value for source in custom_objects for name, value in _objects_in(source).items()}
    try:
        model = keras.saving.load_model(path, custom_objects=found, safe_mode=not unsafe)
    except Exception as error:  # Keras raises what its layers raise
        raise _bad(_why(error, path)) from error
    for layer in _bridge.flatten_layers(model):
        if not layer.built:
            raise _bad(
                f"Expected a built model. Received: '{path}', whose layer '{_bridge.layer_path(layer)}' is not built. "
                "Call the model on data before you save it."
            )
    return model


def save_model(model: keras.Model, path: Path) -> None:
    """Writes a model whole or not at all."""
    with written_whole(path) as partial:
        model.save(partial)


def require_output(path: Path | None, overwrite: bool, suffixes: tuple[str, ...], option: str = "--output") -> None:
    """Raises unless a file can be written, before any work is done.

    Raises:
        click.BadParameter: it exists and may not be replaced, its directory doesn't, or its suffix is another.
    """
    if path is None:
        return
    if path.suffix not in suffixes:
        raise _bad(f"Expected a name that ends in {' or '.join(suffixes)}. Received: '{path}'.", option)
    if not path.parent.is_dir():
        raise _bad(f"Expected a file in a directory that exists. Received: '{path}'.", option)
    if path.exists() and not overwrite:
        raise _bad(
            f"Expected a file that does not exist yet. Received: '{path}'. Pass --overwrite to replace it.", option
        )


def _bad(message, option="MODEL"):
    return click.BadParameter(message, param_hint=option)


def _objects_in(source):
    """Returns the classes and functions that a module or Python file defines, by name."""
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # what is defined in it can be looked up again
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise _bad(
            f"Expected a module or a Python file that can be imported. Received: '{source}'. {reason}",
            "--custom-objects",
        ) from error
    return {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}


def _why(error, path):
    """Returns what is wrong with a file, in one line."""
    messages = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(" ".join(str(cause).split()))
        cause = cause.__cause__ or cause.__context__
    text = " ".join(messages)
    missing = re.search(r"Could not locate \w+ '([^']+)'", text) or re.search(r"Unknown \w+: '([^']+)'", text)
    if missing:
        return (
            f"Expected a model of Keras's own layers. Received: '{path}', which needs {missing[1]!r}. "
            "Pass --custom-objects with the module or Python file that defines it."
        )
    if "safe_mode=False" in text or "unsafe deserialization" in text:
        return (
            f"Expected a model that holds no code. Received: '{path}', which does, in a Lambda layer for instance. "
            "If you trust it, pass --unsafe."
        )
    return f"Expected a Keras model that loads. Received: '{path}'. {type(error).__name__}: {messages[0][:300]}"

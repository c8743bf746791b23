"""What commands print: JSON for machines, tables for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from keras_precision.cli.terminal import stdout_console


def takes_json(command: Callable) -> Callable:
    """Adds the option --json, which the command gets as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")(command)


def show(result: Any, as_json: bool, **files: Any) -> None:
    """Prints a result, and the files that were written.

    Args:
        result: has `to_dict` and `__rich__`.
        as_json: whether to print `to_dict`, with the files in it.
        **files: what they hold -> path, or None for none.
    """
    written = {name: str(path) for name, path in files.items() if path is not None}
    if as_json:
        click.echo(json.dumps(result.to_dict() | written, indent=2, allow_nan=False))
        return
    console = stdout_console()
    console.print(result)
    for name, path in written.items():
        console.print(f"{name.replace('_', ' ').capitalize()}: {path}")


def bad_input(error: Exception, option: str) -> click.BadParameter:
    """Returns an error of the library as one line about an option."""
    return click.BadParameter(" ".join(str(error).split()), param_hint=option)

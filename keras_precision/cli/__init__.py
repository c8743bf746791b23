"""The command line."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import click
import keras

import keras_precision
from keras_precision.cli.audit import audit
from keras_precision.cli.bench import bench
from keras_precision.cli.demo import demo
from keras_precision.cli.doctor import doctor
from keras_precision.cli.quantize import quantize
from keras_precision.cli.search import search
from keras_precision.cli.summary import summary

COMMANDS = (doctor, demo, summary, audit, quantize, search, bench)


class _OneLineErrors(click.Group):
    """A group that answers bad input with one line on stderr and exit status 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **options)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _one_line
                status = super().main(*args, standalone_mode=False, **options)
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:  # a full disk, a directory that may not be written to
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)
        except click.Abort:
            click.echo("Aborted.", err=True)
            sys.exit(1)
        sys.exit(status if isinstance(status, int) else 0)


def _one_line(message: Warning | str, *where: Any) -> None:
    click.echo(f"Warning: {' '.join(str(message).split())}", err=True)


@click.group(
    cls=_OneLineErrors,
    invoke_without_command=True,
    epilog="Example: keras-precision --backend jax demo --epochs 5 --policies float32,mixed_bfloat16",
)
@click.option(
    "--backend",
    type=click.Choice(["jax", "tensorflow"]),
    help="Keras backend to run on; without it, KERAS_BACKEND or Keras's own configuration decides.",
)
@click.version_option(keras_precision.__version__, prog_name="keras-precision")
@click.pass_context
def main(context: click.Context, backend: str | None) -> None:
    """Decide and show which dtypes a Keras 3 program stores and computes in."""
    loaded = keras.backend.backend()
    if backend not in (None, loaded):
        raise click.BadParameter(
            f"Expected {loaded!r}, since Keras already runs on it in this process. Received: {backend!r}. "
            f"Start a new process with KERAS_BACKEND={backend}.",
            param_hint="--backend",
        )
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in COMMANDS:
    main.add_command(command)

__all__ = ["main"]

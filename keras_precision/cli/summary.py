"""`keras-precision summary`: each layer's dtypes and bytes."""

from __future__ import annotations

import click
import keras

from keras_precision.cli.models import takes_model
from keras_precision.cli.output import show, takes_json
from keras_precision.report.summary import Summary


@click.command(epilog="\b\nExample: keras-precision summary model.keras --json")
@takes_model
@takes_json
def summary(model: keras.Model, as_json: bool) -> None:
    """Show the policy, the dtypes, the parameters and the bytes of each layer of MODEL."""
    show(Summary.of(model), as_json)

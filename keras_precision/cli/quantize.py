"""`keras-precision quantize`: a model's weights stored in fewer bits."""

from __future__ import annotations

from pathlib import Path

import click
import keras

from keras_precision import layers
from keras_precision.cli.models import require_output, save_model, takes_model, takes_output
from keras_precision.cli.output import bad_input, show, takes_json
from keras_precision.cli.policy_files import read_policy


@click.command(epilog="\b\nExample: keras-precision quantize model.keras --policy nf4 -o small.keras")
@takes_model
@click.option(
    "--policy",
    required=True,
    metavar="P",
    help="A format, a quantized policy's name, or a .json file of `search --save-policy`.",
)
@click.option("--skip", multiple=True, metavar="KEY", help="Layers to leave: a name, path or glob. May be repeated.")
@takes_output("File of the quantized model.", required=True)
@takes_json
def quantize(
    model: keras.Model, policy: str, skip: tuple[str, ...], output: Path, overwrite: bool, as_json: bool
) -> None:
    """Store the weights of MODEL as a policy says, and write the smaller model."""
    require_output(output, overwrite, (".keras",))
    wanted = read_policy(policy, model)
    try:
        report = layers.quantize(model, wanted, skip=skip)
    except ValueError as error:
        raise bad_input(error, "--policy") from error
    save_model(model, output)
    show(report, as_json, output=output)

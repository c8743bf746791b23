"""`keras-precision audit`: what a precision does to a model, layer by layer."""

from __future__ import annotations

from pathlib import Path

import click
import keras

import keras_precision
from keras_precision.cli.data import load_data, takes_data
from keras_precision.cli.models import require_output, takes_model
from keras_precision.cli.output import bad_input, show, takes_json
from keras_precision.cli.policy_files import read_policy


@click.command(
    epilog="\b\nExample: keras-precision audit model.keras --data validation.npz --policy float16 --html audit.html"
)
@takes_model
@takes_data
@click.option("--policy", metavar="P", help="What to audit.  [default: the policies that the model has]")
@click.option("--loss", metavar="NAME", help="Keras loss, such as mse.  [default: the compiled one]")
@click.option("--html", type=click.Path(path_type=Path), metavar="OUT.html", help="Page to open in a browser, offline.")
@click.option("--overwrite", is_flag=True, help="Replace the page if it exists.")
@takes_json
def audit(
    model: keras.Model,
    data: Path,
    targets: Path | None,
    policy: str | None,
    loss: str | None,
    html: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show what overflows, underflows, leaks and loses accuracy in MODEL, with gradients where the data has targets."""
    require_output(html, overwrite, (".html",), "--html")
    wanted = None if policy is None else read_policy(policy, model)
    x, y = load_data(model, data, targets)
    try:
        report = keras_precision.audit(model, x, y, loss, policy=wanted)
    except (TypeError, ValueError) as error:
        raise bad_input(error, "audit") from error
    if html is not None:
        report.save_html(html)
    show(report, as_json, page=html)

"""`keras-precision search`: the smallest policy of each layer within a budget."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click
import keras

import keras_precision
from keras_precision.cli.data import load_data, takes_data
from keras_precision.cli.models import require_output, save_model, takes_model, takes_output
from keras_precision.cli.output import bad_input, show, takes_json
from keras_precision.cli.policy_files import write_policy
from keras_precision.files import written_whole
from keras_precision.search.search import CANDIDATES

BUDGETS = {
    "max_loss_increase": "Most that the mean loss may increase: a number, or 1% of what it is.",
    "max_accuracy_drop": "Most that the accuracy may drop: 0.01 is a point.",
    "max_bytes": "Most bytes of all weights: a number, or 40% of what they are.",
    "max_seconds": "Most seconds of a prediction of one batch, or a share such as 80%.",
}


def takes_budget(command):
    """Adds an option for each kind of budget."""
    for name, text in reversed(BUDGETS.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, metavar="X", help=text)(command)
    return command


@click.command(
    epilog="\b\nExample: keras-precision search model.keras --data validation.npz --max-loss-increase 1% -o small.keras"
)
@takes_model
@takes_data
@takes_budget
@click.option(
    "--loss", metavar="NAME", help="Keras loss, such as sparse_categorical_crossentropy.  [default: the compiled one]"
)
@click.option("--minimize", type=click.Choice(["bytes", "seconds"]), help="What to save.  [default: bytes]")
@click.option("--candidates", default=",".join(CANDIDATES), show_default=True, help="Policies or formats, by commas.")
@click.option("--skip", multiple=True, metavar="KEY", help="Layers to leave: a name, path or glob. May be repeated.")
@click.option(
    "--validation-data",
    type=click.Path(path_type=Path),
    metavar="V.npz",
    help="Held-out x and y.  [default: half of D]",
)
@click.option("--confidence", type=float, default=0.95, show_default=True, help="That the bound holds on such data.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Samples a prediction.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the split of the data.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS", help="Return the best found by then.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), metavar="C.json", help="Keeps measurements to go on from."
)
@click.option("--save-policy", type=click.Path(path_type=Path), metavar="P.json", help="File of the policy map.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="F.png", help="Picture of loss against bytes.")
@takes_output("File of the quantized model.")
@takes_json
def search(
    model: keras.Model,
    data: Path,
    targets: Path | None,
    candidates: str,
    validation_data: Path | None,
    save_policy: Path | None,
    plot: Path | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Choose a policy for each layer of MODEL that keeps a budget: the fewest bytes within a bound on loss, or so."""
    require_output(output, overwrite, (".keras",))
    require_output(save_policy, overwrite, (".json",), "--save-policy")
    require_output(plot, overwrite, (".png", ".svg", ".pdf"), "--plot")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.BadParameter("Expected matplotlib. Run pip install 'keras-precision[plots]'.", param_hint="--plot")
    budget = {name: value for name in BUDGETS if (value := options.pop(name)) is not None}
    if len(budget) != 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in BUDGETS)
        raise click.UsageError(f"Expected one of {names}. Received: {len(budget)} of them.")
    x, y = load_data(model, data, targets)
    if y is None:
        raise click.BadParameter(f"Expected targets 'y' too. Received: '{data}' without.", param_hint="--data")
    held_out = None if validation_data is None else load_data(model, validation_data, None, "--validation-data")
    names = [name.strip() for name in candidates.split(",") if name.strip()]
    try:
        result = keras_precision.search_policy(
            model, x, y, candidates=names, budget=budget, validation_data=held_out, **options
        )
    except (TypeError, ValueError) as error:
        raise bad_input(error, "search") from error
    if save_policy is not None:
        write_policy(result.policy_map, save_policy)
    if plot is not None:
        with written_whole(plot) as partial:
            result.plot().savefig(partial, dpi=150)
    if output is not None:
        result.apply(model)
        save_model(model, output)
    show(result, as_json, output=output, saved_policy=save_policy, figure=plot)

"""`keras-precision demo`: the digits task under several policies, side by side."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click
import keras
from rich.table import Table

from keras_precision import hardware, policies
from keras_precision.cli.terminal import stdout_console
from keras_precision.progress import progress_bar

if TYPE_CHECKING:
    from keras_precision.cli.digits import RunResult

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "auto")
FIGURE_NAME = "digits_loss.png"


@click.command(epilog="Example: keras-precision demo --epochs 5 --policies float32,mixed_bfloat16")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images.  [default: 15]")
@click.option("--policies", "names", default=",".join(POLICIES), show_default=True, help="Policies, by commas.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("keras-precision-demo"),
    show_default=True,
    help="Directory for the loss curves.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of split, weights and batches.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def demo(epochs: int | None, names: str, output: Path, seed: int, as_json: bool) -> None:
    """Train a small network on 1,797 handwritten digits under several policies and compare them."""
    requested = _float_policies(names)
    if importlib.util.find_spec("sklearn") is None:
        raise click.UsageError("Expected scikit-learn, which has the digits. Run pip install 'keras-precision[demo]'.")
    figure = _figure_path(output)
    from keras_precision.cli import digits

    epochs = epochs or digits.DEFAULT_EPOCHS
    results = []
    with progress_bar("mixed_bfloat16", "steps") as progress, warnings.catch_warnings():
        # The table says in milliseconds what this warning says in words.
        warnings.simplefilter("ignore", hardware.PrecisionWarning)
        task = progress.add_task("", total=len(requested) * epochs * digits.STEPS_PER_EPOCH)
        for name in requested:
            progress.update(task, description=name)
            results.append(digits.train(name, epochs, seed, on_batch=lambda: progress.advance(task)))
    if figure:
        from keras_precision.cli.loss_curves import save_loss_curves

        save_loss_curves(results, figure)
    if as_json:
        report = {
            "backend": keras.backend.backend(),
            "epochs": epochs,
            "seed": seed,
            "figure": figure and str(figure),
            "runs": [result.to_dict() for result in results],
        }
        click.echo(json.dumps(report, indent=2))
        return
    console = stdout_console()
    console.print(_table(results, epochs))
    for note in _notes(results):
        console.print(note)
    if figure:
        console.print(f"Loss curves: {figure}")
    else:
        console.print("No loss curves, since matplotlib is not installed: pip install 'keras-precision[plots]'.")


def _float_policies(names: str) -> list[str]:
    """Returns the names, each of a policy that this device trains in, refusing others before any work is done."""
    requested = [name.strip() for name in names.split(",") if name.strip()]
    if not requested:
        raise click.BadParameter("Expected at least one policy name. Received: none.", param_hint="--policies")
    for name in requested:
        try:
            policy = policies.get(name)
            if policy.quantization_mode or not keras.backend.is_float_dtype(policy.compute_dtype):
                raise ValueError(f"Expected policies that train, such as 'mixed_bfloat16'. Received: {name!r}.")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hardware.PrecisionWarning)
                policies.policy_scope(policy)
        except ValueError as error:
            raise click.BadParameter(" ".join(str(error).split()), param_hint="--policies") from error
    return requested


def _figure_path(directory: Path) -> Path | None:
    """Returns where the loss curves go, None without matplotlib; the directory exists then."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"Expected a directory that can be made. {error}", param_hint="--output") from error
    return directory / FIGURE_NAME


def _table(results: list[RunResult], epochs: int) -> Table:
    backend = keras.backend.backend()
    table = Table(title=f"Handwritten digits with Adam on {backend}, epochs: {epochs}")
    table.add_column("policy", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for heading in ("test accuracy", "final loss", "step (ms)", "weight bytes", "optimizer bytes"):
        table.add_column(heading, justify="right")
    for result in results:
        resolved = "" if result.policy == result.requested else f" = {result.policy}"
        table.add_row(
            result.requested + resolved,
            result.status,
            f"{result.test_accuracy:.1%}",
            f"{result.final_loss:.4f}",
            f"{result.step_ms:.2f}",
            f"{result.weight_bytes:,}",
            f"{result.optimizer_bytes:,}",
        )
    return table


def _notes(results: list[RunResult]) -> list[str]:
    seen = {True: "", False: " No weight changed."}
    return [f"{r.requested}: {r.status}.{seen[r.moved]}" for r in results if r.status != "trains"]

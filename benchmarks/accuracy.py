"""What storing weights in each quantized format costs: error, digits accuracy and text loss, beside stock Keras's.

The digits network and the character-level transformer are trained once, in float32; every format then gets the same
weights. Importing keras_precision patches Keras, so each side quantizes in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import timing

KERAS_FORMATS = ("int8", "int4")
# Rows and columns of the weight drawn from N(0, 1); large enough for double quantization's own scales not to show.
SIZE = 1024


class Trained(NamedTuple):
    """Float32 models that every format starts from.

    Attributes:
        trials: of digits_task, one a seed.
        digits: weights of each trial's trained network.
        text: weights of the transformer.
    """

    trials: list
    digits: list
    text: list


class Row(NamedTuple):
    """What a format comes to.

    Attributes:
        bits: a weight, read from the arrays of a layer with SIZE * SIZE of them.
        error: mean |difference| of weights drawn from N(0, 1).
        accuracy: on the test images of the digits, in [0, 1], mean over the seeds.
        loss: of the transformer on the validation text, nats a character.
    """

    bits: float
    error: float
    accuracy: float
    loss: float


def train(steps: int, epochs: int, seeds: int) -> Trained:
    """Returns all models, trained in float32."""
    import digits_task
    import keras
    import text_task

    trials = [digits_task.make_trial(seed, epochs) for seed in range(seeds)]
    digits = [digits_task.fit(trial, digits_task.make_optimizer("Adam", trial.steps)).get_weights() for trial in trials]
    keras.utils.set_random_seed(0)
    model = text_task.build_transformer()
    text_task.fit(model, text_task.make_optimizer(steps), text_task.standard_library().train, steps, seed=0)
    return Trained(trials, digits, model.get_weights())


def evaluate(trained: Trained, quantize) -> Row:
    """Returns a format's row, or float32's.

    Args:
        trained: the models.
        quantize: changes a model in place.
    """
    import digits_task
    import keras
    import numpy as np
    import text_task

    # One matrix; multiplied by the identity it tells what the layer takes its weights for.
    weight = np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype="float32")
    layer = keras.layers.Dense(SIZE, use_bias=False)
    model = keras.Sequential([keras.Input((SIZE,)), layer])
    layer.kernel.assign(weight)
    quantize(model)
    nbytes = sum(keras.ops.convert_to_numpy(variable).nbytes for variable in layer.variables)
    read = model.predict(np.eye(SIZE, dtype="float32"), verbose=0)

    accuracies = []
    for trial, weights in zip(trained.trials, trained.digits, strict=True):
        model = digits_task.build(trial)
        model.set_weights(weights)
        quantize(model)
        accuracies.append(digits_task.outcome(trial, model).accuracy)
    model = text_task.build_transformer()
    model.set_weights(trained.text)
    quantize(model)
    loss = text_task.validation_loss(model, text_task.standard_library().validation)
    error = float(np.mean(np.abs(read - weight), dtype="float64"))
    return Row(nbytes * 8 / weight.size, error, statistics.mean(accuracies), loss)


def serve(side: str) -> None:
    """Answers {"train": ..., "file": ...} when the models are in the file, {"file": ..., "format": ...} with a row."""
    if side == "ours":
        import keras_precision
        from keras_precision.formats import FORMATS, Codec

        formats = [name for name, entry in FORMATS.items() if isinstance(entry, Codec)]
    else:
        formats = KERAS_FORMATS
    timing.reply(formats)
    for line in sys.stdin:
        asked = json.loads(line)
        file = Path(asked["file"])
        if "train" in asked:
            file.write_bytes(pickle.dumps(train(**asked["train"])))
            timing.reply(None)
            continue

        def quantize(model, name=asked["format"]):
            if name is not None and side == "ours":
                keras_precision.quantize(model, f"{name}_from_float32", verbose=0)
            elif name is not None:
                model.quantize(name)

        timing.reply(evaluate(pickle.loads(file.read_bytes()), quantize))


def measure(backend: str, arguments: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """Returns (library, format) -> its row; that of float32 comes first."""
    from rich.console import Console
    from rich.progress import Progress

    rows = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        timing.Worker(__file__, "ours", backend) as ours,
        timing.Worker(__file__, "keras", backend) as keras,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        formats = {("ours", name): ours for name in ours.read()} | {("Keras", name): keras for name in keras.read()}
        if arguments.only:
            formats = {subject: worker for subject, worker in formats.items() if ":".join(subject) in arguments.only}
        task = progress.add_task(f"{backend}: training", total=2 + len(formats))
        file = os.path.join(folder, "trained.pickle")
        ours.ask({"file": file, "train": {name: getattr(arguments, name) for name in ("steps", "epochs", "seeds")}})
        for (library, name), worker in {("Keras", "float32"): keras, **formats}.items():
            progress.update(task, advance=1, description=f"{backend}: {library}'s {name}")
            rows[library, name] = Row(*worker.ask({"file": file, "format": None if name == "float32" else name}))
    return rows


def print_table(backend: str, rows: dict[tuple[str, str], Row], caption: str) -> None:
    """Prints a row for each format, with its accuracy and loss beside float32's."""
    from rich.table import Table

    table = Table("backend", "library", "format", title="Quantized weights", caption=caption, caption_justify="left")
    for heading in (
        "bits a parameter",
        "mean error on N(0,1)",
        "digits accuracy",
        "points",
        "text loss",
        "to float32's",
    ):
        table.add_column(heading, justify="right")
    base = rows["Keras", "float32"]
    for (library, name), row in rows.items():
        accuracy, loss = f"{row.accuracy:.2%}", f"{row.loss:.4f}"
        change = (f"{100 * (row.accuracy - base.accuracy):+.2f}", f"{row.loss / base.loss:.4f}")
        table.add_row(
            backend, library, name, f"{row.bits:.3f}", f"{row.error:.4f}", accuracy, change[0], loss, change[1]
        )
    timing.show(table)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax", help="Keras backends, by commas")
    parser.add_argument("--steps", type=int, default=2000, help="of training the transformer")
    parser.add_argument("--epochs", type=int, default=15, help="of training the digits network")
    parser.add_argument("--seeds", type=int, default=3, help="digits networks")
    parser.add_argument("--only", type=lambda text: text.split(","), help="such as ours:nf4,Keras:int4")
    parser.add_argument("--worker", choices=timing.SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker)
        return
    for backend in arguments.backends.split(","):
        rows = measure(backend, arguments)
        caption = (
            f"{platform.machine()}, {os.cpu_count()} cores. {arguments.steps} steps of the transformer, "
            f"{arguments.epochs} epochs of {arguments.seeds} digits networks, all in float32. Keras's int4 has blocks of "
            "128, its default; ours of 64. int8 and llm-int8 quantize activations too."
        )
        print_table(backend, rows, caption)


if __name__ == "__main__":
    main()

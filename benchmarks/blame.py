"""What BlameCallback costs a step of `fit` while nothing overflows: epochs with it and without it, in turn.

    python benchmarks/blame.py                             # GPT-2 small on a GPU, under 3 minutes
    python benchmarks/blame.py --backends jax,tensorflow --policies float32 --layers 2 --width 128 --heads 4 \
        --vocabulary 256 --length 64 --batch 16 --steps 300
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict

import timing
from train_step import Shape, build, device, peak_bytes, tokens_of

GOAL = 1.01


def serve(policy: str, shape: Shape) -> None:
    """Answers "with" and "without" with the milliseconds a step of an epoch."""
    import keras

    import keras_precision as kp

    keras.utils.set_random_seed(0)
    kp.set_global_policy(policy)
    model = build(shape)
    inputs, targets = tokens_of(shape)
    timing.reply(policy)
    for line in sys.stdin:
        watch = kp.BlameCallback(verbose=0)
        callbacks = [watch] if json.loads(line) == "with" else []
        started = time.perf_counter()
        model.fit(inputs, targets, batch_size=shape.batch, verbose=0, shuffle=False, callbacks=callbacks)
        seconds = time.perf_counter() - started
        timing.reply({"ms": seconds / shape.steps * 1e3, "bytes": peak_bytes(), "blames": len(watch.blames)})


def measure(backend: str, policy: str, epochs: int) -> dict[str, list[dict]]:
    """Returns the answers of epochs without and with the callback, the first of each compiles."""
    with timing.Worker(__file__, policy, backend) as worker:
        worker.read()
        answers = {side: [worker.ask(side)] for side in ("without", "with")}
        for epoch in range(epochs):
            for side in ("without", "with") if epoch % 2 else ("with", "without"):
                answers[side].append(worker.ask(side))
    return answers


def row(backend: str, policy: str, answers: dict[str, list[dict]]) -> list[str]:
    """Returns the cells of a row."""
    without, watched = ([one["ms"] for one in answers[side][1:]] for side in ("without", "with"))
    ratio = statistics.median(b / a for a, b in zip(without, watched, strict=True))
    peaks = [
        "" if answers[side][0]["bytes"] is None else f"{answers[side][0]['bytes'] / 2**30:.2f}" for side in answers
    ]
    times = [f"{statistics.median(taken):.3f}" for taken in (without, watched)]
    found = sum(one["blames"] for one in answers["with"])
    return [
        backend,
        policy,
        *times,
        f"{ratio:.4f}",
        f"<= {GOAL}: {'yes' if ratio <= GOAL else 'NO'}",
        *peaks,
        str(found),
    ]


def main() -> None:
    """Reads the command line."""
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax", help="Keras backends, by commas")
    parser.add_argument("--policies", default="mixed_bfloat16,mixed_float16", help="policies, by commas")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of each side")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    for name, value in asdict(Shape(steps=400)).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = vars(parser.parse_args())
    if arguments["worker"]:
        serve(arguments["worker"], Shape(**json.loads(os.environ["BLAME_SHAPE"])))
        return
    shape = Shape(**{name: arguments[name] for name in asdict(Shape())})
    os.environ["BLAME_SHAPE"] = json.dumps(asdict(shape))
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # so that the peak is what was asked for
    table = Table(title=f"Epochs of fit with a BlameCallback and without, {shape}", caption_justify="left")
    table.caption = (
        f"ms a step: medians of {arguments['epochs']} epochs of each, in turn, after one that compiles; the ratio is the "
        "median of the pairs'. Peaks: of the process after its first epoch without the callback, and then with it."
    )
    for heading in ("backend", "policy", "ms without", "ms with", "ratio", "goal", "GiB without", "GiB with", "blamed"):
        table.add_column(heading, justify="left" if heading in ("backend", "policy") else "right")
    for backend in arguments["backends"].split(","):
        for policy in arguments["policies"].split(","):
            table.add_row(*row(backend, policy, measure(backend, policy, arguments["epochs"])))
        table.title = f"{table.title}; {backend}: {device(backend)}"
    timing.show(table)


if __name__ == "__main__":
    main()

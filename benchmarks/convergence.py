"""Where every optimizer ends on the digits task under every float policy, with keras_precision and with stock Keras.

Importing keras_precision patches Keras, so each side trains in a process of its own. Both get the same images, initial
weights and order of batches. Loss over all training images and accuracy on the test images are averaged over the seeds
and compared with those of stock Keras's float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pickle
import platform
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import timing

if TYPE_CHECKING:
    from digits_task import Outcome

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16")
REFERENCE = "float32"


class Training(NamedTuple):
    """What one training came to.

    Attributes:
        backend: Keras's backend.
        side: "keras" or "ours".
        optimizer: its class in `keras.optimizers`.
        policy: the global policy.
        seed: of its trial.
        loss: see `digits_task.Outcome`; NaN if training raised.
        accuracy: the same.
        seconds: wall time, compilation included.
        error: what it raised, or None.
    """

    backend: str
    side: str
    optimizer: str
    policy: str
    seed: int
    loss: float
    accuracy: float
    seconds: float
    error: str | None

    def to_json(self) -> str:
        """Returns a line of JSON, which has no NaN and no infinity: they become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self._asdict().items()}
        return json.dumps(finite)


class Side(NamedTuple):
    """How a side's trainings of one optimizer, under one policy and on one backend, compare with the reference.

    Attributes:
        mean: loss and accuracy over the seeds.
        verdict: "pass", "FAIL" or the exception that a training raised.
    """

    mean: Outcome
    verdict: str

    @property
    def passes(self) -> bool:
        """Whether it is as good as the reference."""
        return self.verdict == "pass"


class Row(NamedTuple):
    """An optimizer under a policy on a backend."""

    optimizer: str
    policy: str
    backend: str
    reference: Outcome
    ours: Side
    keras: Side


def main() -> None:
    """Runs the matrix as the command line says, and exits with 1 if one of our cells does not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", type=_names, default=timing.BACKENDS, help="Keras backends, by commas")
    parser.add_argument("--optimizers", type=_names, help="classes of keras.optimizers, by commas, instead of all")
    parser.add_argument("--policies", type=_names, default=POLICIES, help="policies, by commas")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds to average")
    parser.add_argument("--json", metavar="FILE", help="where to write each training, a line of JSON, as it ends")
    parser.add_argument("--worker", choices=timing.SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _serve(arguments.worker)
        return
    os.environ["KERAS_BACKEND"] = arguments.backends[0]  # makes the initial weights for all
    import digits_task

    known = digits_task.optimizer_names()
    optimizers = arguments.optimizers or known
    if not set(optimizers) <= set(known):
        parser.error(f"Expected optimizers from {', '.join(known)}. Received: {', '.join(optimizers)}.")
    trials = [digits_task.make_trial(seed, arguments.epochs) for seed in range(arguments.seeds)]
    trainings = _train_all(arguments.backends, optimizers, arguments.policies, trials, arguments.json)
    rows = [
        _row(trainings, optimizer, policy, backend)
        for optimizer in optimizers
        for policy in arguments.policies
        for backend in arguments.backends
    ]
    caption = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. Means over "
        f"{arguments.seeds} seeds after {arguments.epochs} epochs. To pass, the loss must be within 5% or 0.01 of "
        f"stock Keras's {REFERENCE} and the accuracy at most 1 point below. Of {len(rows)} pass: "
        f"ours {sum(row.ours.passes for row in rows)}, stock Keras's {sum(row.keras.passes for row in rows)}."
    )
    _print_table(rows, caption)
    sys.exit(not all(row.ours.passes for row in rows))


def _names(text):
    return tuple(text.split(","))


def _train_all(backends, optimizers, policies, trials, file):
    """Returns the trainings of both sides, which run at the same time, one backend after the other."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def cells(side):
        wanted = policies if side == "ours" else dict.fromkeys((REFERENCE, *policies))
        return list(itertools.product(optimizers, wanted, range(len(trials))))

    trainings = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        tempfile.TemporaryDirectory() as folder,
        open(file or os.devnull, "w") as out,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(len(timing.SIDES)) as pool,
    ):
        # Each seed has a model of its own; from the second on, this spares JAX the seconds of compiling it.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        path = Path(folder, "trials.pickle")
        path.write_bytes(pickle.dumps(trials))
        task = progress.add_task("", total=len(backends) * sum(len(cells(side)) for side in timing.SIDES))

        def follow(backend, side):
            with timing.Worker(__file__, side, backend) as worker:
                worker.read()
                worker.ask(str(path))
                for cell in cells(side):
                    training = Training(backend, side, *cell, *worker.ask(cell))
                    trainings.append(training)
                    print(training.to_json(), file=out, flush=True)
                    progress.update(task, advance=1, description=" ".join(training[:4]))

        for backend in backends:
            for done in [pool.submit(follow, backend, side) for side in timing.SIDES]:
                done.result()
    return trainings


def _serve(side):
    """Answers the path of the trials, then each optimizer, policy and seed with loss, accuracy, seconds and error."""
    warnings.simplefilter("ignore")  # float16 is slow on a CPU, says one side; gradients overflow, says the other
    import keras

    import digits_task

    set_global_policy = keras.config.set_dtype_policy
    if side == "ours":
        import keras_precision

        set_global_policy = keras_precision.set_global_policy
    assert ("keras_precision" in sys.modules) == (side == "ours")
    timing.reply(side)
    questions = map(json.loads, sys.stdin)
    trials = pickle.loads(Path(next(questions)).read_bytes())
    timing.reply(len(trials))
    for optimizer, policy, seed in questions:
        start = time.perf_counter()
        outcome, error = (math.nan, math.nan), None
        try:
            set_global_policy(policy)
            outcome = digits_task.train(trials[seed], digits_task.make_optimizer(optimizer, trials[seed].steps))
        except Exception as raised:  # noqa: BLE001 - that an optimizer can't train a dtype is a result, too
            error = f"{type(raised).__name__}: {raised}".partition("\n")[0][:300]
        keras.utils.clear_session(free_memory=False)
        timing.reply((*outcome, time.perf_counter() - start, error))


def _row(trainings, optimizer, policy, backend):
    def taken(side, policy):
        return [t for t in trainings if t[:4] == (backend, side, optimizer, policy)]

    def mean(of):
        return digits_task.Outcome(*(statistics.fmean(getattr(t, name) for t in of) for name in ("loss", "accuracy")))

    import digits_task

    reference = mean(taken("keras", REFERENCE))

    def judged(side):
        found = taken(side, policy)
        errors = [t.error.partition(":")[0] for t in found if t.error]
        passes = mean(found).is_as_good_as(reference)
        return Side(mean(found), errors[0] if errors else "pass" if passes else "FAIL")

    return Row(optimizer, policy, backend, reference, ours=judged("ours"), keras=judged("keras"))


def _print_table(rows, caption):
    from rich.table import Table

    headings = ("optimizer", "policy", "backend", REFERENCE)
    table = Table(*headings, title="Convergence on digits", caption=caption, caption_justify="left")
    for heading in ("ours: loss", "accuracy", "verdict", "Keras: loss", "accuracy", "verdict"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.optimizer,
            row.policy,
            row.backend,
            _format(row.reference.loss, ".4f"),
            *(text for side in (row.ours, row.keras) for text in _cells(side)),
        )
    timing.show(table)


def _cells(side):
    return _format(side.mean.loss, ".4f"), _format(side.mean.accuracy, ".1%"), side.verdict


def _format(number, spec):
    return "NaN" if math.isnan(number) else format(number, spec)


if __name__ == "__main__":
    main()

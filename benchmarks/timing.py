"""Times cases under stock Keras and under keras_precision, in processes that take turns.

Importing keras_precision patches Keras, so the two sides cannot share a process. A pair of processes, one a side, lives
at the same time and is asked for one sample after the other, so that a machine that gets slower hits both. A side's
time is its least sample, since interference only adds; what differs from process to process (addresses, hash seeds)
shows in the range over several pairs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["keras", "ours"]
SIDES: tuple[Side, ...] = ("keras", "ours")
BACKENDS = ("jax", "tensorflow")


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        run: what is timed, called with what `prepare` returned.
        calls: how often `run` repeats the operation whose time is reported.
        prepare: called before each sample, untimed; returns the arguments of `run`.
    """

    run: Callable[..., Any]
    calls: int = 1
    prepare: Callable[[], tuple] = tuple


@dataclass(frozen=True)
class Figure:
    """What a goal can be set for.

    Attributes:
        name: how it is written.
        of: (Keras's seconds, our seconds) -> the figure.
        format: figure -> text.
    """

    name: str
    of: Callable[[float, float], float]
    format: Callable[[float], str]


@dataclass(frozen=True)
class Goal:
    """The most that a figure may be."""

    figure: Figure
    limit: float


@dataclass(frozen=True)
class Row:
    """Seconds that one call of a case took, one entry a pair of processes."""

    backend: str
    case: str
    keras: list[float]
    ours: list[float]


def format_seconds(seconds: float) -> str:
    """Returns a time to three digits, with its unit.

    >>> format_seconds(0.0123456), format_seconds(-2e-6)
    ('12.3 ms', '-2 us')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(seconds) * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


RATIO = Figure("ours / Keras", lambda keras, ours: ours / keras, "{:.3f}".format)
DIFFERENCE = Figure("ours - Keras", lambda keras, ours: ours - keras, format_seconds)
OURS = Figure("ours", lambda keras, ours: ours, format_seconds)


def run(
    script: str, title: str, cases: Callable[[Side], dict[str, Case]], goal: Goal, *, pairs: int, samples: int
) -> None:
    """Runs a benchmark as its command line says and prints its table.

    Args:
        script: path of the benchmark, which each worker process runs again.
        title: of the table.
        cases: side -> cases by name, of the same names on both sides; called
            in a worker, where Keras is not imported yet.
        goal: what each case has to meet.
        pairs: default number of pairs of processes on each backend.
        samples: default number of samples of each case in each process.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--backends", default=",".join(BACKENDS), help="Keras backends, by commas")
    parser.add_argument("--pairs", type=int, default=pairs, help="pairs of processes on each backend")
    parser.add_argument("--samples", type=int, default=samples, help="samples of each case in each process")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _serve(cases(arguments.worker))
        return
    rows = []
    for backend in arguments.backends.split(","):
        rows += _measure(script, backend, arguments.pairs, arguments.samples)
    caption = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. Medians over "
        f"{arguments.pairs} pairs of processes, of the least of {arguments.samples} samples in each. "
        "A goal is judged by its figure's median; the range is that figure's over the pairs."
    )
    _print_table(title, caption, rows, goal)


def _serve(cases):
    """Answers each case's name on stdin with the seconds that one call took."""
    reply(list(cases))
    gc.collect()
    gc.freeze()  # a collection that falls into a sample has only the sample's own objects to look at
    for line in sys.stdin:
        case = cases[json.loads(line)]
        arguments = case.prepare()
        start = time.perf_counter()
        case.run(*arguments)
        reply((time.perf_counter() - start) / case.calls)


def reply(value: Any) -> None:
    """Answers from inside a worker."""
    print(json.dumps(value), flush=True)


class Worker:
    """A process of a benchmark that answers each line of JSON with one; the first answer comes unasked.

    Args:
        script: path of the benchmark.
        name: what to give its `--worker`, such as the side to measure.
        backend: Keras's.
    """

    def __init__(self, script: str, name: str, backend: str):
        self._backend_setting = f"KERAS_BACKEND={backend}"
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's second import finds byte code
        self._process = subprocess.Popen(
            [sys.executable, script, "--worker", name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.communicate()  # its input ends, so it does

    def read(self) -> Any:
        """Returns the next answer."""
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                "Expected an answer from the process that measures. Received: none, it has ended. "
                f"Set {self._backend_setting} and run {' '.join(self._process.args)} to see why."
            )
        return json.loads(line)

    def send(self, question: Any) -> None:
        """Asks a question whose answer `read` will return."""
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def ask(self, question: Any) -> Any:
        """Returns the answer to a question."""
        self.send(question)
        return self.read()


def answer(function: Callable[..., Any]) -> None:
    """Answers, inside a worker, each question with what a function returns for it, a dict of its arguments."""
    reply("ready")
    for line in sys.stdin:
        reply(function(**json.loads(line)))


def ask_each(
    script: str, jobs: dict[str, tuple[str, dict[str, Any]]], backend: str, seeds: int, parallel: int
) -> dict[str, list[Any]]:
    """Returns the answers to each job, one a seed, from a process of its own that calls `answer`.

    Args:
        script: path of the benchmark.
        jobs: by name, what to give `--worker` and the question, but for its seed.
        backend: Keras's.
        seeds: how many, from 0 on.
        parallel: processes at once.
    """

    def ask(worker_name, question):
        with Worker(script, worker_name, backend) as worker:
            worker.read()
            return [worker.ask({**question, "seed": seed}) for seed in range(seeds)]

    with ThreadPoolExecutor(parallel) as pool:
        runs = {name: pool.submit(ask, *job) for name, job in jobs.items()}
        return {name: run.result() for name, run in runs.items()}


def show(table) -> None:
    """Prints a `rich.table.Table`."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160  # a pipe has no edge to fold at, where rich would take 80 columns
    console.print(table)


def _measure(script, backend, pairs, samples):
    rows: dict[str, Row] = {}
    for pair in range(pairs):
        with Worker(script, "keras", backend) as keras, Worker(script, "ours", backend) as ours:
            names, our_names = keras.read(), ours.read()
            assert names == our_names, (names, our_names)
            for name in names:
                taken: dict[Worker, list[float]] = {keras: [], ours: []}
                for sample in range(samples):
                    # Who goes first changes, since the second finds files and caches warm.
                    for worker in (keras, ours) if (pair + sample) % 2 else (ours, keras):
                        taken[worker].append(worker.ask(name))
                row = rows.setdefault(name, Row(backend, name, [], []))
                row.keras.append(min(taken[keras]))
                row.ours.append(min(taken[ours]))
    return rows.values()


def _print_table(title, caption, rows, goal):
    from rich.table import Table

    table = Table("backend", "case", title=title, caption=caption, caption_justify="left")
    for heading in ("Keras", "ours", RATIO.name, DIFFERENCE.name, "goal", "met", "range"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*_cells(row, goal))
    show(table)


def _cells(row, goal):
    def over_pairs(figure):
        return [figure.of(keras, ours) for keras, ours in zip(row.keras, row.ours, strict=True)]

    text = goal.figure.format
    judged = over_pairs(goal.figure)
    return (
        row.backend,
        row.case,
        format_seconds(statistics.median(row.keras)),
        *(figure.format(statistics.median(over_pairs(figure))) for figure in (OURS, RATIO, DIFFERENCE)),
        f"{goal.figure.name} <= {text(goal.limit)}",
        "yes" if statistics.median(judged) <= goal.limit else "NO",
        f"{text(min(judged))} to {text(max(judged))}",
    )

"""One AdamW step: stock Keras's, ours with states in 8 and 4 bits, and torch's and bitsandbytes' where they are installed.

Each subject runs in a process of its own, one after the other or, with --in-turn, a sample of each at a time, so that
what slows the machine hits all. A weight has 8192 columns; gradients are given. On JAX the step is jitted and donates
weights and state; on TensorFlow it is a tf.function, compiled by XLA where `fit` would do so: not on a CPU.
A sample is several steps, put in the device's queue as training does, and the wait for the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import operator
import os
import platform
import statistics
import sys
import time
from typing import NamedTuple

import timing

STEPS = 5  # a sample
COLUMNS = 8192
WEIGHTS = 8
KERAS = "Keras AdamW"
OURS = {"ours, 8 bits": "AdamW8bit", "ours, float8": "AdamWFp8", "ours, 4 bits": "AdamW4bit"}
OTHERS = {"torch fused AdamW": "torch", "bitsandbytes AdamW8bit": "bitsandbytes"}


class Result(NamedTuple):
    """What one subject came to.

    Attributes:
        seconds: a step, of each sample.
        state_bytes: a parameter, read from the live arrays.
        extra: the most that a step held beyond weights, gradients and state, as a share of the state; None where the
            device doesn't tell.
    """

    seconds: list[float]
    state_bytes: float
    extra: float | None


def keras_optimizer(name):
    """Returns the optimizer of a subject that is Keras's or ours."""
    import keras

    if name == KERAS:
        return keras.optimizers.AdamW(1e-3)
    import keras_precision

    return getattr(keras_precision.optimizers, OURS[name])(1e-3)


def keras_step(name, rows):
    """Returns (function that begins a step, one that waits for it, bytes of the state, device that tells its memory or None)."""
    import keras
    import numpy as np

    optimizer = keras_optimizer(name)
    values = np.random.default_rng(0).standard_normal((rows, COLUMNS), dtype="float32")
    weights = [keras.Variable(np.float32(0.02) * values) for _ in range(WEIGHTS)]
    gradients = [keras.ops.convert_to_tensor(np.float32(0.01) * np.flip(values)) for _ in weights]
    optimizer.build(weights)
    nbytes = sum(getattr(v.value, "nbytes", 0) or keras.ops.convert_to_numpy(v).nbytes for v in optimizer.variables)
    if keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(lambda w, s, g: optimizer.stateless_apply(s, g, w), donate_argnums=(0, 1))
        values = [v.value for v in weights], [v.value for v in optimizer.variables]
        for variable in (*weights, *optimizer.variables):
            variable._value = None  # what is donated may have no other owner

        def step():
            nonlocal values
            values = compiled(*values, gradients)

        return step, lambda: jax.block_until_ready(values), nbytes, jax.devices()[0]
    import tensorflow as tf

    by_xla = bool(tf.config.list_physical_devices("GPU"))
    compiled = tf.function(lambda: optimizer.apply(gradients, weights), jit_compile=by_xla)
    return compiled, lambda: weights[-1].value[0, 0].numpy(), nbytes, None


def torch_step(name, rows):
    """Returns the same for torch's and bitsandbytes' optimizers; the latter needs a GPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = [torch.nn.Parameter(0.02 * torch.randn(rows, COLUMNS, device=device)) for _ in range(WEIGHTS)]
    for weight in weights:
        weight.grad = 0.01 * torch.randn_like(weight)
    if OTHERS[name] == "torch":
        optimizer = torch.optim.AdamW(weights, 1e-3, fused=True)
    else:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(weights, 1e-3)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return optimizer.step, wait, sum(x.numel() * x.element_size() for x in tensors), None


def serve(name: str, rows: int) -> None:
    """Answers with the bytes of the state, and each line with the seconds of a step and the greatest extra memory so far."""
    step, wait, nbytes, device = (torch_step if name in OTHERS else keras_step)(name, rows)
    step()
    wait()
    timing.reply(nbytes / (rows * COLUMNS * WEIGHTS))
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        seconds = (time.perf_counter() - start) / STEPS
        memory = device.memory_stats() if device is not None else None
        # The greatest up to now, which the first step may have set, over what is held between steps.
        extra = (memory["peak_bytes_in_use"] - memory["bytes_in_use"]) / nbytes if memory else None
        timing.reply([seconds, extra])


def measure(subjects: list[str], backend: str, samples: int) -> dict[str, Result]:
    """Returns the results of subjects that take turns."""
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(timing.Worker(__file__, name, backend)) for name in subjects}
        results = {name: Result([], worker.read(), None) for name, worker in workers.items()}
        for _ in range(samples):
            for name, worker in workers.items():
                seconds, extra = worker.ask("sample")
                results[name] = results[name]._replace(seconds=[*results[name].seconds, seconds], extra=extra)
    return results


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=",".join(timing.BACKENDS), help="Keras backends, by commas")
    parser.add_argument("--parameters", default="3.2e7", help="numbers of them, by commas; on a GPU 124e6,1e9")
    parser.add_argument("--samples", type=int, default=7, help=f"times {STEPS} steps")
    parser.add_argument("--in-turn", action="store_true", help="all subjects at once, if memory allows")
    parser.add_argument("--only", type=lambda text: text.split(";"), help="subjects, by semicolons")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, int(os.environ["OPTIMIZER_STEP"]))
        return
    subjects = [KERAS, *OURS, *(name for name, module in OTHERS.items() if importlib.util.find_spec(module))]
    for count in map(float, arguments.parameters.split(",")):
        rows = max(round(count / COLUMNS / WEIGHTS), 1)
        os.environ["OPTIMIZER_STEP"] = str(rows)
        for backend in arguments.backends.split(","):
            names, results = arguments.only or subjects, {}
            for together in [names] if arguments.in_turn else [[name] for name in names]:
                results |= measure(together, backend, arguments.samples)
            print_table(backend, rows * COLUMNS * WEIGHTS, results, arguments.samples)


def print_table(backend: str, parameters: int, results: dict[str, Result], samples: int) -> None:
    """Prints a row for each subject, with its time as a multiple of stock Keras's."""
    from rich.table import Table

    caption = (
        f"{platform.machine()}, {os.cpu_count()} cores. Medians of {samples} x {STEPS} steps, and of their ratios. "
        f"{' '.join(sys.argv[1:])}"
    )
    table = Table("backend", "optimizer", title=f"AdamW step, {parameters:,} float32 parameters", caption=caption)
    for heading in ("ms", "to Keras's", "state bytes a parameter", "extra memory"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        milliseconds, ratio = f"{statistics.median(result.seconds) * 1e3:.2f}", ""
        if KERAS in results:
            ratio = f"{statistics.median(map(operator.truediv, result.seconds, results[KERAS].seconds)):.2f}"
        extra = "" if result.extra is None else f"{result.extra:.1%}"
        table.add_row(backend, name, milliseconds, ratio, f"{result.state_bytes:.3f}", extra)
    timing.show(table)


if __name__ == "__main__":
    main()

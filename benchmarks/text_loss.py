"""Validation loss of a character-level transformer under each way of storing its weights, beside stock Keras's.

python benchmarks/text_loss.py --parallel 10              # on a GPU with 16 cores about 2 minutes
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys

import timing


@dataclasses.dataclass(frozen=True)
class Way:
    """How weights are stored and rounded.

    Attributes:
        policy: its name.
        side: whose Keras.
        rounding: what `LowPrecision` is given; None leaves it to `compile`.
        master_weights: likewise.
    """

    policy: str
    side: timing.Side = "ours"
    rounding: str | None = None
    master_weights: bool = False


WAYS = {
    "float32": Way("float32", "keras"),
    "mixed_bfloat16": Way("mixed_bfloat16"),
    "bfloat16, stochastic (the default)": Way("bfloat16"),
    "bfloat16, Kahan": Way("bfloat16", rounding="kahan"),
    "bfloat16, master weights": Way("bfloat16", rounding="nearest", master_weights=True),
    "bfloat16, nearest": Way("bfloat16", rounding="nearest"),
    "bfloat16, stock Keras": Way("bfloat16", "keras"),
    "float8": Way("float8_from_mixed_bfloat16"),
    "float8/row": Way("float8/row_from_mixed_bfloat16"),
    "float8/delayed": Way("float8/delayed_from_mixed_bfloat16"),
}
BASE = "float32"
WITHIN = 1.01  # of float32's validation loss
JUDGED = "bfloat16, stochastic (the default)"


def train(way: Way, steps: int, seed: int, learning_rate: float | None) -> float:
    """Returns the validation loss after one run, the same data and initial weights for every way."""
    import keras
    import text_task

    set_global_policy = keras.config.set_dtype_policy
    if way.side == "ours":
        import keras_precision

        set_global_policy = keras_precision.set_global_policy
    keras.utils.set_random_seed(seed)
    set_global_policy(all_layers(way.policy) if way.policy.startswith("float8") else way.policy)
    model = text_task.build_transformer()
    text = text_task.standard_library()
    optimizer = text_task.make_optimizer(steps, learning_rate)
    if way.rounding:
        optimizer = keras_precision.optimizers.LowPrecision(optimizer, way.rounding, way.master_weights, seed=seed)
    text_task.fit(model, optimizer, text.train, steps, seed)
    return text_task.validation_loss(model, text.validation)


def all_layers(name: str):
    """Returns a float8 policy that small layers follow too."""
    import keras_precision

    policy = keras_precision.get(name)
    return type(policy)(**{**policy.get_config(), "min_features": 16})


def main() -> None:
    """Reads the command line, runs, prints, and exits with 1 if stochastic rounding misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax", help="Keras backends, by commas")
    parser.add_argument("--steps", type=int, default=5000, help="of 32 windows of 128 characters")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each way")
    parser.add_argument("--learning-rate", type=float, help="the greatest")
    parser.add_argument("--parallel", type=int, default=1, help="ways trained at once")
    parser.add_argument("--ways", default=";".join(WAYS), help="by semicolons")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        timing.answer(functools.partial(train, WAYS[arguments.worker]))
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    asked = {"steps": arguments.steps, "learning_rate": arguments.learning_rate}
    jobs = {name: (name, asked) for name in arguments.ways.split(";")}
    failed = False
    for backend in arguments.backends.split(","):
        losses = timing.ask_each(__file__, jobs, backend, arguments.seeds, arguments.parallel)
        failed |= print_table(backend, arguments.steps, losses)
    sys.exit(int(failed))


def print_table(backend: str, steps: int, losses: dict[str, list[float]]) -> bool:
    """Prints a row for each way; returns whether the judged one misses the goal."""
    from rich.table import Table

    table = Table("backend", "weights", title=f"Validation loss in nats a character after {steps} steps")
    for heading in ("mean", "to float32's", "least", "most"):
        table.add_column(heading, justify="right")
    base = statistics.mean(losses[BASE]) if BASE in losses else float("nan")
    for name, runs in losses.items():
        mean = statistics.mean(runs)
        table.add_row(backend, name, f"{mean:.4f}", f"{mean / base:.4f}", f"{min(runs):.4f}", f"{max(runs):.4f}")
    timing.show(table)
    return JUDGED in losses and not statistics.mean(losses[JUDGED]) <= WITHIN * base


if __name__ == "__main__":
    main()

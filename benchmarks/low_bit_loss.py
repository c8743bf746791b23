"""Where training ends with each alias for states in few bits, beside Keras's optimizer with float32 states.

python benchmarks/low_bit_loss.py                                    # the digits network, some minutes on 2 cores
python benchmarks/low_bit_loss.py --tasks text --parallel 8          # on a GPU with 16 cores about 4 minutes

Of the digits network it is the loss on the training images, of the transformer the one on text that it has not seen.
What a loss says is bounded by chance: "nudged" is float32 again, from weights greater by 2**-20 of themselves. The
digits have smoothed labels (Szegedy et al. 2016, section 7), a tenth of each being spread over all classes: the loss then
has a floor of 0.5003, and what chance does to the rest of it is little of the whole. Without (`--smoothing 0`) it falls
to some 0.001, and 2**-20 of the weights halves it.
"""

import argparse
import os
import statistics
import sys

import timing

# The greatest rates in the text task, chosen for float32 alone.
TEXT_RATES = {
    "Adam": 5e-4,
    "AdamW": 5e-4,
    "Lion": 1e-4,
    "SGD": 0.2,
    "RMSprop": 5e-4,
    "Adagrad": 0.02,
    "Lamb": 5e-3,
}
WITHIN = 1.01  # of the loss with float32 states
NUDGED = "~"  # behind the name of a base whose weights begin a little greater
NUDGE = 1 + 2.0**-20


def base_of(alias: str) -> str:
    """Returns the name of the Keras class that an alias wraps; of such a class its own.

    >>> base_of("AdamWFp8"), base_of("Lion8bit"), base_of("Adam")
    ('AdamW', 'Lion', 'Adam')
    """
    from keras_precision.optimizers import aliases

    return type(aliases.ALIASES[alias]().inner_optimizer).__name__ if alias in aliases.ALIASES else alias


def maker(name: str):
    """Returns what makes the optimizer of this name: an alias of ours, or one of Keras's classes."""
    import keras
    from keras_precision.optimizers import aliases

    return aliases.ALIASES.get(name) or getattr(keras.optimizers, name)


def digits(name: str, factor: float, seed: int, epochs: int, smoothing: float, steps: int) -> float:
    """Returns the loss on the training images after so many epochs."""
    import digits_task

    trial = digits_task.make_trial(seed, epochs)
    trial = trial._replace(weights=[weight * factor for weight in trial.weights])
    optimizer = digits_task.make_optimizer(base_of(name), trial.steps, maker(name))
    return digits_task.train(trial, optimizer, smoothing).loss


def text(name: str, factor: float, seed: int, epochs: int, smoothing: float, steps: int) -> float:
    """Returns the loss on text not seen, in nats a character, after so many steps."""
    import keras
    import text_task

    settings = {"momentum": 0.9} if base_of(name) == "SGD" else {}
    rate = text_task.rate_over(steps, TEXT_RATES[base_of(name)])
    keras.utils.set_random_seed(seed)
    model, written = text_task.build_transformer(), text_task.standard_library()
    model.set_weights([weight * factor for weight in model.get_weights()])
    text_task.fit(model, maker(name)(rate, **settings), written.train, steps, seed)
    return text_task.validation_loss(model, written.validation)


TASKS = {"digits": digits, "text": text}


def job_of(task: str, name: str, arguments: argparse.Namespace) -> tuple[str, dict]:
    """Returns what `timing.ask_each` is to ask for one optimizer."""
    factor = NUDGE if name.endswith(NUDGED) else 1.0
    return task, {
        "name": name.removesuffix(NUDGED),
        "factor": factor,
        "epochs": arguments.epochs,
        "smoothing": arguments.smoothing,
        "steps": arguments.steps,
    }


def main() -> None:
    """Reads the command line, runs, prints, and exits with 1 if a loss is more than 1% above float32's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax", help="Keras backends, by commas")
    parser.add_argument("--tasks", default="digits", help=f"of {', '.join(TASKS)}, by commas")
    parser.add_argument("--epochs", type=int, default=15, help="of the digits task")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the digits task's labels")
    parser.add_argument("--steps", type=int, default=5000, help="of the text task")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each")
    parser.add_argument("--parallel", type=int, default=1, help="optimizers at once")
    parser.add_argument("--aliases", help="by commas; all if not given")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        timing.answer(TASKS[arguments.worker])
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    chosen = arguments.aliases.split(",") if arguments.aliases else known_aliases()
    bases = list(dict.fromkeys(map(base_of, chosen)))
    names = [*bases, *(base + NUDGED for base in bases), *chosen]
    failed = False
    for backend in arguments.backends.split(","):
        for task in arguments.tasks.split(","):
            jobs = {name: job_of(task, name, arguments) for name in names}
            losses = timing.ask_each(__file__, jobs, backend, arguments.seeds, arguments.parallel)
            failed |= print_table(backend, task, chosen, losses, arguments)
    sys.exit(int(failed))


def known_aliases() -> list[str]:
    """Returns the names of all aliases."""
    from keras_precision.optimizers import aliases

    return list(aliases.ALIASES)


def print_table(backend, task, chosen, losses, arguments) -> bool:
    """Prints a row for each alias; returns whether one misses the goal."""
    from rich.table import Table

    length = f"{arguments.epochs} epochs" if task == "digits" else f"{arguments.steps} steps"
    table = Table("backend", "task", "optimizer", title=f"Loss after {length}, mean of {arguments.seeds}")
    for heading in ("float32", "least and most", "nudged", "ours", "nudged to float32's", "ours", f"<= {WITHIN}"):
        table.add_column(heading, justify="right")
    failed = False
    for name in chosen:
        base = losses[base_of(name)]
        mean, nudged, ours = map(statistics.mean, (base, losses[base_of(name) + NUDGED], losses[name]))
        is_good = ours <= WITHIN * mean
        failed |= not is_good
        numbers = [f"{mean:.5f}", f"{min(base):.5f}, {max(base):.5f}", f"{nudged:.5f}", f"{ours:.5f}"]
        ratios = [f"{nudged / mean:.4f}", f"{ours / mean:.4f}"]
        table.add_row(backend, task, name, *numbers, *ratios, "yes" if is_good else "NO")
    timing.show(table)
    return failed


if __name__ == "__main__":
    main()

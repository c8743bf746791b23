"""What `search_policy` finds on the digits network and the character-level transformer, beside uniform policies.

Both are trained in float32 and searched on data that they have not seen, of which half calibrates and half verifies.
The policies that were chosen are then judged on further data that neither training nor the search has seen.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import timing

BUDGETS = ("0.1%", "0.5%", "2%")


def digits_case(arguments):
    """Returns the trained digits network, data to search on and data to judge on."""
    import keras
    import numpy as np

    from keras_precision.cli import digits

    keras.utils.set_random_seed(0)
    split = digits.load_digits_split(0)
    model = digits.build_digits_model()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    kept = 300  # training images that are left out, to judge on beside some of the test images
    model.fit(split.train_images[kept:], split.train_labels[kept:], epochs=arguments["epochs"], verbose=0)
    x = np.concatenate([split.test_images, split.train_images[:kept]])
    y = np.concatenate([split.test_labels, split.train_labels[:kept]])
    order = np.random.default_rng(0).permutation(len(x))
    searched, judged = order[:400], order[400:]
    return model, (x[searched], y[searched]), (x[judged], y[judged])


def text_case(arguments):
    """Returns the trained transformer, windows to search on and windows to judge on."""
    import keras
    import text_task

    keras.utils.set_random_seed(0)
    model = text_task.build_transformer()
    steps = arguments["steps"]
    text = text_task.standard_library()
    text_task.fit(model, text_task.make_optimizer(steps), text.train, steps, seed=0)
    # Windows of one text overlap if they are drawn from one place; halves of it share nothing.
    half = len(text.validation) // 2
    batches = max(1, arguments["windows"] // text_task.BATCH)
    searched = text_task.batches(text.validation[:half], batches, seed=1)
    return model, searched, text_task.batches(text.validation[half:], batches, seed=2)


CASES = {"digits": digits_case, "transformer": text_case}


def measure(case: str, budgets: list[str], picture: str | None, **arguments) -> list[dict]:
    """Returns what was found under each budget.

    Args:
        case: of `CASES`.
        budgets: of loss.
        picture: path of a PNG of the last result, or None.
        **arguments: of the case.
    """
    import tempfile

    import keras
    import numpy as np

    import keras_precision
    from keras_precision.search.paired import Paired
    from keras_precision.search.samples import Samples, judged, loss_function

    model, searched, unseen = CASES[case](arguments)
    loss = loss_function(model, None)
    unseen = Samples.of(*unseen, batch_size=32)
    before = judged(model, unseen, loss, has_errors=False).losses
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for budget in budgets:
            start = time.perf_counter()
            result = keras_precision.search_policy(
                model, *searched, budget=budget, checkpoint=Path(folder) / "search.json", verbose=0
            )
            seconds = time.perf_counter() - start
            copy = keras.models.clone_model(model)
            copy.set_weights(model.get_weights())
            result.apply(copy)
            after = Paired.of(judged(copy, unseen, loss, has_errors=False).losses, before)
            others = [p for p in result.verified if p.name not in ("search", result.chosen.name)]
            as_good = [p for p in others if p.loss <= result.chosen.loss]
            smallest = min(as_good, key=lambda p: p.bytes, default=None)
            found.append(
                {
                    "budget": budget,
                    "chosen": result.chosen.name,
                    "bytes": result.bytes_after,
                    "share": result.bytes_after / result.bytes_before,
                    "increase": result.chosen.loss_increase / result.before.loss,
                    "unseen": after.increase / float(np.mean(before)),
                    "unseen_error": after.standard_error / float(np.mean(before)),
                    "uniform": smallest and [smallest.name, smallest.bytes],
                    "rules": len(result.policy_map),
                    "seconds": seconds,
                    "uniforms": {p.name: [p.bytes, p.loss_increase / result.before.loss] for p in others},
                }
            )
    if picture is not None:
        result.plot().savefig(picture, dpi=100)
    return found


def print_table(backend: str, answers: dict[str, list[dict]], caption: str) -> None:
    """Prints a row for each case and budget."""
    from rich.table import Table

    table = Table("backend", "network", "budget", "chosen", title="Searched policies", caption=caption)
    headings = ("bytes", "of float32's", "loss, held out", "loss, unseen", "holds there", "rules", "seconds")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("smallest uniform policy of equal or better loss")
    for case, rows in answers.items():
        for row in rows:
            holds = row["unseen"] <= float(row["budget"].removesuffix("%")) / 100
            uniform = "none" if row["uniform"] is None else f"{row['uniform'][0]}, {row['uniform'][1]:,}"
            table.add_row(
                backend,
                case,
                row["budget"],
                row["chosen"],
                f"{row['bytes']:,}",
                f"{row['share']:.1%}",
                f"{row['increase']:+.3%}",
                f"{row['unseen']:+.3%} ± {row['unseen_error']:.3%}",
                "yes" if holds else "NO",
                str(row["rules"]),
                f"{row['seconds']:.1f}",
                uniform,
            )
    timing.show(table)
    for case, rows in answers.items():
        uniforms = "; ".join(f"{name} {n:,} bytes {up:+.3%}" for name, (n, up) in rows[-1]["uniforms"].items())
        print(f"{case}, uniform policies on the held-out data: {uniforms}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax", help="Keras backends, by commas")
    parser.add_argument("--cases", default=",".join(CASES), help="networks, by commas")
    parser.add_argument("--budgets", default=",".join(BUDGETS), help="shares of the loss, by commas")
    parser.add_argument("--epochs", type=int, default=15, help="of training the digits network")
    parser.add_argument("--steps", type=int, default=2000, help="of training the transformer")
    parser.add_argument("--windows", type=int, default=512, help="of text to search on, and as many to judge on")
    parser.add_argument("--pictures", type=Path, help="directory for a picture of each network's last search")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        timing.answer(measure)
        return
    for backend in arguments.backends.split(","):
        answers = {}
        for case in arguments.cases.split(","):
            picture = arguments.pictures and str(arguments.pictures / f"search_{case}_{backend}.png")
            question = {name: getattr(arguments, name) for name in ("epochs", "steps", "windows")}
            question |= {"case": case, "budgets": arguments.budgets.split(","), "picture": picture}
            with timing.Worker(__file__, "search", backend) as worker:
                worker.read()
                answers[case] = worker.ask(question)
        caption = (
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. Losses are increases "
            "relative to float32's. After the first budget the measurements of single layers come from its checkpoint."
        )
        print_table(backend, answers, caption)


if __name__ == "__main__":
    main()

"""Time of a training step of large Dense layers in float8: ours by each scaling, beside stock Keras's and bfloat16 (JAX).

    python benchmarks/float8_step.py                       # 2 x (4096 -> 14336 -> 4096), 8,192 rows; on an H100 a minute

Processes take turns, a sample each, so that what slows the device hits all. The matmuls with float8 operands are counted
in the compiled program; where the device has such, the exit status is 1 if a program of ours has none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time

import timing

SOURCE = "mixed_bfloat16"
BASE = f"Keras {SOURCE}"
KERAS = {BASE: "", "Keras float8": "float8"}
OURS = {f"ours {mode}": f"{mode}_from_{SOURCE}" for mode in ("float8", "float8/row", "float8/delayed")}
STEPS = 10  # a sample


def build(name: str, width: int, hidden: int, blocks: int):
    """Returns a compiled stack of residual blocks of two Dense layers, under stock Keras or ours."""
    import keras

    if name in OURS:
        import keras_precision

        least = min(width, hidden, 2048)  # so that small sizes test the same code
        policy = keras_precision.get(OURS[name])
        keras_precision.set_global_policy(type(policy)(**{**policy.get_config(), "min_features": least}))
    else:
        keras.config.set_dtype_policy(SOURCE)
    inputs = x = keras.Input((width,))
    for _ in range(blocks):
        inner = keras.layers.Dense(hidden, activation="gelu", use_bias=False)(x)
        x = keras.layers.Add()([x, keras.layers.Dense(width, use_bias=False)(inner)])
    model = keras.Model(inputs, x)
    if KERAS.get(name):
        model.quantize(KERAS[name])
    model.compile(optimizer=keras.optimizers.SGD(1e-3), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def serve(name: str, width: int, hidden: int, blocks: int, rows: int) -> None:
    """Answers each line with the seconds of a step; first with the float8 matmuls and the loss after two steps."""
    import jax
    import jax.numpy as jnp
    import keras

    keras.utils.set_random_seed(0)
    model = build(name, width, hidden, blocks)
    x = jax.random.normal(jax.random.PRNGKey(0), (rows, width), "bfloat16")

    def step(state, x):
        def loss(trained):
            outputs, _ = model.stateless_call(trained, state[1], x, training=True)
            return jnp.mean(jnp.square(outputs.astype("float32") - x.astype("float32")))

        value, gradients = jax.value_and_grad(loss)(state[0])
        trained, slots = model.optimizer.stateless_apply(state[2], gradients, state[0])
        return (trained, state[1], slots), value

    owners = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
    state = jax.tree.map(jnp.copy, tuple([v.value for v in variables] for variables in owners))
    compiled = jax.jit(step, donate_argnums=0).lower(state, x).compile()
    for _ in range(2):
        state, value = compiled(state, x)
    products = compiled.as_text().count("__cublas$lt$matmul$f8")
    timing.reply({"products": products, "misses": misses_products(name, products), "loss": float(value)})
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(STEPS):
            state, value = compiled(state, x)
        jax.block_until_ready(value)
        timing.reply((time.perf_counter() - start) / STEPS)


def misses_products(name: str, products: int) -> bool:
    """Returns whether a program of ours has no float8 matmuls on a device that has them."""
    if name not in OURS:
        return False
    from keras_precision.kernels import dispatch

    return dispatch.multiplies_float8() and not products


def measure(names: list[str], samples: int) -> dict[str, dict]:
    """Returns what each subject answered first, with its seconds."""
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(timing.Worker(__file__, name, "jax")) for name in names}
        answers = {name: worker.read() | {"seconds": []} for name, worker in workers.items()}
        for _ in range(samples):
            for name, worker in workers.items():
                answers[name]["seconds"].append(worker.ask("sample"))
    return answers


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=14336)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=5, help=f"of {STEPS} steps, of which the median counts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.width, arguments.hidden, arguments.blocks, arguments.rows)
    if arguments.worker:
        serve(arguments.worker, *map(int, os.environ["FLOAT8_STEP_SHAPE"].split(",")))
        return
    os.environ["FLOAT8_STEP_SHAPE"] = ",".join(map(str, shape))
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    answers = measure([*KERAS, *OURS], arguments.samples)
    show(shape, answers)
    missing = [name for name, found in answers.items() if found["misses"]]
    if missing:
        sys.exit(f"No float8 matmul in the compiled program of: {', '.join(missing)}.")


def show(shape, answers) -> None:
    """Prints a row for each subject, with its ratio to bfloat16, sample by sample."""
    from rich.table import Table

    width, hidden, blocks, rows = shape
    operations = 3 * 2 * rows * width * hidden * 2 * blocks
    table = Table(title=f"Training step, {blocks} x ({width} -> {hidden} -> {width}), {rows} rows, SGD")
    for heading in ("subject", "ms a step", "times faster", "TFLOP/s", "float8 matmuls", "loss"):
        table.add_column(heading, justify="left" if heading == "subject" else "right")
    for name, found in answers.items():
        seconds = statistics.median(found["seconds"])
        pairs = zip(answers[BASE]["seconds"], found["seconds"], strict=True)
        ratio = statistics.median(base / own for base, own in pairs)
        figures = f"{seconds * 1e3:.2f}", f"{ratio:.2f}", f"{operations / seconds / 1e12:.0f}"
        table.add_row(name, *figures, str(found["products"]), f"{found['loss']:.4f}")
    timing.show(table)


if __name__ == "__main__":
    main()

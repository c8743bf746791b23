"""Time, memory and loss of a GPT-2-small training step, stock Keras and ours side by side.

    python benchmarks/train_step.py                        # on a GPU with 80 GB, under 5 minutes
    python benchmarks/train_step.py --layers 1 --width 64 --vocabulary 512 --length 64 --batch 2 --backends tensorflow

Processes of up to three policies live at once and are asked for one epoch after the other, so that what slows the
device hits all.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import timing

# "unscaled" switches loss scaling off, which tells what it costs apart from what float16 itself does.
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "mixed_float16 unscaled", "bfloat16")
BASE = "mixed_bfloat16"  # what the cost of loss scaling is measured over


@dataclass(frozen=True)
class Shape:
    """What is trained: by default GPT-2 small on 8 sequences of 1,024 tokens, 124 million parameters and the head's."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50304
    length: int = 1024
    batch: int = 8
    steps: int = 20


def build(shape: Shape, **compile_arguments):
    """Returns a compiled transformer of stock layers, without dropout, trained by AdamW."""
    import keras
    from keras import layers

    tokens = keras.Input((shape.length,), dtype="int32")
    x = layers.Embedding(shape.vocabulary, shape.width)(tokens)
    for _ in range(shape.layers):
        normal = layers.LayerNormalization(epsilon=1e-5)(x)
        attention = layers.MultiHeadAttention(shape.heads, shape.width // shape.heads)
        x = layers.Add()([x, attention(normal, normal, use_causal_mask=True)])
        normal = layers.LayerNormalization(epsilon=1e-5)(x)
        inner = layers.Dense(4 * shape.width, activation="gelu")(normal)
        x = layers.Add()([x, layers.Dense(shape.width)(inner)])
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    model = keras.Model(tokens, layers.Dense(shape.vocabulary, use_bias=False)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.AdamW(3e-4), loss=loss, **compile_arguments)
    return model


def tokens_of(shape: Shape):
    """Returns inputs and targets int32 (steps * batch, length) in which a token mostly tells the next one.

    Drawn once from a chain over the vocabulary whose frequencies fall as 1 / rank (Zipf), so that there is something
    to learn at once (frequencies) and over time (what follows what).
    """
    import numpy as np

    draw = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, shape.vocabulary + 1)
    count = (shape.steps * shape.batch, shape.length + 1)
    chain = draw.choice(shape.vocabulary, size=count, p=weights / weights.sum()).astype("int32")
    follows = draw.permutation(shape.vocabulary).astype("int32")
    told = draw.random(count) < 0.5
    for place in range(1, count[1]):
        chain[:, place] = np.where(told[:, place], follows[chain[:, place - 1]], chain[:, place])
    return chain[:, :-1], chain[:, 1:]


def serve(name: str, shape: Shape) -> None:
    """Trains one epoch a question; answers its milliseconds a step, its mean loss and the peak of the device's memory."""
    side, _, policy = name.partition(":")
    policy, _, unscaled = policy.partition(" ")
    import keras

    set_global_policy = keras.config.set_dtype_policy
    if side == "ours":
        import keras_precision

        set_global_policy = keras_precision.set_global_policy
    keras.utils.set_random_seed(0)
    set_global_policy(policy)
    model = build(shape, auto_scale_loss=not unscaled)
    inputs, targets = tokens_of(shape)

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.started = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            self.seconds = time.perf_counter() - self.started

    clock = Clock()
    timing.reply(type(model.optimizer).__name__)
    for _ in sys.stdin:
        history = model.fit(
            inputs, targets, batch_size=shape.batch, epochs=1, verbose=0, shuffle=False, callbacks=[clock]
        )
        answer = {"ms": clock.seconds / shape.steps * 1e3, "loss": history.history["loss"][0], "bytes": peak_bytes()}
        timing.reply(answer)


def peak_bytes() -> int | None:
    """Returns the most bytes that this process ever had allocated on the device, None where it doesn't count them."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"] if tf.config.list_physical_devices("GPU") else None


def measure(backend: str, names: list[str], epochs: int) -> dict[str, list[dict]]:
    """Returns the answers of each "side:policy", the epoch that compiles first."""
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(timing.Worker(__file__, name, backend)) for name in names}
        for worker in workers.values():
            worker.read()
        answers = {}
        for pair in zip(names[::2], names[1::2], strict=True):  # all at once, they'd try out too much memory
            for name in pair:
                workers[name].send("epoch")
            answers |= {name: [workers[name].read()] for name in pair}
        for epoch in range(epochs):
            for name in names if epoch % 2 else reversed(names):
                answers[name].append(workers[name].ask("epoch"))
    return answers


def device(backend: str) -> str:
    """Returns the name of the device that a backend computes on, asked in a process of its own."""
    question = "import jax; print(jax.devices()[0].device_kind, 'jax', jax.__version__)"
    if backend == "tensorflow":
        question = (
            "import tensorflow as tf; d = tf.config.list_physical_devices()[-1];"
            "print(tf.config.experimental.get_device_details(d).get('device_name', d.device_type), 'tf', tf.__version__)"
        )
    import subprocess

    done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def print_table(backend: str, shape: Shape, answers: dict[str, list[dict]]) -> None:
    """Prints a row for each policy and side, with ratios to stock Keras and to the base policy of the same side."""
    from rich.table import Table

    table = Table(title=f"Training step, {shape}, {device(backend)}", caption_justify="left")
    table.caption = (
        f"ms a step: the median of {len(next(iter(answers.values()))) - 1} epochs of {shape.steps} steps after the one "
        "that compiles. Ratios are medians of the epochs' ratios. Loss: mean over the last epoch."
    )
    for heading in ("backend", "policy", "side"):
        table.add_column(heading)
    for heading in ("ms a step", "to Keras's", f"to {BASE}", "peak GiB", "first loss", "last loss"):
        table.add_column(heading, justify="right")
    for name, taken in answers.items():
        side, _, policy = name.partition(":")
        peak = taken[-1]["bytes"]
        table.add_row(
            backend,
            policy,
            side,
            f"{statistics.median(a['ms'] for a in taken[1:]):.2f}",
            ratio(taken, answers.get(f"keras:{policy}")),
            ratio(taken, answers.get(f"{side}:{BASE}")),
            "" if peak is None else f"{peak / 2**30:.2f}",
            f"{taken[0]['loss']:.4f}",
            f"{taken[-1]['loss']:.4f}",
        )
    timing.show(table)


def ratio(ours: list[dict], others: list[dict] | None) -> str:
    """Returns the median of the ratios of times, epoch by epoch."""
    if others is None:
        return ""
    return f"{statistics.median(a['ms'] / b['ms'] for a, b in zip(ours[1:], others[1:], strict=True)):.3f}"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax", help="Keras backends, by commas")
    parser.add_argument("--policies", default=",".join(POLICIES), help="policies, by commas")
    parser.add_argument("--epochs", type=int, default=7, help="timed epochs of each process")
    parser.add_argument("--json", dest="path", help="also write the raw figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = vars(parser.parse_args())
    shape = Shape(**{name: arguments[name] for name in asdict(Shape())})
    if arguments["worker"]:
        serve(arguments["worker"], Shape(**json.loads(os.environ["TRAIN_STEP_SHAPE"])))
        return
    os.environ["TRAIN_STEP_SHAPE"] = json.dumps(asdict(shape))
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share the device
    for backend in arguments["backends"].split(","):
        names = [f"{side}:{policy}" for policy in arguments["policies"].split(",") for side in timing.SIDES]
        answers = {}
        # The processes of up to three 16-bit policies share a device of 80 GiB; float32 takes 20 GiB a process.
        large = [name for name in names if name.endswith(":float32")]
        small = [name for name in names if name not in large]
        for together in [small[start : start + 6] for start in range(0, len(small), 6)] + [large]:
            answers |= measure(backend, together, arguments["epochs"])
        if arguments["path"]:
            with open(arguments["path"], "w") as file:
                json.dump(answers, file)
        print_table(backend, shape, answers)


if __name__ == "__main__":
    main()

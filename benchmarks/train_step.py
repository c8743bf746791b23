"""Time, memory and loss of a GPT-2-small training step: stock Keras, ours, and torch and bitsandbytes where installed.

    python benchmarks/train_step.py                        # on a GPU with 80 GB, under 5 minutes
    python benchmarks/train_step.py --layers 1 --width 64 --vocabulary 512 --length 64 --batch 2 --size 256 \
        --backends tensorflow

Up to seven processes live at once and are asked for one epoch after the other, so that what slows the device hits all;
those of a policy are never apart. The device's bfloat16 matmul rate is measured before, by a process of its own.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import timing
from matmul import matmul_rate

# "unscaled" switches loss scaling off, which tells what it costs apart from what float16 itself does.
UNSCALED = "unscaled"
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", f"mixed_float16 {UNSCALED}", "bfloat16")
BASE = "mixed_bfloat16"  # what the cost of loss scaling is measured over
AUTOCAST = {"float32": None, "mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}  # torch's word for a policy
EIGHT_BITS = "8-bit AdamW"  # after a policy: ours and bitsandbytes', trained beside the policy's others
LEARNING_RATE = 3e-4
TOGETHER = 7  # processes of 16-bit policies that share 80 GiB, 7 to 12 each
RATE = "matmul rate"  # what the worker that measures it is called
SAMPLES = 5  # of it


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

    @property
    def operations(self) -> int:
        """Of a step's matrix products, two a multiplication and addition; backward takes twice what forward does.

        Scores and values count whole, also the half that the causal mask takes away.
        """
        projections, scores_and_values = 12 * self.width**2, 2 * self.length * self.width
        head = self.vocabulary * self.width
        return 3 * 2 * self.batch * self.length * (self.layers * (projections + scores_and_values) + head)


def build(shape: Shape, **compile_arguments):
    """Returns a compiled transformer of stock layers, without dropout, trained by AdamW if not told otherwise."""
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
    model.compile(**{"optimizer": keras.optimizers.AdamW(LEARNING_RATE), "loss": loss} | compile_arguments)
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


def build_in_torch(shape: Shape):
    """Returns the same transformer as a torch module that answers logits, its weights drawn as Keras's layers do."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(shape.width, eps=1e-5) for _ in range(2))
            self.inputs = dense(3 * shape.width, fans=2 * shape.width)  # Keras's are three layers
            self.output = dense(shape.width)
            self.inner = nn.Sequential(dense(4 * shape.width), nn.GELU(), dense(shape.width, of=4 * shape.width))

        def forward(self, x):
            heads = self.inputs(self.norms[0](x)).unflatten(-1, (3, shape.heads, -1))
            query, key, value = heads.permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.output(mixed.transpose(1, 2).flatten(2))
            return x + self.inner(self.norms[1](x))

    def dense(units, of=shape.width, fans=None, bias=True):
        layer = nn.Linear(of, units, bias)
        limit = math.sqrt(6 / (fans or of + units))
        nn.init.uniform_(layer.weight, -limit, limit)
        if bias:
            nn.init.zeros_(layer.bias)
        return layer

    torch.manual_seed(0)
    embedding = nn.Embedding(shape.vocabulary, shape.width)
    nn.init.uniform_(embedding.weight, -0.05, 0.05)
    blocks = [Block() for _ in range(shape.layers)]
    norm = nn.LayerNorm(shape.width, eps=1e-5)
    return nn.Sequential(embedding, *blocks, norm, dense(shape.vocabulary, bias=False))


def keras_epoch(side: timing.Side, policy: str, shape: Shape) -> Callable[[], dict]:
    """Returns a function that trains one epoch with `fit`.

    It answers milliseconds a step, the mean loss and the peak of the device's memory.
    """
    policy, _, change = policy.partition(" ")
    import keras

    set_global_policy, settings = keras.config.set_dtype_policy, {"auto_scale_loss": change != UNSCALED}
    if side == "ours":
        import keras_precision

        set_global_policy = keras_precision.set_global_policy
        if change == EIGHT_BITS:
            settings["optimizer"] = keras_precision.optimizers.AdamW8bit(LEARNING_RATE)
    keras.utils.set_random_seed(0)
    set_global_policy(policy)
    model = build(shape, **settings)
    inputs, targets = tokens_of(shape)

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.started = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            self.seconds = time.perf_counter() - self.started

    clock = Clock()

    def train():
        history = model.fit(
            inputs, targets, batch_size=shape.batch, epochs=1, verbose=0, shuffle=False, callbacks=[clock]
        )
        return {"ms": clock.seconds / shape.steps * 1e3, "loss": history.history["loss"][0], "bytes": peak_bytes()}

    return train


def torch_epoch(policy: str, shape: Shape) -> Callable[[], dict]:
    """Returns a function that answers the same for torch, and how torch ran; its tokens are on the device before."""
    policy, _, change = policy.partition(" ")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, which is JAX's and TensorFlow's default
    dtype = AUTOCAST[policy]
    autocast = torch.autocast(device, dtype and getattr(torch, dtype), enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device, enabled=dtype == "float16")
    model = build_in_torch(shape).to(device)
    settings = {"betas": (0.9, 0.999), "eps": 1e-7, "weight_decay": 0.004}  # Keras's defaults
    if change == EIGHT_BITS:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), LEARNING_RATE, **settings)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True, **settings)
    inputs, targets = (torch.from_numpy(x).long().to(device).split(shape.batch) for x in tokens_of(shape))

    def loss_of(tokens, following):
        return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())

    def gradients(loss_of, tokens, following):
        with autocast:
            loss = loss_of(tokens, following)
        scaler.scale(loss).backward()
        return loss.detach()

    loss_of, how = compiled(loss_of, lambda function: gradients(function, inputs[0], targets[0]))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def train():
        wait()
        started = time.perf_counter()
        losses = []
        for batch in zip(inputs, targets, strict=True):
            optimizer.zero_grad()
            losses.append(gradients(loss_of, *batch))
            scaler.step(optimizer)
            scaler.update()
        wait()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return {"ms": seconds / shape.steps * 1e3, "loss": torch.stack(losses).mean().item(), "bytes": peak, "how": how}

    return train


def compiled(function: Callable, attempt: Callable[[Callable], object]) -> tuple[Callable, str]:
    """Returns a function compiled by torch, and how it runs: eagerly on a CPU and where an attempt to run it fails."""
    import torch

    how = f"torch {torch.__version__}"
    if not torch.cuda.is_available():
        return function, f"{how}, eager"
    faster = torch.compile(function)
    try:
        attempt(faster)
    except Exception as error:  # noqa: BLE001 - no Triton, no C compiler, a device too old: of many classes, all told
        return function, f"{how}, eager, as torch.compile failed ({type(error).__name__})"
    return faster, f"{how}, compiled"


def names_of(policy: str, has_torch: bool, has_8_bits: bool) -> list[str]:
    """Returns what the processes of a policy are called: "side:policy"."""
    names = [f"{side}:{policy}" for side in (*timing.SIDES, *["torch"] * has_torch)]
    if has_8_bits:
        # bitsandbytes has optimizers for GPUs only, and is of no use without torch.
        has_bitsandbytes = has_torch and importlib.util.find_spec("bitsandbytes") and shutil.which("nvidia-smi")
        names += [f"{side}:{policy} {EIGHT_BITS}" for side in ("ours", *["bitsandbytes"] * bool(has_bitsandbytes))]
    return names


def function_of(name: str, shape: Shape) -> Callable:
    """Returns what a worker answers with: the matmul rate or, of a "side:policy", one more epoch."""
    if name == RATE:
        return functools.partial(matmul_rate, samples=SAMPLES)
    side, _, policy = name.partition(":")
    return keras_epoch(side, policy, shape) if side in timing.SIDES else torch_epoch(policy, shape)


def peak_bytes() -> int | None:
    """Returns the most bytes that this process ever had allocated on the device, None where it doesn't count them."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"] if tf.config.list_physical_devices("GPU") else None


def rounds_of(policies: list[list[str]]) -> list[list[list[str]]]:
    """Returns the policies' processes by the round in which they live: float32's, which take 20 GiB each, come last."""
    large = [names for names in policies if names[0].endswith(":float32")]
    rounds = [[]]
    for names in policies:
        if names in large:
            continue
        if len(names) + sum(map(len, rounds[-1])) > TOGETHER:
            rounds.append([])
        rounds[-1].append(names)
    return [*rounds, large]


def measure(backend: str, policies: list[list[str]], epochs: int) -> dict[str, list[dict]]:
    """Returns the answers of each "side:policy", the epoch that compiles first."""
    names = [name for sides in policies for name in sides]
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(timing.Worker(__file__, name, backend)) for name in names}
        for worker in workers.values():
            worker.read()
        answers = {}
        for sides in policies:  # all at once, they'd try out too much memory
            for name in sides:
                workers[name].send({})
            answers |= {name: [workers[name].read()] for name in sides}
        for epoch in range(epochs):
            for name in names if epoch % 2 else reversed(names):
                answers[name].append(workers[name].ask({}))
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


def print_table(backend: str, shape: Shape, rate: float, answers: dict[str, list[dict]]) -> None:
    """Prints a row for each policy and side, with ratios to stock Keras and to the base policy of the same side."""
    from rich.table import Table

    table = Table(title=f"Training step, {shape}, {device(backend)}", caption_justify="left")
    table.caption = (
        f"ms a step: the median of {len(next(iter(answers.values()))) - 1} epochs of {shape.steps} steps after the one "
        "that compiles. Ratios are medians of the epochs' ratios. Share: of the measured bfloat16 matmul rate, "
        f"{rate / 1e12:.4g} TFLOP/s, where a step's matrix products take {shape.operations / 1e12:.4g} TFLOP. "
        "Loss: mean over the first and the last epoch."
    )
    how = sorted({taken[-1]["how"] for taken in answers.values() if "how" in taken[-1]})
    if how:
        table.caption += f" Policies of torch and bitsandbytes: torch's autocast, TF32 for float32. {'; '.join(how)}."
    for heading in ("backend", "policy", "side"):
        table.add_column(heading)
    for heading in ("ms a step", "to Keras's", f"to {BASE}", "share", "peak GiB", "first loss", "last loss"):
        table.add_column(heading, justify="right")
    for name, taken in answers.items():
        side, _, policy = name.partition(":")
        peak = taken[-1]["bytes"]
        ms = statistics.median(a["ms"] for a in taken[1:])
        table.add_row(
            backend,
            policy,
            side,
            f"{ms:.2f}",
            ratio(taken, answers.get(f"keras:{policy.removesuffix(f' {EIGHT_BITS}')}")),
            ratio(taken, answers.get(f"{side}:{BASE}")),
            f"{shape.operations / (ms / 1e3) / rate:.1%}",
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
    parser.add_argument(
        "--torch", default="mixed_bfloat16,mixed_float16", help=f"of them torch's: {', '.join(AUTOCAST)}"
    )
    parser.add_argument("--eight-bits", default=BASE, help=f"policies trained by {EIGHT_BITS} as well")
    parser.add_argument("--epochs", type=int, default=7, help="timed epochs of each process")
    parser.add_argument("--size", type=int, default=8192, help="of the matrices that measure the device's matmul rate")
    parser.add_argument("--json", dest="path", help="also write the raw figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = vars(parser.parse_args())
    by_torch = [policy for policy in arguments["torch"].split(",") if policy]
    if not AUTOCAST.keys() >= set(by_torch):
        parser.error(f"Expected --torch from {', '.join(AUTOCAST)}. Received: {arguments['torch']}.")
    shape = Shape(**{name: arguments[name] for name in asdict(Shape())})
    if arguments["worker"]:
        timing.answer(function_of(arguments["worker"], Shape(**json.loads(os.environ["TRAIN_STEP_SHAPE"]))))
        return
    os.environ["TRAIN_STEP_SHAPE"] = json.dumps(asdict(shape))
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share the device
    by_torch = by_torch if importlib.util.find_spec("torch") else []
    in_8_bits = arguments["eight_bits"].split(",")
    policies = [names_of(policy, policy in by_torch, policy in in_8_bits) for policy in arguments["policies"].split(",")]
    for backend in arguments["backends"].split(","):
        with timing.Worker(__file__, RATE, backend) as worker:
            worker.read()
            rate = worker.ask({"size": arguments["size"]})
        answers = {}
        for together in rounds_of(policies):
            answers |= measure(backend, together, arguments["epochs"])
        if arguments["path"]:
            with open(arguments["path"], "w") as file:
                json.dump(answers, file)
        print_table(backend, shape, rate, answers)


if __name__ == "__main__":
    main()

"""`keras-precision bench`: what policies cost on this device, side by side."""

from __future__ import annotations

import dataclasses
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import click
import keras
import numpy as np
from rich.table import Table

from keras_precision import dtypes, hardware, policies
from keras_precision.cli.output import bad_input, show, takes_json
from keras_precision.formats.searched import SEARCHED
from keras_precision.kernels.compiled import compiled
from keras_precision.layers import float8
from keras_precision.layers.quantized import is_quantized
from keras_precision.progress import progress_bar

BASE = "float32"
POLICIES = (BASE, "mixed_bfloat16", "bfloat16", "mixed_float16", *SEARCHED)
ROWS = (1, 256)


@dataclasses.dataclass(frozen=True)
class PolicyTimes:
    """What one policy takes.

    Attributes:
        policy: its name.
        bytes: of the layer's weights.
        product_ms: milliseconds of a product, one for each of `ROWS`.
        step_ms: milliseconds of a training step with SGD; None for a policy that doesn't train its weights.
    """

    policy: str
    bytes: int
    product_ms: tuple[float, ...]
    step_ms: float | None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Times of several policies on one device.

    Attributes:
        size: rows and columns of the weight.
        samples: of which the fastest counts.
        times: one entry a policy, the base first.
    """

    size: int
    samples: int
    times: tuple[PolicyTimes, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the times with the device for JSON."""
        found = dataclasses.asdict(self)
        return {"hardware": hardware.describe().to_dict(), "base": BASE, "rows": ROWS, **found}

    def __rich__(self) -> Table:
        device = hardware.describe()
        name = device.cpu_name if device.devices[0][0] == "cpu" else device.devices[0][1]
        title = f"Dense({self.size}) on {keras.backend.backend()}, {name or platform.machine()}"
        caption = f"Milliseconds, the least of {self.samples}, and times as fast as {BASE}."
        table = Table("policy", title=title, caption=caption)
        table.add_column("bytes", justify="right")
        for rows in ROWS:
            table.add_column(f"{rows} row{'s' * (rows > 1)}", justify="right")
        table.add_column(f"training step, {ROWS[-1]} rows", justify="right")
        base = self.times[0]
        for entry in self.times:
            pairs = zip((*entry.product_ms, entry.step_ms), (*base.product_ms, base.step_ms), strict=True)
            cells = ["" if own is None else f"{own:.3f}  {reference / own:.2f}x" for own, reference in pairs]
            table.add_row(entry.policy, f"{entry.bytes:,}", *cells)
        return table


@click.command(epilog="\b\nExample: keras-precision bench --size 512 --policies bfloat16,mixed_bfloat16")
@click.option("--size", type=click.IntRange(1, 16384), default=1024, show_default=True, help="Of the square weight.")
@click.option("--policies", "names", default=",".join(POLICIES), show_default=True, help="Policies, by commas.")
@click.option(
    "--samples", type=click.IntRange(min=1), default=10, show_default=True, help="Of which the fastest counts."
)
@takes_json
def bench(size: int, names: str, samples: int, as_json: bool) -> None:
    """Time a Dense layer's product and training step on this device under several policies, beside float32."""
    wanted = [BASE, *(name for name in _names(names) if name != BASE)]
    with progress_bar("bench", "policies") as progress:
        task = progress.add_task("bench", total=len(wanted))
        times = []
        for name in wanted:
            try:
                times.append(_measure(name, size, samples))
            except (TypeError, ValueError) as error:
                raise bad_input(error, "--policies") from error
            progress.advance(task)
    show(Benchmark(size, samples, tuple(times)), as_json)


def _names(text):
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise click.BadParameter("Expected at least one policy name. Received: none.", param_hint="--policies")
    return found


def _measure(name, size, samples) -> PolicyTimes:
    policy = policies.get(name)
    layer = keras.layers.Dense(size, use_bias=False, dtype=policy)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* computes in .*, not in", hardware.PrecisionWarning)  # refused below
        model = keras.Sequential([keras.Input((size,), dtype="float32"), layer])
    if float8.is_asked(policy) and not float8.is_float8(layer):
        raise ValueError(
            f"Expected a size that '{policy.name}' multiplies in 8 bits. Received: --size {size}: "
            f"{float8.obstacle(layer, policy)}. Pass --size {policy.min_features}."
        )
    generator = np.random.default_rng(0)
    trainable = [variable.value for variable in layer.trainable_variables]
    fixed = [variable.value for variable in layer.non_trainable_variables]
    count = len(trainable)

    def product(x, *values):
        return layer.stateless_call(list(values[:count]), list(values[count:]), x)[0]

    run = compiled(product)
    inputs = [keras.ops.convert_to_tensor(generator.standard_normal((rows, size), "float32")) for rows in ROWS]
    calls = [lambda x=x: keras.ops.convert_to_numpy(run(x, *trainable, *fixed)) for x in inputs]
    product_ms = tuple(_least_ms(call, samples) for call in calls)
    step_ms = None
    if not is_quantized(layer):
        model.compile(keras.optimizers.SGD(1e-3), "mse")
        batch = generator.standard_normal((ROWS[-1], size), "float32")
        step_ms = _least_ms(lambda: model.train_on_batch(batch, batch), samples)
    return PolicyTimes(policy.name, dtypes.measured_bytes(layer.variables), product_ms, step_ms)


def _least_ms(call: Callable[[], object], samples: int) -> float:
    """Returns the milliseconds of a call that waits for its result, the least of several after two that compile."""
    taken = []
    for _ in range(samples + 2):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e3 * min(taken[2:])

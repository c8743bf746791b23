"""x (rows, k) times a quantized weight (k, n): ours, stock Keras's, and torch's and bitsandbytes' where they are installed.

Each subject runs in a process of its own, one after the other: several layers without bias, one after the other in one
jitted function, so that no weight is in a cache and the time to start the function is shared (with 8 layers an H100
waits 3 us a layer for the host). A sample is several calls, put in the device's queue, and the wait for the last one.
Its microseconds are told on stderr as soon as a subject is done. Before each sample of large products the device rests:
an H100 multiplies 4096 rows in 593 us after half a second's pause, in 655 when it has done so for a tenth of a second,
as its power is limited, and in 1,062 after two seconds, as its clock has gone down.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import platform
import sys
import time

import timing

DTYPE = "bfloat16"
BASE = "JAX"  # with a weight of that dtype, as torch
KERAS = {f"Keras {mode}": mode for mode in ("int8", "int4")}
OURS = {f"ours {name}": name for name in ("nf4", "nf4-dq", "int4", "int8-weight-only", "int8")}
OTHERS = {"torch": "torch", "bitsandbytes nf4": "bitsandbytes", "bitsandbytes LLM.int8": "bitsandbytes"}
ROWS_OF_LARGE_PRODUCTS = 1024
CALLS, CALLS_OF_LARGE_PRODUCTS = 30, 3  # a sample
SECONDS_OF_REST = 0.5


def keras_layers(name, k, n, dtype, count):
    """Returns built layers; stock Keras's are quantized by Keras, in a process that doesn't know us."""
    import keras

    if name in OURS:
        import keras_precision

        dtype = keras_precision.get(f"{OURS[name]}_from_{dtype}")
    found = []
    for _ in range(count):
        layer = keras.layers.Dense(n, use_bias=False, dtype=dtype)
        layer.build((None, k))
        if name in KERAS:
            layer.quantize(KERAS[name])
        found.append(layer)
    return found


def jax_call(name, k, n, dtype, count, of_gradients):
    """Returns (function of the number of rows that returns one to time and one that waits, bytes of a weight).

    What is timed are the layers' outputs, or their gradients with respect to x.
    """
    import jax
    import numpy as np

    layers = keras_layers(name, k, n, dtype, count)
    values = [([v.value for v in x.trainable_variables], [v.value for v in x.non_trainable_variables]) for x in layers]

    def outputs(x, values):
        return [layer.stateless_call(*own, x)[0] for layer, own in zip(layers, values, strict=True)]

    def gradients(upstream, values):
        x = jax.numpy.ones((upstream.shape[0], k), dtype)
        found = []
        for layer, own in zip(layers, values, strict=True):
            _, backward = jax.vjp(lambda x, layer=layer, own=own: layer.stateless_call(*own, x)[0], x)
            found += backward(upstream)
        return found

    def prepared(rows):
        shape = rows, n if of_gradients else k
        x = jax.numpy.asarray(np.random.default_rng(0).standard_normal(shape, dtype="float32"), dtype)
        compiled = jax.jit(gradients if of_gradients else outputs)
        return lambda: compiled(x, values), jax.block_until_ready

    return prepared, sum(x.nbytes for own in values[0] for x in own)


def torch_call(name, k, n, dtype, count):
    """Returns the same for torch's and bitsandbytes' layers; the latter need a GPU, and LLM.int8 takes float16."""
    import torch

    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, which is JAX's default
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, dtype)
    weights = [torch.randn(n, k, device=device, dtype=dtype) for _ in range(count)]
    nbytes = weights[0].nbytes
    if name == "bitsandbytes nf4":
        import bitsandbytes

        packed = [bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", blocksize=64) for w in weights]
        calls = [lambda x, p=p: bitsandbytes.matmul_4bit(x, p[0].t(), p[1]) for p in packed]
        nbytes = sum(t.numel() * t.element_size() for t in (packed[0][0], packed[0][1].absmax))
    elif name == "bitsandbytes LLM.int8":
        import bitsandbytes

        dtype, nbytes = torch.float16, k * n + 4 * n
        calls = [bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False).cuda() for _ in range(count)]
    else:
        calls = [lambda x, w=w: x @ w.T for w in weights]

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    def prepared(rows):
        x = torch.randn(rows, k, device=device, dtype=dtype)

        def run():
            with torch.no_grad():
                return [call(x) for call in calls]

        return run, wait

    return prepared, nbytes


def least_seconds(run, wait, samples, calls=CALLS, rest=0.0) -> float:
    """Returns the seconds of a call, the least of several samples of some calls, each taken after some seconds of rest."""
    for _ in range(2):
        wait(run())
    taken = []
    for _ in range(samples):
        time.sleep(rest)
        start = time.perf_counter()
        for _ in range(calls):
            found = run()
        wait(found)
        taken.append((time.perf_counter() - start) / calls)
    return min(taken)


def matmul_rate(size, samples, dtype=DTYPE) -> float:
    """Returns the operations a second of a product of square matrices, the most of several samples.

    Of random numbers: of ones or zeros GPUs multiply more a second, as they need less power.
    """
    import keras
    from keras import ops

    array = keras.random.normal((size, size), dtype=dtype, seed=0)
    return 2 * size**3 / least_seconds(lambda: ops.matmul(array, array), lambda found: float(found[0, 0]), samples)


def limits(size, samples, dtype):
    """Returns (bytes a second that a copy reads and writes, operations a second of a matmul)."""
    import jax
    import jax.numpy as jnp

    large = jnp.ones((size * size * 8,), "float32")
    copy = jax.jit(lambda x: x + 1)
    copying = least_seconds(lambda: copy(large), jax.block_until_ready, samples)
    return 2 * large.nbytes / copying, matmul_rate(size, samples, dtype)


def measure(
    name: str, k: int, n: int, dtype: str, rows: list[int], count: int, samples: int, size: int, of_gradients: bool
) -> dict:
    """Returns the seconds of a product for each number of rows, the bytes of a weight and the device's limits."""
    make = torch_call if name in OTHERS else functools.partial(jax_call, of_gradients=of_gradients)
    prepared, nbytes = make(name, k, n, dtype, count)
    seconds = []
    for m in rows:
        is_large = m >= ROWS_OF_LARGE_PRODUCTS
        settings = (CALLS_OF_LARGE_PRODUCTS, SECONDS_OF_REST) if is_large else ()
        seconds.append(least_seconds(*prepared(m), samples, *settings) / count)
    return {"seconds": seconds, "bytes": nbytes, "limits": limits(size, samples, dtype) if name == BASE else None}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096,14336", help="k,n")
    parser.add_argument("--dtype", default=DTYPE, help="of x, and of the weights that ours are compared with")
    parser.add_argument("--rows", default="1,16,64,256,4096", help="numbers of rows of x, by commas")
    parser.add_argument("--layers", type=int, default=24, help="in one call")
    parser.add_argument("--samples", type=int, default=5, help="of some calls, of which the fastest counts")
    parser.add_argument("--size", type=int, default=8192, help="of the matrices that measure the device's limits")
    parser.add_argument("--gradients", action="store_true", help="with respect to x, in place of products (not torch)")
    parser.add_argument("--only", type=lambda text: text.split(";"), help="subjects, by semicolons")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        timing.answer(functools.partial(measure, arguments.worker))
        return
    others = {} if arguments.gradients else OTHERS
    if arguments.gradients and not OTHERS.keys().isdisjoint(arguments.only or ()):
        parser.error(f"--gradients measures none of {', '.join(OTHERS)}.")
    k, n = map(int, arguments.shape.split(","))
    rows = [int(m) for m in arguments.rows.split(",")]
    question = {"k": k, "n": n, "dtype": arguments.dtype, "rows": rows, "count": arguments.layers}
    question |= {"samples": arguments.samples, "size": arguments.size, "of_gradients": arguments.gradients}
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    present = [name for name, module in others.items() if importlib.util.find_spec(module)]
    names = [BASE, *(arguments.only or [*OURS, *KERAS, *present])]
    answers = {}
    for name in names:
        with timing.Worker(__file__, name, "jax") as worker:
            worker.read()
            answers[name] = worker.ask(question)
        print(f"{name}:", *(f"{1e6 * x:.1f}" for x in answers[name]["seconds"]), file=sys.stderr, flush=True)
    product = f"Gradients (rows, {n}) times a transposed" if arguments.gradients else f"x (rows, {k}) times"
    show(f"{product} ({k}, {n}), {arguments.dtype}", k, n, arguments.dtype, rows, answers)


def show(title, k, n, dtype, rows, answers) -> None:
    """Prints a row for each subject, with its times and their ratios to the base."""
    from ml_dtypes import finfo
    from rich.table import Table

    base = answers[BASE]
    bandwidth, rate = base["limits"]
    table = Table(title=title, caption_justify="left")
    table.caption = (
        f"{platform.machine()}. Microseconds, ratio to {BASE} {dtype}, and the share of the device's bandwidth "
        f"({bandwidth / 1e12:.3f} TB/s copied) or of its matmul rate ({rate / 1e12:.1f} TFLOP/s), whichever is more."
    )
    for heading in ("subject", "MB"):
        table.add_column(heading)
    for m in rows:
        table.add_column(f"{m} rows", justify="right")
    for name, found in answers.items():
        cells = []
        for m, seconds, reference in zip(rows, found["seconds"], base["seconds"], strict=True):
            moved = found["bytes"] + finfo(dtype).bits // 8 * m * (k + n)
            share = max(moved / bandwidth, 2 * m * k * n / rate) / seconds
            cells.append(f"{seconds * 1e6:.1f}  {seconds / reference:.2f}  {share:.0%}")
        table.add_row(f"{name} {dtype}" if name in (BASE, "torch") else name, f"{found['bytes'] / 1e6:.1f}", *cells)
    timing.show(table)


if __name__ == "__main__":
    main()

"""Speed and memory of quantizing a weight: our formats, Keras's int8 and int4, and bitsandbytes where it is installed.

    python benchmarks/quantize.py                              # 100 million parameters, about 5 minutes on 2 cores
    python benchmarks/quantize.py --rows 1024 --columns 1024 --backends jax

Each format is measured in a process of its own, after a first run that compiles.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import timing

BLOCK_SIZE = 64
GOAL = 240  # million parameters a second on 2 cores; bitsandbytes' 4-bit formats reach 24
MEMORY_GOAL = 0.1  # of the weight's, beside the weight and what it is encoded to
BITSANDBYTES = ("nf4", "nf4-dq", "fp4", "fp4-dq")
KERAS = ("int8", "int4")


@dataclass(frozen=True)
class Row:
    """What was measured of a format.

    Attributes:
        library: whose.
        name: of the format.
        encode: parameters a second.
        decode: parameters a second, to float32, compiled.
        memory: most bytes that encoding allocated beside its result, as a share of the weight's; None if unknown.
    """

    library: str
    name: str
    encode: float
    decode: float
    memory: float | None


def our_functions(name, shape):
    """Returns (encode, decode) of one of our formats."""
    from keras import ops

    from keras_precision.formats import FORMATS
    from keras_precision.kernels.compiled import compiled

    decode = compiled(lambda *parts: FORMATS[name].decode(dict(zip(order, parts, strict=True)), shape, "float32"))
    order = list(FORMATS[name].parts(shape))
    return FORMATS[name].encode, lambda parts: decode(*(ops.convert_to_tensor(parts[part]) for part in order))


def keras_functions(name, shape):
    """Returns (encode, decode) as Dense.quantize and Dense.call of stock Keras do it; int4 in blocks."""
    from keras import ops, quantizers

    from keras_precision.kernels.compiled import compiled

    if name == "int8":
        decode = compiled(lambda codes, scale: ops.divide(ops.cast(codes, "float32"), scale))
        return lambda weight: quantizers.AbsMaxQuantizer(axis=0)(weight, to_numpy=True), lambda parts: decode(*parts)

    def encode(weight):
        quantize = quantizers.abs_max_quantize_grouped_with_zero_point
        codes, scale, zero = quantize(weight, block_size=BLOCK_SIZE, to_numpy=True)
        return quantizers.pack_int4(codes, axis=-1)[0], scale, zero

    @compiled
    def decode(packed, scale, zero):
        group = ops.arange(shape[0]) // BLOCK_SIZE
        codes = quantizers.unpack_int4(packed, shape[1], axis=-1)
        zero = ops.cast(ops.take(zero, group, axis=0), "float32")
        return (ops.cast(codes, "float32") - zero) * ops.take(scale, group, axis=0)

    return encode, lambda parts: decode(*map(ops.convert_to_tensor, parts))


def bitsandbytes_functions(name, shape):
    """Returns (encode, decode) of bitsandbytes, which reads the weight by rows, so that its transpose has as many."""
    import torch
    from bitsandbytes import functional

    kind, _, double = name.partition("-")

    def encode(weight):
        return functional.quantize_4bit(
            torch.from_numpy(weight), blocksize=BLOCK_SIZE, compress_statistics=bool(double), quant_type=kind
        )

    return encode, lambda encoded: functional.dequantize_4bit(*encoded)


FUNCTIONS = {"ours": our_functions, "Keras": keras_functions, "bitsandbytes": bitsandbytes_functions}


def nbytes(encoded) -> int:
    """Returns the bytes of all arrays in what an encoder returned; of bitsandbytes only the codes'."""
    import keras

    return sum(getattr(leaf, "nbytes", 0) for leaf in keras.tree.flatten(encoded))


def peak_memory() -> int | None:
    """Returns the greatest resident size since `reset_peak_memory`, None where the system doesn't tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak_memory() -> None:
    """Starts counting from what is resident now."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def serve(subject: str, shape: tuple[int, int]) -> None:
    """Answers with the share of memory that encoding takes, and then "encode" and "decode" with seconds."""
    import numpy as np

    library, _, name = subject.partition(":")
    encode, decode = FUNCTIONS[library](name, shape)
    weight = np.random.default_rng(0).standard_normal(shape, dtype="float32")
    encode(weight[: -(-shape[0] // 8)])  # compiles, in little memory that is then at hand
    reset_peak_memory()
    before = peak_memory()
    encoded = encode(weight)
    timing.reply(None if before is None else (peak_memory() - before - nbytes(encoded)) / weight.nbytes)
    wait(decode(encoded))
    for line in sys.stdin:
        start = time.perf_counter()
        if json.loads(line) == "encode":
            encode(weight)
        else:
            wait(decode(encoded))
        timing.reply(time.perf_counter() - start)


def wait(tensor) -> None:
    """Returns when a tensor has been computed, which JAX does not wait for."""
    getattr(tensor, "block_until_ready", lambda: None)()


def subjects() -> list[str]:
    """Returns what can be measured here, as "library:format"."""
    from keras_precision.formats import FORMATS, Codec

    found = [f"ours:{name}" for name, entry in FORMATS.items() if isinstance(entry, Codec)]
    found += [f"Keras:{name}" for name in KERAS]
    if importlib.util.find_spec("bitsandbytes") and importlib.util.find_spec("torch"):
        found += [f"bitsandbytes:{name}" for name in BITSANDBYTES]
    return found


def measure(backend: str, shape: tuple[int, int], samples: int, names: list[str]) -> list[Row]:
    """Returns a row for each subject."""
    rows = []
    for subject in names:
        with timing.Worker(__file__, subject, backend) as worker:
            memory = worker.read()
            taken = {question: min(worker.ask(question) for _ in range(samples)) for question in ("encode", "decode")}
        rates = {question: shape[0] * shape[1] / seconds for question, seconds in taken.items()}
        rows.append(Row(*subject.split(":"), **rates, memory=memory))
    return rows


def print_table(backend: str, shape: tuple[int, int], rows: list[Row], caption: str) -> None:
    """Prints a row for each format, with our speed as a multiple of that of others' formats of the same kind."""
    from rich.table import Table

    table = Table(title=f"Quantizing {shape[0]} x {shape[1]} float32 weights", caption=caption, caption_justify="left")
    for heading in ("backend", "library", "format"):
        table.add_column(heading)
    for heading in ("encode, M/s", "goal", "met", "to Keras", "to bitsandbytes", "extra memory", "decode, M/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        is_ours = row.library == "ours"
        is_met = row.encode >= GOAL * 1e6 and (row.memory is None or row.memory < MEMORY_GOAL)
        table.add_row(
            backend,
            row.library,
            row.name,
            f"{row.encode / 1e6:.0f}",
            f">= {GOAL}, < {MEMORY_GOAL:.0%}" if is_ours else "",
            ("yes" if is_met else "NO") if is_ours else "",
            ratio(row, [other for other in rows if other.library == "Keras" and bits(other) == bits(row)]),
            ratio(row, [other for other in rows if other.library == "bitsandbytes" and other.name == row.name]),
            "" if row.memory is None else f"{row.memory:.1%}",
            f"{row.decode / 1e6:.0f}",
        )
    timing.show(table)


def bits(row: Row) -> str:
    """Returns which of Keras's formats a format is compared with."""
    return KERAS[0] if KERAS[0] in row.name else KERAS[1]


def ratio(row: Row, others: list[Row]) -> str:
    """Returns how many times as fast our encoder is as another one, if there is one."""
    return f"{row.encode / others[0].encode:.1f}" if others and row.library == "ours" else ""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default=",".join(timing.BACKENDS), help="Keras backends, by commas")
    parser.add_argument("--rows", type=int, default=8192, help="of the weight, which matmuls contract")
    parser.add_argument("--columns", type=int, default=12288, help="of the weight")
    parser.add_argument("--samples", type=int, default=5, help="runs, of which the fastest counts")
    parser.add_argument("--only", help="what to measure, such as ours:nf4,Keras:int4; by default everything")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, tuple(json.loads(os.environ["QUANTIZE_SHAPE"])))
        return
    shape = (arguments.rows, arguments.columns)
    os.environ["QUANTIZE_SHAPE"] = json.dumps(shape)
    for backend in arguments.backends.split(","):
        load = os.getloadavg()[0]
        rows = measure(backend, shape, arguments.samples, arguments.only.split(",") if arguments.only else subjects())
        caption = (
            f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} at the "
            f"end. Best of {arguments.samples} runs. Extra memory: the most that encoding held beside its result, as "
            "a share of the weight's."
        )
        print_table(backend, shape, rows, caption)


if __name__ == "__main__":
    main()

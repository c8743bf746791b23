"""Products of one row of activations with stored codes, number by number, as a Pallas kernel for NVIDIA GPUs (JAX only).

It is bound by reading the codes, so that a thread decodes and multiplies what it has read itself: nothing is exchanged
before its sums are complete. A program works on some columns and, side by side, on several runs of rows; partial sums
of several programs are added up by XLA, which puts what follows into the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keras_precision.kernels import codes as code_values
from keras_precision.kernels.compiled import jitted, triton_call
from keras_precision.kernels.layout import Layout, scales_at, vectors
from keras_precision.kernels.partial_sums import added, places, split

_LONGEST_RUN = 64  # rows of the weight: the kernel's code is as long as a run


@dataclass(frozen=True)
class Strip:
    """What one program works on at a time.

    Attributes:
        columns: of the weight; a power of two.
        runs: of rows, worked on side by side, each within a block that shares
            scales; a power of two.
        rows: of bytes that are read at once in each run; a power of two.
        reads: such reads that are begun before the first is used; a power of
            two.
        warps: of a program.
        programs: so many run, or fewer; an H100 has 132 multiprocessors.
    """

    columns: int
    runs: int
    rows: int
    reads: int
    warps: int
    programs: int = 896


def product(
    x,
    codes,
    scales: Sequence,
    layout: Layout,
    strip: Strip,
    dtype: str,
    result: str | None = None,
    interpret: bool = False,
):
    """Returns x times the weight.

    Values are multiplied and added up in float32. With u = 2**-24, an element
    differs from the exact product of x and the weight by at most
    sum |x| |weight| (k + 3) u, and one rounding to `dtype`.

    Args:
        x: tensor (m, k) of `dtype`, of which each row reads all codes.
        codes: uint8 (ceil(k / 2), n), or int8 (k, n).
        scales: float32 (n,) alone, or see `layout.scales_at`; none at all
            multiplies with the codes' values.
        layout: what the arrays mean.
        strip: what a program works on.
        dtype: "float16", "bfloat16" or "float32".
        result: dtype of the result; None for the same.
        interpret: True to run the kernel on any device, slowly.

    Returns:
        Tensor (m, n).
    """
    static = {"layout": layout, "strip": strip, "result": result or dtype, "interpret": interpret}
    return jitted(_product, tuple(static))(x, codes, tuple(scales), **static)


def _product(x, codes, scales, *, layout, strip, result, interpret):
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    (k, n), (m, _), per_byte = layout.shape, x.shape, layout.codes_per_byte
    run = min(_LONGEST_RUN, layout.block_size or _LONGEST_RUN) // per_byte
    rows = min(strip.rows, run)
    reads = min(strip.reads, run // rows)
    step_rows = strip.runs * run
    steps = -(-layout.byte_rows // step_rows)
    column_programs = -(-n // strip.columns)
    splits, steps_each = split(steps, strip.programs // (column_programs * m))
    per_block = layout.block_size is not None
    is_whole = layout.byte_rows == splits * steps_each * step_rows
    # Rows beyond the last are multiplied with zeros, columns beyond the last are cut off.
    x = jnp.pad(x, ((0, 0), (0, splits * steps_each * step_rows * per_byte - k)))

    def kernel(x_ref, codes_ref, *refs):
        *scale_refs, out_ref = refs
        column_program, part, row = (pl.program_id(axis) for axis in range(3))
        start_of_columns = column_program * strip.columns
        columns = places(start_of_columns, strip.columns, n)[None]
        read_rows = jnp.arange(strip.runs * rows)  # each has its run, and its row in there
        first_rows = read_rows // rows * run + read_rows % rows

        def existing(byte_rows):
            return byte_rows if is_whole else jnp.minimum(byte_rows, layout.byte_rows - 1)

        def step(i, total):
            start = (part * steps_each + i) * step_rows
            partial = jnp.zeros(total.shape, "float32")
            for first in range(0, run, rows * reads):
                read = []
                for offset in range(first, first + rows * reads, rows):
                    byte_rows = start + offset + first_rows
                    read.append((byte_rows, codes_ref[existing(byte_rows)[:, None], columns]))
                for byte_rows, packed in read:
                    for place, value in enumerate(code_values.values(packed, layout.values, interpret)):
                        factor = x_ref[row, byte_rows * per_byte + place].astype("float32")
                        partial += value * factor[:, None]
            if per_block:
                block = existing(start + first_rows) * per_byte // layout.block_size
                partial *= scales_at(scale_refs, block[:, None], columns, layout)
            return total + partial

        total = jnp.zeros((strip.runs * rows, strip.columns), "float32")
        total = jax.lax.fori_loop(0, steps_each, step, total) if steps_each > 1 else step(0, total)
        out_ref[part, row, pl.ds(start_of_columns, strip.columns)] = jnp.sum(total, axis=0)

    sums = triton_call(
        kernel,
        grid=(column_programs, splits, m),
        out_shape=jax.ShapeDtypeStruct((splits, m, column_programs * strip.columns), "float32"),
        warps=strip.warps,
        interpret=interpret,
    )(x, codes, *(vectors(scales) if per_block else ()))
    return added(sums, (m, n), scales, layout, result)

"""Which kernel multiplies how many rows with a stored weight fastest: what `keras_precision/kernels/measured.py` holds.

Needs an NVIDIA GPU that Triton knows; on Hopper slabs and warps are tried too. For each shape, kind of codes and number
of rows, all tiles are compiled, checked against the decoded weight and timed as `benchmarks/matmul.py` does; the fastest
few are printed, and the fastest of each kind of tile, with XLA's decoding and with a bfloat16 weight.
"""

from __future__ import annotations

import argparse
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import matmul

FORMATS = ("nf4", "int4", "int8-weight-only")
COUNT = 24  # weights in one call


def tiles(rows, kind, dtype):
    """Yields what to try for so many rows of x of a dtype and codes of a kind."""
    from keras_precision.kernels import device
    from keras_precision.kernels.one_thread import Warps
    from keras_precision.kernels.row_product import Strip
    from keras_precision.kernels.warpgroup import Slab
    from keras_precision.kernels.weight_only import Tile

    if device.has_wgmma() and dtype != "float32":
        for columns, width, warps in ((128, 8, 16), (128, 16, 16), (128, 16, 8), (64, 8, 8), (64, 8, 16)):
            if rows <= 16:
                yield from (Warps(columns, width, warps, ahead, 132 * 16 // warps) for ahead in (1, 2))
        batch = min(-(-rows // 8) * 8, 256)
        for parts, stages in ((1, 4), (1, 5), (2, 3), (2, 4), (2, 5), (4, 3), (4, 4), (4, 5), (8, 3)):
            for tabled in (False, True) if kind == "table" else (False,):
                yield from (Slab(batch, parts, stages, cluster, tabled=tabled) for cluster in (1, 2))
                if rows > batch:
                    yield Slab(batch, parts, stages, cluster=2, tabled=tabled, stays=False)
                if batch <= 64 and parts > 1:
                    yield Slab(batch, parts, stages, pairs=2, tabled=tabled)
    if rows <= 2:
        for columns, runs, programs in itertools.product((128, 256, 512), (4, 8), (448, 896)):
            for reads in (4, 8):
                yield Strip(columns, runs, 512 // columns, reads, runs, programs)
    batches = [batch for batch in (16, 32, 64, 128) if batch < 2 * rows or batch == 16]
    for batch in batches if 1 < rows <= 256 else []:
        for columns, stages, ahead in itertools.product((64, 128), (1, 3), (False, True)):
            for programs in (224, 896) if rows >= 64 else (896,):
                yield Tile(batch, columns, 32, 1, 4, stages, ahead, programs)


def transposed_tiles(rows, kind, dtype):
    """Yields what to try for so many rows times the transposed weight."""
    from keras_precision.kernels import device
    from keras_precision.kernels.warpgroup import Slab
    from keras_precision.kernels.weight_only_transposed import TransposedTile

    if device.has_wgmma() and dtype != "float32":
        batch = min(-(-rows // 8) * 8, 256)
        for parts, stages in ((2, 2), (2, 3), (2, 4), (4, 3), (4, 4), (4, 5)):
            yield from (Slab(batch, parts, stages, cluster) for cluster in (1, 2))
            if batch <= 64:
                yield Slab(batch, parts, stages, pairs=2)
    batches = [batch for batch in (16, 32, 64, 128) if batch < 2 * rows or batch == 16]
    for batch in batches if rows <= 256 else []:
        for rows_of_bytes in (32, 64) if kind == "bytes" else (16, 32):
            for columns, warps, stages in itertools.product((32, 64, 128), (4, 8), (1, 3)):
                for programs in (448, 896) if batch >= 64 else (896,):
                    yield TransposedTile(batch, rows_of_bytes, columns, warps, stages, programs)


def decoding_tiles():
    """Yields what to try for decoding."""
    from keras_precision.kernels.weight_only import Tile

    for columns, rows, warps in itertools.product((128, 256, 512), (8, 16, 32), (4, 8)):
        yield Tile(1, columns, rows, 1, warps)


def kind_of(subject: str) -> str:
    """Returns what a subject is apart from its numbers.

    >>> kind_of("Tile(batch=16)"), kind_of("decoded, Tile(batch=1)"), kind_of("chosen")
    ('Tile', 'decoded, Tile', 'chosen')
    """
    return subject.partition("(")[0]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x14336,4096x4096", help="k x n, by commas")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256", help="numbers of rows of x, by commas")
    parser.add_argument("--formats", default=",".join(FORMATS), help="one of each kind of codes, by commas")
    parser.add_argument("--dtype", default=matmul.DTYPE, help="of x")
    parser.add_argument("--precision", help="of JAX's float32 products: highest, high, default")
    parser.add_argument("--gradients", action="store_true", help="products with the transposed weight")
    parser.add_argument("--only", help="kinds of tiles, by commas: they take most of the time to compile")
    parser.add_argument("--best", type=int, default=4, help="how many to print")
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = "jax"
    from keras_precision.kernels import device

    if arguments.precision:
        from keras_precision import hardware

        hardware.set_matmul_precision(arguments.precision)
    if not device.has_triton():
        print("Nothing measured: this needs an NVIDIA GPU from Ampere on.")
        return
    for shape in arguments.shapes.split(","):
        for name in arguments.formats.split(","):
            rows = [int(m) for m in arguments.rows.split(",")]
            only = arguments.only and arguments.only.split(",")
            tune(name, *map(int, shape.split("x")), rows, arguments.dtype, arguments.gradients, only, arguments.best)


def tune(name, k, n, rows, dtype, of_gradients, only, best) -> None:
    """Prints the fastest for one format, shape and dtype of x, of products or of their gradients with respect to x.

    Of tiles only kinds in `only` are tried, unless it is None.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from keras_precision.formats import FORMATS as formats
    from keras_precision.formats import double_quant
    from keras_precision.kernels import dispatch, weight_only

    def asked(product):
        """Returns a product of (x, parts), or its gradient: the product with the transposed weight."""

        def gradient(upstream, p):
            _, backward = jax.vjp(lambda x: product(x, p), jnp.zeros((upstream.shape[0], k), dtype))
            return backward(upstream)[0]

        return gradient if of_gradients else product

    candidates = transposed_tiles if of_gradients else tiles
    multiply_by = dispatch.transposed_product_by if of_gradients else dispatch.product_by
    codec = formats[name]
    draw = np.random.default_rng(0)
    encoded = codec.encode(draw.standard_normal((k, n), dtype="float32"))
    encoded = {part: np.asarray(array) for part, array in encoded.items()}
    parts = [
        {part: jnp.asarray(np.roll(array, i, -1) if array.ndim else array) for part, array in encoded.items()}
        for i in range(COUNT)
    ]
    weights = [jax.jit(lambda p: codec.decode(p, (k, n), dtype))(p) for p in parts]
    layout = codec.layout((k, n))

    def timed(compiled, *inputs):
        return matmul.least_seconds(lambda: compiled(*inputs), jax.block_until_ready, 4) / COUNT * 1e6

    def compile_for(product, x):
        try:
            return jax.jit(lambda x, parts: [product(x, p) for p in parts]).lower(x, parts).compile()
        except Exception as error:  # a tile may need more registers or memory than there is
            return str(error)[:80]

    for m in rows:
        x = jnp.asarray(draw.standard_normal((m, n if of_gradients else k), dtype="float32"), dtype)
        subjects = {
            str(tile): lambda x, p, tile=tile: multiply_by(tile)(
                x, p["codes"], double_quant.arrays(p), layout, tile, dtype
            )
            for tile in candidates(m, layout.kind, dtype)
            if not only or kind_of(str(tile)) in only
        }
        for tile in decoding_tiles() if m == max(rows) else ():
            subjects[f"decoded, {tile}"] = asked(
                lambda x, p, tile=tile: x @ weight_only.decoded(p["codes"], double_quant.arrays(p), layout, tile, dtype)
            )
        subjects["chosen"] = asked(lambda x, p: codec.matmul(x, p, (k, n), dtype))
        subjects["decoded by XLA"] = asked(lambda x, p: x @ codec.decode(p, (k, n), dtype))
        with ThreadPoolExecutor(14) as pool:
            compiled = dict(zip(subjects, pool.map(lambda f: compile_for(f, x), subjects.values()), strict=True))
        base = jax.jit(lambda x, weights: [x @ (w.T if of_gradients else w) for w in weights])
        first = weights[0].T if of_gradients else weights[0]
        exact = np.asarray(jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type="float32"))(x, first))
        found = {dtype: timed(base, x, weights)}
        for subject, function in compiled.items():
            if isinstance(function, str):
                print("failed:", name, m, subject, function)
                continue
            error = np.abs(np.asarray(function(x, parts)[0], "float32") - exact).max() / np.abs(exact).max()
            found[subject + (f" WRONG BY {error:.0e}" if error > 0.01 else "")] = timed(function, x, parts)
        ranked = sorted(found.items(), key=lambda item: item[1])
        firsts = {kind_of(subject): subject for subject, _ in reversed(ranked)}
        fixed = [item for item in ranked[best:] if item[0] in firsts.values() or "WRONG" in item[0]]
        print(f"{name} {k}x{n}, {m} rows:")
        for subject, microseconds in [*ranked[:best], *fixed]:
            print(f"    {microseconds:7.1f} us  {subject}", flush=True)


if __name__ == "__main__":
    main()

"""Work on a matrix in pieces: that they cover it, and how much memory they take."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from keras_precision.formats import host, pieces

sizes = st.integers(1, 300) | st.integers(1, 2**17)


@given(k=sizes, n=sizes, block_size=st.sampled_from([1, 2, 32, 64, 4096]), is_compiled=st.booleans())
def test_grids(k, n, block_size, is_compiled):
    """Whole blocks, not much more of them than there is weight, and of no more memory than meant."""
    grid = pieces.Grid.of((k, n), block_size, is_compiled)
    assert grid.rows % block_size == 0
    covered = -(-k // grid.rows) * grid.rows * -(-n // grid.columns) * grid.columns
    if not is_compiled:
        assert grid.columns <= n and covered <= (k + grid.rows) * (n + grid.columns)
        assert grid.rows * grid.columns <= max(pieces._HOST_ELEMENTS, block_size * grid.columns)
    else:
        assert grid.rows % 128 == 0 and (grid.columns % 256 == 0 or grid.columns & (grid.columns - 1) == 0)
        assert grid.rows * grid.columns <= 2 * pieces._COMPILED_ELEMENTS + 128 * 2048
        if k >= 1024 and n >= 2048 and block_size <= 64:
            assert covered <= 1.7 * k * n  # at worst 1.66, of (1153, 2049)


def test_shapes_that_are_compiled_are_few():
    """Layers of many widths share them, since each takes XLA about 0.2 s."""
    widths = range(512, 2048, 8)
    assert len({pieces.Grid.of((2048, width), 64, True) for width in widths}) <= 8


def sums(xp, grouped, factor):
    """Of each block's first two rows, times a factor for each column."""
    return (grouped[:, 0] + grouped[:, 1]) * factor


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 1), (1, 300), (301, 77)])
def test_fill(shape, is_compiled):
    k, n = shape
    weight, factor = np.arange(k * n, dtype="float32").reshape(shape) % 97, np.arange(n, dtype="float32")[None] % 13
    found, factors = np.full((-(-k // 2), n), np.nan), np.full((-(-k // 128), n), np.nan)
    grid = pieces.Grid(128, 16, 2, is_compiled)
    pieces.fill((found, factors), lambda run, grouped, own: (run(sums, grouped, own), own), weight, grid, (factor,))
    padded = np.concatenate([weight, np.zeros((k % 2, n))])
    assert np.array_equal(found, (padded[0::2] + padded[1::2]) * factor)
    assert np.array_equal(factors, np.broadcast_to(factor, factors.shape))


def test_errors_of_threads_are_raised():
    def work(run, grouped):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        pieces.fill((np.empty((4096, 1)),), work, np.ones((4096, 1), "float32"), pieces.Grid(128, 1, 1, False))


def test_casting_on_the_host():
    above = np.array([1.0, -2.0]) > 0
    assert host.cast(above, "uint8").tolist() == [1, 0]
    assert host.cast(np.array([1e39, 1.5]), "float32").tolist() == [np.inf, 1.5]


def test_matrices_are_not_copied():
    weight = np.ones((8, 4), "float32")
    assert pieces.as_matrix(weight) is weight
    for held in (ops.convert_to_tensor(weight), keras.Variable(weight), keras.Variable(weight, dtype="bfloat16")):
        assert np.shares_memory(pieces.as_matrix(held), pieces.as_matrix(held))


# A weight of 256 MiB is encoded in a process of its own, whose greatest resident size tells what was allocated. Linux
# starts counting anew when 5 is written to clear_refs; importing a backend may have taken more than is held now.
MEASURE = """
import sys
from pathlib import Path
import numpy as np
from keras_precision.formats import FORMATS

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

codec = FORMATS[sys.argv[1]]
codec.encode(np.ones((1280, 8192), "float32"))  # XLA itself, and what it compiles for these pieces
weight = np.ones((8192, 8192), "float32")
weight[::3] = -0.5
Path("/proc/self/clear_refs").write_text("5")
before = peak()
encoded = codec.encode(weight if sys.argv[2] == "ours" else weight * 1)
print((peak() - before - sum(part.nbytes for part in encoded.values())) / weight.nbytes)
"""
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")


def share_of_memory(name, how):
    command = [sys.executable, "-c", MEASURE, name, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


@pytest.mark.default_xla
@on_linux
@pytest.mark.parametrize("name", ["nf4-dq", "int8"])
def test_encoding_takes_less_than_a_tenth_of_the_weights_memory(name):
    assert share_of_memory(name, "ours") < 0.1


@on_linux
def test_the_measurement_of_memory_sees_a_copy():
    assert share_of_memory("int8", "copy") > 0.9

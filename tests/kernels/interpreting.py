"""Pallas's interpreter of kernels for Mosaic GPU."""


class ZerosBeyondArrays:
    """What the interpreter takes values of uninitialized memory from, but zeros beyond an array, as a GPU's copies do."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, name)

    def get_uninitialized_value(self, dtype, uninitialized_memory):
        return 0


def interpreter():
    """Parameters of the interpreter, whose results are NaN where a kernel writes none."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:  # jax 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    if not isinstance(gpu_callbacks.interpret_utils, ZerosBeyondArrays):
        gpu_callbacks.interpret_utils = ZerosBeyondArrays(gpu_callbacks.interpret_utils)
    return InterpretGPUParams(out_of_bounds_reads="uninitialized", uninitialized_memory="nan")

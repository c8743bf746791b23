"""Functions of tensors compiled by XLA."""

import functools

import keras
import numpy as np


@functools.lru_cache(maxsize=None)
def jitted(function, names):
    """Returns a function under `jax.jit`, made once: kernels that are called eagerly would be compiled at each call.

    Args:
        function: of JAX arrays.
        names: of its arguments that are static.
    """
    import jax

    return jax.jit(function, static_argnames=names)


def triton_call(kernel, *, warps: int, stages: int = 1, interpret: bool = False, **settings):
    """Returns what runs a Pallas kernel through Triton (JAX only).

    Args:
        kernel: of references.
        warps: of a program.
        stages: steps that loops fetch matrix units' operands ahead.
        interpret: True to run it on any device, slowly.
        **settings: of `pallas_call`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    parameters = None if interpret else triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, interpret=interpret, compiler_params=parameters, **settings)


def compiled(function):
    """Returns `function`, compiled once for each shape and dtype of its arguments where the backend has XLA.

    Args:
        function: of tensors only, written in keras.ops. It may be given NumPy
            arrays, which are read in place if they begin at a multiple of 64
            bytes and the device shares the host's memory.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        return _compiled_by_tensorflow(function)
    return function


def _compiled_by_tensorflow(function):
    import tensorflow as tf

    run = tf.function(function, jit_compile=True, autograph=False)

    def as_tensor(x):
        is_readable_in_place = isinstance(x, np.ndarray) and x.flags.writeable and x.ctypes.data % 64 == 0
        # tf.convert_to_tensor copies, which takes as long as encoding does.
        return tf.experimental.dlpack.from_dlpack(x.__dlpack__()) if is_readable_in_place else tf.convert_to_tensor(x)

    return lambda *arguments: run(*map(as_tensor, arguments))

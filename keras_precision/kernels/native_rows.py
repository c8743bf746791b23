"""Runs functions of rows on a CPU as machine code that LLVM makes (JAX only)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import platform
import sys
from collections.abc import Callable, Sequence

from keras_precision.kernels import row_code, row_function, xla_handler

_OPTIMIZATION = 3
_ENGINES = []  # code stays for as long as XLA may call it


def is_there() -> bool:
    """Returns whether functions can be compiled here and called by all programs of this process.

    That takes llvmlite, another system than Windows, and no other device than
    the CPU: a program for one may be traced while the CPU is the default.
    """
    import jax

    return _is_installed() and jax.default_backend() == "cpu"


@functools.cache
def _is_installed():
    import jax

    is_known = sys.platform in ("linux", "darwin") and sys.maxsize > 2**32 and sys.byteorder == "little"
    return is_known and hasattr(jax, "ffi") and importlib.util.find_spec("llvmlite") is not None


def replaced(
    function: Callable,
    changed: Sequence,
    read: Sequence,
    row_shapes: Sequence[tuple[int, ...]],
    scalars: Sequence,
    target,
) -> list:
    """Returns what a function makes of arrays, as `rows.replaced` does; it writes over donated ones in place.

    Args:
        function: as there.
        changed: likewise.
        read: likewise.
        row_shapes: likewise.
        scalars: likewise.
        target: what the function is called with as its Target.

    Raises:
        Uncompilable: the function does what no instruction is known for.
    """
    import jax

    n_changed, n_rows = len(changed), len(changed) + len(read)

    def of_a_row(*arrays):
        return function(arrays[:n_changed], arrays[n_changed:n_rows], arrays[n_rows:], target)

    arrays = [*changed, *read]
    a_row = [jax.ShapeDtypeStruct((1, *shape), x.dtype) for shape, x in zip(row_shapes, arrays, strict=True)]
    name = _registered(_code(row_function.read(of_a_row, a_row, scalars)))
    # XLA would copy whole arrays that are reshaped to rows and back.
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed]
    aliases = {i: i for i in range(n_changed)}
    return list(jax.ffi.ffi_call(name, shapes, input_output_aliases=aliases)(*arrays, *scalars))


def _code(function):
    """Returns the text of an LLVM module with a handler for a function, called "handler"."""
    from llvmlite import ir

    module = ir.Module("rows")
    rows = row_code.write(function, module, "rows")
    xla_handler.write(module, rows, function, "handler")
    return str(module)


@functools.cache
def _registered(text):
    """Returns the name by which XLA calls a module's handler."""
    import jax

    name = "keras_precision_rows_" + hashlib.sha256(text.encode()).hexdigest()[:16]
    address = _compiled(text).get_function_address("handler")
    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def _compiled(text):
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(text)
    # LLVM halves vectors of 512 bits for older CPUs, whose clocks got slower by them.
    features = binding.get_host_cpu_features().flatten() + ",-prefer-256-bit" * _is_x86()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=_OPTIMIZATION
    )
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    builder = binding.create_pass_builder(machine, binding.PipelineTuningOptions(_OPTIMIZATION))
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _ENGINES.append(engine)
    return engine


def _is_x86():
    return platform.machine().lower() in ("x86_64", "amd64")

"""The XLA flags with which programs that run a few times, as those of tests do, are compiled in less time."""

import importlib.util
import mmap
import shutil
from pathlib import Path

# A sum of two vectors takes jaxlib 0.10 on two cores 24 ms to compile for 42 by default, normal random numbers 146 for
# 240. Level 0 would take a third less time, but is wrong: with it, what a LayerNormalization and a maximum of
# float32 are differentiated to holds NaN.
FLAGS = {"xla_cpu_use_fusion_emitters": "false", "xla_backend_optimization_level": "1"}
# Packages with XLA in them, and those that bring an accelerator, whose programs the level holds for too.
LIBRARIES = ("jaxlib", "tensorflow")
ACCELERATORS = ("jax_plugins", "libtpu")


def xla_flags(backend: str | None) -> str:
    """Returns what to set XLA_FLAGS to for a Keras backend: nothing where the flags don't help or change too much.

    TensorFlow compiles whole training steps, for which the flags take a fifth more time. An accelerator compiles as
    users see it.
    """
    if backend != "jax" or shutil.which("nvidia-smi") or any(map(importlib.util.find_spec, ACCELERATORS)):
        return ""
    specs = filter(None, map(importlib.util.find_spec, LIBRARIES))
    folders = [folder for spec in specs for folder in spec.submodule_search_locations]
    return " ".join(f"--{name}={value}" for name, value in FLAGS.items() if all(is_known(name, at) for at in folders))


def is_known(flag: str, folder: str) -> bool:
    """Returns whether a flag's name is in a folder's libraries: XLA ends the process that is given another."""
    return any(contains(path, flag.encode()) for path in Path(folder).glob("*.so*"))


def contains(path: Path, text: bytes) -> bool:
    """Returns whether a file holds some bytes."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text) >= 0

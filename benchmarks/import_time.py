"""Time of `import keras, keras_precision` against `import keras`, each in a fresh process."""

import importlib

import timing

MODULES = {"keras": ("keras",), "ours": ("keras", "keras_precision")}


def cases(side: timing.Side) -> dict[str, timing.Case]:
    """Returns the import, which is timed once a process."""
    return {"import": timing.Case(lambda: [importlib.import_module(module) for module in MODULES[side]])}


if __name__ == "__main__":
    timing.run(__file__, "Import time", cases, timing.Goal(timing.DIFFERENCE, 0.150), pairs=11, samples=1)

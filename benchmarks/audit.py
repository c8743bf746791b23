"""Time of an audit of a model of many layers, by kind of model and backend.

python benchmarks/audit.py                              # 500 layers, JAX and TensorFlow
python benchmarks/audit.py --layers 50 --models dense
"""

import argparse
import sys
import time

import timing


def dense(layers: int):
    """Returns residual blocks of equal widths, as transformers have, and inputs of 64 features."""
    import keras

    x = inputs = keras.Input((64,))
    for _ in range(layers // 4):
        inner = keras.layers.LayerNormalization()(x)
        inner = keras.layers.Dense(128, activation="gelu")(inner)
        x = keras.layers.Add()([x, keras.layers.Dense(64)(inner)])
    return keras.Model(inputs, keras.layers.Dense(10)(x)), (64,)


def convolutions(layers: int):
    """Returns densely connected convolutions: no two of them have the same shape."""
    import keras

    x = inputs = keras.Input((8, 8, 8))
    for _ in range(layers // 4):
        inner = keras.layers.BatchNormalization()(x)
        inner = keras.layers.ReLU()(inner)
        inner = keras.layers.Conv2D(4, 3, padding="same")(inner)
        x = keras.layers.Concatenate()([x, inner])
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x))), (8, 8, 8)


MODELS = {"dense": dense, "convolutions": convolutions}


def serve(name: str) -> None:
    """Answers each question with the seconds of one audit; the first compiles what the backend compiles."""
    kind, _, layers = name.partition(":")
    import keras
    import numpy as np

    import keras_precision

    keras.utils.set_random_seed(0)
    model, shape = MODELS[kind](int(layers))
    x, y = np.random.default_rng(0).normal(size=(32, *shape)).astype("float32"), np.zeros((32,), "int32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    timing.reply(len(model.layers))
    for _ in sys.stdin:
        started = time.perf_counter()
        report = keras_precision.audit(model, x, y, loss=loss, policy="mixed_float16")
        timing.reply({"seconds": time.perf_counter() - started, "findings": len(report.findings)})


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="jax,tensorflow", help="Keras backends, by commas")
    parser.add_argument("--models", default=",".join(MODELS), help="kinds of models, by commas")
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker)
        return
    from rich.table import Table

    table = Table(title="Seconds of an audit, mixed_float16, 32 rows, forward and backward")
    for heading in ("backend", "model", "layers", "first", "second", "findings"):
        table.add_column(heading)
    for backend in arguments.backends.split(","):
        for kind in arguments.models.split(","):
            with timing.Worker(__file__, f"{kind}:{arguments.layers}", backend) as worker:
                layers = worker.read()
                first, second = worker.ask("audit"), worker.ask("audit")
            times = (f"{answer['seconds']:.1f}" for answer in (first, second))
            table.add_row(backend, kind, str(layers), *times, str(second["findings"]))
    timing.show(table)


if __name__ == "__main__":
    main()

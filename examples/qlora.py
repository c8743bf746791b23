"""Fine-tunes a transformer that is stored in 4 bits on a text of another kind: QLoRA.

The character-level transformer of `benchmarks/text_task.py` learns the standard library's documentation, in float32.
Then it is to go on with the standard library's code. Stored as nf4 it fine-tunes only low-rank matrices, in float32.

python examples/qlora.py        # about 6 minutes on 2 cores
"""

import argparse
import sys
import sysconfig
from pathlib import Path

import keras
import numpy as np

import keras_precision as kp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import text_task

RANK = 16


def code(characters: int = 1_000_000) -> text_task.Text:
    """Returns the second text: code of Python's standard library, cut where a tenth is left to validate on."""
    files = sorted((Path(sysconfig.get_paths()["stdlib"]) / "asyncio").glob("*.py"))
    files += sorted((Path(sysconfig.get_paths()["stdlib"]) / "email").glob("*.py"))
    text = text_task.encode("\n".join(file.read_text(encoding="utf-8") for file in files))[:characters]
    return text_task.Text(text[: -len(text) // 10], text[-len(text) // 10 :])


def tune(model: keras.Model, text: np.ndarray, steps: int) -> None:
    """Fine-tunes what is trainable."""
    text_task.fit(model, text_task.make_optimizer(steps, learning_rate=2e-3), text, steps, seed=1)


def nbytes(model: keras.Model) -> int:
    """Returns the bytes of a model's weights, read from the live arrays."""
    return sum(keras.ops.convert_to_numpy(weight).nbytes for weight in model.weights)


def main(steps: int = 2000, tuning_steps: int = 600, windows: int = 512) -> dict[str, float]:
    """Prints the loss on the second text at each stage, in nats a character; returns them."""

    def loss_of(model):
        return text_task.validation_loss(model, second.validation, windows)

    keras.utils.set_random_seed(0)
    documentation, second = text_task.standard_library(), code()
    model = text_task.build_transformer()
    text_task.fit(model, text_task.make_optimizer(steps), documentation.train, steps, seed=0)
    trained = model.get_weights()
    losses = {"float32": text_task.validation_loss(model, second.validation)}
    size = nbytes(model)

    kp.quantize(model, "nf4-dq_from_float32")
    losses["nf4"] = loss_of(model)
    print(f"weights: {size:,} bytes in float32, {nbytes(model):,} in nf4-dq")
    kp.enable_lora(model, RANK)
    tune(model, second.train, tuning_steps)
    losses["nf4, LoRA trained"] = loss_of(model)
    kp.merge_lora(model)
    losses["nf4, LoRA merged into the 4 bits"] = loss_of(model)

    model = text_task.build_transformer()
    model.set_weights(trained)
    tune(model, second.train, tuning_steps)
    losses["float32, all weights trained"] = loss_of(model)
    for stage, loss in losses.items():
        print(f"{loss:.4f}  {stage}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of training in float32")
    parser.add_argument("--tuning-steps", type=int, default=600)
    parser.add_argument("--windows", type=int, default=512, help="of the second text, to validate on")
    main(**vars(parser.parse_args()))

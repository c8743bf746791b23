"""The file in which a search keeps what it has measured."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

import keras

from keras_precision.files import written_whole
from keras_precision.search.paired import Paired
from keras_precision.search.samples import Samples
from keras_precision.search.trial import Trial

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a model with some other policies got, compared sample by sample with the model as it was.

    Attributes:
        bytes: of what was changed: a layer's own weights, or all weights.
        loss: per-sample losses.
        error: per-sample shares of wrong classes; None where not asked for.
        seconds: of a prediction of one batch; None where not asked for.
    """

    bytes: int
    loss: Paired
    error: Paired | None
    seconds: float | None

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Measurement:
        """Returns what `dataclasses.asdict` wrote."""
        error = found["error"] and Paired(**found["error"])
        return cls(found["bytes"], Paired(**found["loss"]), error, found["seconds"])


class Checkpoint:
    """Measurements by name, written to a file after each one.

    Args:
        path: of a JSON file, made by the first measurement; None to keep none.
        fingerprint: what the measurements hold for, by name.

    Raises:
        ValueError: the file is none of ours, or holds for another model, other data or other settings.
    """

    def __init__(self, path: str | os.PathLike | None, fingerprint: dict[str, str]):
        self._path = None if path is None else Path(path)
        self._fingerprint = fingerprint
        self._measured: dict[str, Measurement] = {}
        if self._path is None or not self._path.exists():
            return
        try:
            found = json.loads(self._path.read_text())
            kept, measured = found["fingerprint"], found["measured"]
            self._measured = {name: Measurement.from_dict(entry) for name, entry in measured.items()}
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise ValueError(
                f"Expected the checkpoint of a search. Received: '{self._path}', which is none. Pass another path."
            ) from e
        others = sorted(name for name in {*kept, *fingerprint} if kept.get(name) != fingerprint.get(name))
        if others:
            raise ValueError(
                f"Expected a checkpoint of this search. Received: '{self._path}', "
                f"which is of another {', '.join(others)}. "
                "Pass another path, or delete the file to measure anew."
            )

    def __len__(self) -> int:
        return len(self._measured)

    def get(self, name: str) -> Measurement | None:
        """Returns what was measured by a name, None if nothing was."""
        return self._measured.get(name)

    def put(self, name: str, measurement: Measurement) -> None:
        """Keeps a measurement; the file holds it when this returns."""
        self._measured[name] = measurement
        if self._path is not None:
            measured = {name: dataclasses.asdict(entry) for name, entry in self._measured.items()}
            text = json.dumps({"version": VERSION, "fingerprint": self._fingerprint, "measured": measured})
            with written_whole(self._path) as partial:
                partial.write_text(text)


def fingerprint(trial: Trial, calibration: Samples, held_out: Samples, **settings: Any) -> dict[str, str]:
    """Returns checksums of all that measurements depend on.

    Args:
        trial: of the model.
        calibration: data that single layers are judged on.
        held_out: data that choices are verified on.
        **settings: what else there is; told apart by their `repr`.
    """
    model, data = _Crc(), _Crc()
    trial.weights_crc(model)
    for samples in (calibration, held_out):
        for array in samples.arrays():
            data(f"{array.shape} {array.dtype} {samples.batch_size}".encode())
            data(array.tobytes())
    settings = {**settings, "backend": keras.backend.backend(), "version": VERSION}
    return {"model": model.text, "data": data.text, **{name: repr(value) for name, value in settings.items()}}


class _Crc:
    def __init__(self):
        self._value = 0

    def __call__(self, data):
        self._value = zlib.crc32(data, self._value)

    @property
    def text(self):
        return f"{self._value:08x}"

"""Measures a model with other policies, within a time limit, each thing once."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence

import keras

from keras_precision.search.checkpoint import Checkpoint, Measurement
from keras_precision.search.paired import Paired
from keras_precision.search.samples import Judged, Samples, judged
from keras_precision.search.trial import Trial

# Of a time limit, the share after which no more single layers are measured, so that choices can still be verified.
SENSITIVITY_SHARE = 0.7


class Clock:
    """A time limit.

    Args:
        limit: seconds from now; None for none.
    """

    def __init__(self, limit: float | None):
        self._started = time.monotonic()
        self._limit = math.inf if limit is None else limit

    def is_over(self, share: float = 1.0) -> bool:
        """Returns whether a share of the time has passed."""
        return time.monotonic() - self._started >= share * self._limit


class Measuring:
    """Compares other policies with the model as it was.

    Args:
        trial: copy of the model.
        calibration: data that single layers are judged on.
        held_out: data that choices for all layers are judged on.
        loss: what `samples.loss_function` returned.
        has_errors: whether to count wrong classes.
        has_seconds: whether to measure time.
        checkpoint: that keeps what was measured.
        advance: called after each measurement.

    Raises:
        ValueError: the loss of the model as it is holds NaN or inf.
    """

    def __init__(
        self,
        trial: Trial,
        calibration: Samples,
        held_out: Samples,
        loss: Callable,
        has_errors: bool,
        has_seconds: bool,
        checkpoint: Checkpoint,
        advance: Callable[[], object],
    ):
        self._trial, self._loss, self._has_errors, self._has_seconds = trial, loss, has_errors, has_seconds
        self._checkpoint, self._advance = checkpoint, advance
        self._calibration, self._held_out = calibration, held_out
        self._batch = next(calibration.batches())[0]
        self._calibration_base = self._judged(calibration)
        self._held_out_base = self._judged(held_out)
        seconds = trial.seconds(self._batch) if has_seconds else None
        self.base = self._compared(self._held_out_base, self._held_out_base, trial.bytes, seconds)
        for paired in (self.base.loss, Paired.of(self._calibration_base.losses, self._calibration_base.losses)):
            if not math.isfinite(paired.base) or not math.isfinite(paired.increase):
                raise ValueError(
                    f"Expected a model with a finite loss on the data. Received: {paired.base}. "
                    "Check that `loss` fits the model's outputs and that x and y hold no NaN."
                )

    def alone(self, index: int, policy: keras.DTypePolicy) -> Measurement:
        """Returns what a layer's policy does while all others keep theirs, on the calibration data."""
        name = f"alone: {self._trial.paths[index]} {_text(policy)}"
        found = self._checkpoint.get(name)
        if found is None:
            seconds = None

            def judge():
                nonlocal seconds
                result = self._judged(self._calibration)
                seconds = self._trial.seconds(self._batch) if self._has_seconds else None
                return result

            if self._has_seconds:  # the layer itself, not what stands for it
                self._trial.give({index: policy})
                after, nbytes = judge(), self._trial.bytes_of(index)
            else:
                after, nbytes = self._trial.judge_alone(index, policy, judge)
            found = self._compared(after, self._calibration_base, nbytes, seconds)
            self._checkpoint.put(name, found)
        self._advance()
        return found

    def together(self, policies: Sequence[keras.DTypePolicy]) -> Measurement:
        """Returns what policies for all layers do, on the held-out data."""
        text = "\n".join(map(_text, policies))
        name = f"together: {hashlib.sha256(text.encode()).hexdigest()[:24]}"
        found = self._checkpoint.get(name)
        if found is None:
            bases = self._trial.bases
            self._trial.give({i: policy for i, policy in enumerate(policies) if policy != bases[i]})
            after = self._judged(self._held_out)
            seconds = self._trial.seconds(self._batch) if self._has_seconds else None
            found = self._compared(after, self._held_out_base, self._trial.bytes, seconds)
            self._checkpoint.put(name, found)
        self._advance()
        return found

    def _judged(self, samples):
        return judged(self._trial.model, samples, self._loss, self._has_errors)

    def _compared(self, after: Judged, before: Judged, nbytes, seconds):
        error = Paired.of(after.errors, before.errors) if self._has_errors else None
        return Measurement(nbytes, Paired.of(after.losses, before.losses), error, seconds)


def _text(policy):
    """Returns a policy's name and options: a checkpoint's measurements are of these."""
    return f"{policy.name} {json.dumps(policy.get_config(), sort_keys=True)}"

"""What the bridge needs to know from the rest of the package."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import keras


@dataclass(frozen=True)
class Hooks:
    """What the patched Keras asks.

    Attributes:
        policy_for: identifier -> policy, or None to leave it to Keras.
        current_policy: the global policy, or None if none was set.
        replace_policy: sets the global policy.
        resolve: layer -> the policy that decides its dtypes.
        takes_policy: (layer, policy that it is given) -> whether that has been done, or else Keras does it.
        quantization_mode: layer -> mode of Keras's own quantization or None.
        after_build: called with each layer that has built.
        saved_dtype: layer -> `dtype` entry of its config, or None for Keras's.
        loading: (config) -> (config to load, context, function of the object).
        in_float32: wraps a function so that it computes 16-bit arguments in float32.
        compute_in_float32: called with each loss and metric made, and the dtype it was given.
        before_compile: (model, optimizer, auto_scale_loss) -> what of the last two to compile with.
        reads_packed: (file, an optimizer's variables) -> whether the file held packed states and has been read.
        fit_callbacks: (model, callbacks that `fit` got) -> callbacks to fit with.
        after_fit: called with each model whose `fit` has ended, or failed.
    """

    policy_for: Callable[[Any], keras.DTypePolicy | None]
    current_policy: Callable[[], keras.DTypePolicy | None]
    replace_policy: Callable[[keras.DTypePolicy], None]
    resolve: Callable[[keras.Layer], keras.DTypePolicy]
    takes_policy: Callable[[keras.Layer, keras.DTypePolicy], bool]
    quantization_mode: Callable[[keras.Layer], str | None]
    after_build: Callable[[keras.Layer], None]
    saved_dtype: Callable[[keras.Layer], dict | None]
    loading: Callable[[Any], tuple[Any, AbstractContextManager, Callable[[Any], None]]]
    in_float32: Callable[[Callable], Callable]
    compute_in_float32: Callable[[keras.Loss | keras.Metric, str | None], None]
    before_compile: Callable[[keras.Model, Any, bool], tuple[Any, bool]]
    reads_packed: Callable[[Any, list], bool]
    fit_callbacks: Callable[[keras.Model, Any], Any]
    after_fit: Callable[[keras.Model], None]

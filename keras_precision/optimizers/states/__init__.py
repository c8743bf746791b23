"""The registry of formats that keep an optimizer's slots: one import line each."""

from keras_precision.optimizers.states import dynamic4 as _dynamic4  # noqa: F401
from keras_precision.optimizers.states import dynamic8 as _dynamic8  # noqa: F401
from keras_precision.optimizers.states import float8 as _float8  # noqa: F401
from keras_precision.optimizers.states.base import STATE_FORMATS, StateFormat, register_state_format

__all__ = ["STATE_FORMATS", "StateFormat", "register_state_format"]

"""What policies do to layers: casts, conversion and saving."""

from keras_precision.layers.convert import set_policy

__all__ = ["set_policy"]

"""What the hardware at hand can do with each dtype."""

from keras_precision.hardware.checks import PrecisionWarning
from keras_precision.hardware.checks import check_dtypes
from keras_precision.hardware.checks import enable_float64
from keras_precision.hardware.description import HardwareDescription
from keras_precision.hardware.description import describe
from keras_precision.hardware.matmul_precision import set_matmul_precision
from keras_precision.hardware.matrix import Cell
from keras_precision.hardware.matrix import SupportMatrix
from keras_precision.hardware.matrix import best_policy
from keras_precision.hardware.matrix import device_class
from keras_precision.hardware.matrix import support_matrix

__all__ = [
    "Cell",
    "HardwareDescription",
    "PrecisionWarning",
    "SupportMatrix",
    "best_policy",
    "check_dtypes",
    "describe",
    "device_class",
    "enable_float64",
    "set_matmul_precision",
    "support_matrix",
]

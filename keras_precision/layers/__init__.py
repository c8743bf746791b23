"""What policies do to layers: casts, quantized weights, conversion and saving."""

from keras_precision.layers.convert import set_policy
from keras_precision.layers.lora import enable_lora, merge_lora
from keras_precision.layers.quantize import QuantizationReport, dequantize, quantize
from keras_precision.layers.sites import register_site

__all__ = ["QuantizationReport", "dequantize", "enable_lora", "merge_lora", "quantize", "register_site", "set_policy"]

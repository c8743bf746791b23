"""Layers that multiply in 8-bit floating point and train their float weights."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings

import keras
import numpy as np
from keras import ops

from keras_precision import _bridge, _bridge_variables
from keras_precision.hardware import PrecisionWarning
from keras_precision.kernels import dispatch, float8
from keras_precision.layers.products import EinsumProduct, matmul_order
from keras_precision.layers.quantized import calls_stock, lora_variables, present
from keras_precision.layers.sites import Site, sites_of_class
from keras_precision.layers.weight_matrix import WeightMatrix
from keras_precision.policies.quantized import MULTIPLE_OF_FEATURES, QuantizedDTypePolicy, QuantizedFloat8DTypePolicy

# Keras's names, in its order: the layers' files hold them so.
DELAYED_STATES = ("inputs", "kernel", "outputs_grad")
DELAYED_VARIABLES = tuple(f"{name}_{part}" for name in DELAYED_STATES for part in ("scale", "amax_history"))


class Float8Weight(WeightMatrix):
    """A layer's float weight, multiplied in 8-bit floating point, in the dtype that it is stored in.

    Args:
        layer: that has the weight, and the variables of delayed scaling.
        site: which weight it is.
        policy: how scales are chosen.
    """

    def __init__(self, layer: keras.Layer, site: Site, policy: QuantizedFloat8DTypePolicy):
        self.variable = vars(layer)[site.attribute]
        super().__init__(self.variable.shape, site.axes(layer))
        self.policy = policy
        self.states: tuple = ((), (), ())
        if policy.format.has_amax_history:
            add = functools.partial(_bridge_variables.add_overwritten, layer, self.variable)
            for name in DELAYED_STATES:
                add(f"{name}_scale", (), "ones")
                add(f"{name}_amax_history", (policy.amax_history_length,), "zeros")
            found = [vars(layer)[name] for name in DELAYED_VARIABLES]
            self.states = tuple(zip(found[::2], found[1::2], strict=True))

    def matmul(self, x, dtype: str):
        """Returns x (..., k) times the matrix: (..., n)."""
        k, n = self.matrix_shape
        weight = self.to_matrix(_bridge_variables.stored_tensor_of(self.variable))
        states = tuple(tuple(map(_bridge_variables.tensor_of, state)) for state in self.states)
        rows = ops.reshape(ops.cast(x, dtype), (-1, k))
        found = float8.matmul(rows, weight, dtype, self.policy.format.scaling, states, dispatch.float8_steps())
        return ops.reshape(found, (*ops.shape(x)[:-1], n))


class MultipliesInFloat8:
    """Reads and writes the files of Keras's float8 layers too (mixed in by `_bridge.specialise`, with a product's call).

    Attributes:
        weight_matrix: what the layer multiplies by.
    """

    weight_matrix: Float8Weight

    @classmethod
    def from_config(cls, config):
        """Returns a layer of the class that this one was before; it multiplies as its policy says once it has built."""
        return _bridge.original_class(cls).from_config(config)

    def save_own_variables(self, store):
        """Writes what the layer's class does, and after it the variables of delayed scaling."""
        with _as_float(self):
            super().save_own_variables(store)
        first = len(store.keys())
        for place, variable in enumerate(_delayed(self)):
            store[str(first + place)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        """Reads that, or a file without those variables, which start anew then; without need for them, they are left.

        Raises:
            ValueError: the file's variables are others.
        """
        own, lora = _delayed(self), lora_variables(self)
        count, floats = len(store.keys()), len(_bridge.own_variables(self)) - len(own) - len(lora)
        if count != floats + len(DELAYED_VARIABLES):
            with _as_float(self):
                super().load_own_variables(store)
            for variable in own:
                variable.assign(ops.full(variable.shape, 1.0 if variable.name.endswith("scale") else 0.0))
            return
        with _as_float(self):
            super().load_own_variables({str(place): store[str(place)] for place in range(floats)})
        for place, variable in enumerate(own):
            value = np.asarray(store[str(floats + place)])
            if value.shape != tuple(variable.shape):
                raise ValueError(
                    f"Layer '{_bridge.layer_path(self)}' keeps '{variable.name}' of shape {tuple(variable.shape)}. "
                    f"Received a file with {value.shape}. Pass amax_history_length={value.size} to the policy."
                )
            variable.assign(value)


@contextlib.contextmanager
def _as_float(layer):
    """Makes a layer look like one that multiplies as its class does: stock code acts on policies and counts variables."""
    policy, own = layer.dtype_policy, _delayed(layer)
    _bridge.attach_policy(layer, layer.weight_matrix.policy.source_policy)
    for variable in own:
        _bridge_variables.untrack(layer, variable)
    try:
        yield
    finally:
        _bridge.attach_policy(layer, policy)
        for variable in own:
            _bridge_variables.track(layer, variable)


def _delayed(layer):
    return [variable for state in layer.weight_matrix.states for variable in state]


@functools.cache
def _mixin_for(product):
    return type("MultipliesInFloat8", (MultipliesInFloat8, product), {})


def is_float8(layer: keras.Layer) -> bool:
    """Returns whether a layer multiplies in 8-bit floating point."""
    return isinstance(layer, MultipliesInFloat8)


def follow(layer: keras.Layer, policy: keras.DTypePolicy) -> None:
    """Makes a built layer multiply as its policy says: in 8-bit floating point, or no longer.

    Raises:
        ValueError: the policy is strict, and this device multiplies no float8.
    """
    asked = is_asked(policy)
    if is_float8(layer) and not (asked and layer.weight_matrix.policy == policy):
        leave(layer)
    if not asked or is_float8(layer) or not sites_of(layer):
        return
    path = _bridge.layer_path(layer)
    if policy.strict and not dispatch.multiplies_float8():
        raise ValueError(
            f"Layer '{path}' has the policy '{policy.name}' with strict=True, and no device here multiplies float8 on "
            f"{keras.backend.backend()}. It needs an NVIDIA GPU from Ada or Hopper on, and JAX. Pass strict=False to "
            f"emulate it, or the source policy '{policy.source_policy.name}'."
        )
    found = obstacle(layer, policy)
    if found:
        warnings.warn(
            f"Layer '{path}' computes in '{policy.source_policy.name}', not in '{policy.quantization_mode}': {found}.",
            PrecisionWarning,
            stacklevel=2,
        )
        return
    # Past Keras's tracking, which would take its variables for the layer's once more.
    vars(layer)["weight_matrix"] = Float8Weight(layer, _site(layer), policy)
    _bridge.specialise(layer, _mixin_for(sites_of_class(_bridge.original_class(type(layer))).product))


def leave(layer: keras.Layer) -> None:
    """Makes a layer multiply as its class does, without the variables of delayed scaling."""
    matrix = vars(layer).pop("weight_matrix")
    _bridge.despecialise(layer, MultipliesInFloat8)
    for name in DELAYED_VARIABLES if matrix.policy.format.has_amax_history else ():
        _bridge_variables.remove_variable(layer, name)


def is_asked(policy: keras.DTypePolicy) -> bool:
    """Returns whether a policy asks for products in 8-bit floating point."""
    return isinstance(policy, QuantizedDTypePolicy) and policy.format.keeps_weights


def sites_of(layer: keras.Layer) -> list[Site]:
    """Returns the weights of a layer that its policy is about: float ones, of the classes with a product of their own."""
    sites = sites_of_class(_bridge.original_class(type(layer)))
    is_product = sites is not None and sites.product is not None and sites.product.multiplies
    return present(layer, sites) if is_product else []


def obstacle(layer: keras.Layer, policy: QuantizedFloat8DTypePolicy) -> str:
    """Returns why a layer of `sites_of` can't multiply in 8-bit floating point, or shouldn't; "" if it can."""
    cls = _bridge.original_class(type(layer))
    product = sites_of_class(cls).product
    if not calls_stock(cls, product.stock_class):
        return f"{cls.__name__} has a call of its own"
    if product is EinsumProduct and matmul_order(layer.equation, len(layer.equation.partition(",")[0]) + 1) is None:
        return f"its equation '{layer.equation}' is no product of two matrices"
    site = _site(layer)
    matrix = WeightMatrix(vars(layer)[site.attribute].shape, site.axes(layer)).matrix_shape
    shape = " x ".join(map(str, matrix))
    if any(size % MULTIPLE_OF_FEATURES for size in matrix):
        return f"its weight is {shape} as a matrix, and both must be multiples of {MULTIPLE_OF_FEATURES}"
    if min(matrix) < policy.min_features:
        return f"its weight is {shape} as a matrix, and the policy has min_features={policy.min_features}"
    return ""


def can_follow(layer: keras.Layer, policy: QuantizedFloat8DTypePolicy) -> bool:
    """Returns whether a layer would multiply in 8-bit floating point under a policy."""
    return bool(sites_of(layer)) and not obstacle(layer, policy)


def rounding_error(layer: keras.Layer) -> float:
    """Returns the relative error of a layer's weight rounded with one scale, as a Frobenius norm."""
    weight = ops.cast(_bridge_variables.value_of(vars(layer)[_site(layer).attribute]), "float32")
    scale = float8.scale_for(ops.max(ops.abs(weight)), float8.FORWARD)
    change = ops.cast(float8.rounded(weight, scale, float8.FORWARD), "float32") * scale - weight
    change, norm = (float(ops.sum(ops.sum(ops.square(values), axis=0))) for values in (change, weight))
    return math.sqrt(change / norm) if norm else 0.0


def _site(layer):
    """Returns the weight that the layer's product multiplies by; other ones may have been registered."""
    return sites_of(layer)[0]

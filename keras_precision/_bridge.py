"""Touches what Keras does not document: every patch, and every private attribute that is read or set."""

import copy
import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
from keras.src import api_export, dtype_policies
from keras.src.backend.common import global_state, name_scope
from keras.src.dtype_policies import dtype_policy as dtype_policy_module
from keras.src.layers.layer import Layer
from keras.src.losses import losses as loss_functions
from keras.src.models import Functional
from keras.src.ops.operation import Operation
from keras.src.saving import object_registration, serialization_lib
from keras.src.trainers.compile_utils import CompileMetrics

from keras_precision.hooks import Hooks


class PatchPoint(NamedTuple):
    """A place where stock Keras is made to ask us, what that does, and what change in Keras would remove it."""

    target: str
    reason: str
    removable: str


CHECKED_VERSIONS = ("3.14.0", "3.15.1")

PATCH_POINTS = (
    PatchPoint("dtype_policies.get", "dtype= takes every name of our grammar", "a public registry of policy names"),
    PatchPoint(
        "config.set_dtype_policy and the store of config.dtype_policy",
        "the global policy takes our names, is one for all threads, and outlives clear_session (D21)",
        "a process-wide global policy with a scope",
    ),
    PatchPoint(
        "Layer.dtype_policy, its setter (public)",
        "a quantized policy of ours that a built layer is given stores its weights so, where Keras's `quantize` runs",
        "`Layer.quantize` asking the policy",
    ),
    PatchPoint(
        "Layer.compute_dtype, variable_dtype, quantization_mode, quantized_call",
        "a layer's map and the table of safe layers are resolved before the first call (D14, D19); stock code builds "
        "and calls a plain layer under our quantized policies",
        "Layer asking its policy through one overridable method that gets the layer",
    ),
    PatchPoint(
        "Layer._post_build (defined by Operation)",
        "a built layer is checked against the device and made to cast its outputs and losses",
        "a public post-build hook",
    ),
    PatchPoint("Layer.add_loss", "auxiliary losses are float32 like the main one (D18)", "add_loss casting to floatx"),
    PatchPoint(
        "Layer.get_config, serialization_lib.serialize_keras_object, deserialize_keras_object",
        "files hold the policies that layers resolved to, sublayers of custom layers included (D11, D13)",
        "configs holding the resolved policy",
    ),
    PatchPoint("Keras's DTypePolicyMap.get_config", "does not rename live policies (D12)", "the same mended upstream"),
    PatchPoint(
        "function losses, CompileMetrics.update_state, Loss.__init__, Metric.__init__",
        "losses and metrics compute and accumulate in float32 (D24)",
        "losses and metrics casting to their dtype before they compute",
    ),
    PatchPoint("Trainer.compile (public)", "reports unmatched rules (D13); wraps optimizers (D1, D2, D9)", "none"),
    PatchPoint("Model.fit (public)", "its logs carry the loss scale; a run that skips every step stops (D7, D8)", "none"),
    PatchPoint("Model.train_function, while a BlameCallback runs", "keeps the batches of recent steps", "batches in logs"),
    PatchPoint("_bridge_optimizers: BaseOptimizer", "schedules count updates, not micro-steps (D25)", "as above"),
    PatchPoint("BaseOptimizer.load_own_variables (public)", "reads files whose states are packed", "none"),
    PatchPoint(
        "the registry of public names",
        "our float policies and specialised layers are saved under Keras's own class names",
        "serialization of subclasses as their base",
    ),
)


stock_get = dtype_policies.get


def install(hooks: Hooks) -> None:
    """Patches Keras at PATCH_POINTS, once."""
    if dtype_policy_module.global_state.__class__ is _PolicyStore:
        return
    _install_global_policy(hooks)
    _install_layer_dtypes(hooks)
    _install_build_and_losses(hooks)
    _install_saving(hooks)
    _install_float32_losses(hooks)


def _rebind(replacements: dict[Any, Any]) -> None:
    """Points every name in Keras's loaded modules that is a key of `replacements` to its value."""
    by_id = {id(original): replacement for original, replacement in replacements.items()}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "keras":
            # The matches only: a list of all items, 13,000 tuples in all, sets off a full garbage collection, 0.2 s
            # with TensorFlow loaded.
            for name in [name for name, value in vars(module).items() if id(value) in by_id]:
                setattr(module, name, by_id[id(vars(module)[name])])


class _PolicyStore:
    """Stands for `global_state` in Keras's dtype_policy module, which keeps nothing else there."""

    def __init__(self, hooks):
        self._hooks = hooks

    def get_global_attribute(self, name, default=None):
        assert name == "dtype_policy", name
        policy = self._hooks.current_policy()
        if policy is not None:
            # A copy of what can be changed: layers hold what this returns, and Keras code renames live policies (D12).
            return policy if getattr(policy, "_is_frozen", False) else copy.copy(policy)
        # Nobody chose one: floatx's, made and kept where Keras keeps it.
        policy = global_state.get_global_attribute(name)
        if policy is None:
            policy = keras.DTypePolicy(keras.config.floatx())
            global_state.set_global_attribute(name, policy)
        return policy

    def set_global_attribute(self, name, value):
        assert name == "dtype_policy", name
        self._hooks.replace_policy(value)


def _install_global_policy(hooks):
    def get(identifier):
        policy = hooks.policy_for(identifier)
        return stock_get(identifier) if policy is None else policy

    stock_set = dtype_policy_module.set_dtype_policy

    @functools.wraps(stock_set)
    def set_dtype_policy(policy):
        ours = None if policy is None else hooks.policy_for(policy)
        stock_set(policy if ours is None else ours)

    _rebind({stock_get: functools.wraps(stock_get)(get), stock_set: set_dtype_policy})
    dtype_policy_module.global_state = _PolicyStore(hooks)


def _install_layer_dtypes(hooks):
    resolve, stock_quantized_call = hooks.resolve, Layer.quantized_call

    @functools.wraps(stock_quantized_call)
    def quantized_call(self, *args, **kwargs):
        if hooks.quantization_mode(self) is None:
            return self.call(*args, **kwargs)
        return stock_quantized_call(self, *args, **kwargs)

    stock_policy = Layer.dtype_policy

    def set_dtype_policy(self, value):
        policy = dtype_policies.get(value)
        if not hooks.takes_policy(self, policy):
            stock_policy.fset(self, policy)

    Layer.dtype_policy = property(stock_policy.fget, set_dtype_policy, doc=stock_policy.__doc__)
    Layer.compute_dtype = property(lambda self: resolve(self).compute_dtype, doc=Layer.compute_dtype.__doc__)
    Layer.variable_dtype = property(lambda self: resolve(self).variable_dtype, doc=Layer.variable_dtype.__doc__)
    Layer.quantization_mode = property(hooks.quantization_mode, doc=Layer.quantization_mode.__doc__)
    Layer.quantized_call = quantized_call


def _install_build_and_losses(hooks):
    stock_post_build, stock_add_loss = Layer._post_build, Layer.add_loss

    def _post_build(self):
        stock_post_build(self)
        hooks.after_build(self)

    to_float32 = hooks.in_float32(lambda loss: loss)

    @functools.wraps(stock_add_loss)
    def add_loss(self, loss):
        stock_add_loss(self, keras.tree.map_structure(to_float32, loss))

    Layer._post_build = _post_build
    Layer.add_loss = add_loss


def _install_saving(hooks):
    stock_get_config = Layer.get_config
    stock_serialize = serialization_lib.serialize_keras_object
    stock_deserialize = serialization_lib.deserialize_keras_object
    KerasMap = dtype_policies.DTypePolicyMap
    stock_map_get_config = KerasMap.get_config

    @functools.wraps(stock_get_config)
    def get_config(self):
        dtype = hooks.saved_dtype(self)
        if dtype is None:
            return stock_get_config(self)
        attached, self._dtype_policy = self._dtype_policy, keras.DTypePolicy("float32")  # a map need not be savable
        try:
            return {**stock_get_config(self), "dtype": dtype}
        finally:
            self._dtype_policy = attached

    @functools.wraps(stock_serialize)
    def serialize_keras_object(obj):
        config = stock_serialize(obj)
        if isinstance(obj, Layer) and "dtype" in config.get("config", {}):  # of a class that does not ask Layer's
            config["config"]["dtype"] = hooks.saved_dtype(obj) or config["config"]["dtype"]
        return config

    @functools.wraps(stock_deserialize)
    def deserialize_keras_object(config, *args, **kwargs):
        config, context, finish = hooks.loading(config)
        with context:
            loaded = stock_deserialize(config, *args, **kwargs)
        finish(loaded)
        return loaded

    @functools.wraps(stock_map_get_config)
    def map_get_config(self):
        stand_in = KerasMap.__new__(KerasMap)
        stand_in.__dict__.update(self.__dict__, _policy_map={k: _renamable(v) for k, v in self._policy_map.items()})
        return stock_map_get_config(stand_in)

    Layer.get_config = get_config
    KerasMap.get_config = map_get_config
    _rebind({stock_serialize: serialize_keras_object, stock_deserialize: deserialize_keras_object})


def _renamable(policy):
    renamable = copy.copy(policy)
    renamable.__dict__["_is_frozen"] = False
    return renamable


def _install_float32_losses(hooks):
    replacements = {}
    for name, function in list(vars(loss_functions).items()):
        public_name = api_export.REGISTERED_OBJS_TO_NAMES.get(function) if callable(function) else None
        if public_name is None or isinstance(function, type) or function.__module__ != loss_functions.__name__:
            continue
        replacement = hooks.in_float32(function)
        api_export.REGISTERED_OBJS_TO_NAMES[replacement] = public_name
        api_export.REGISTERED_NAMES_TO_OBJS[public_name] = replacement
        replacements[function] = replacement
        for table in (keras.src.losses.ALL_OBJECTS_DICT, keras.src.metrics.ALL_OBJECTS_DICT):
            table.update({key: replacement for key, value in table.items() if value is function})
    _rebind(replacements)
    CompileMetrics.update_state = hooks.in_float32(CompileMetrics.update_state)
    for cls in (keras.Loss, keras.Metric):
        cls.__init__ = _followed_by(cls.__init__, hooks.compute_in_float32)


def _followed_by(init, hook):
    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        hook(self, kwargs.get("dtype"))

    return __init__


def quantization_modes() -> tuple[str, ...]:
    """Returns what the names of Keras's own quantized policies start with."""
    return dtype_policies.QUANTIZATION_MODES


def share_keras_name(ours: type, stock: type) -> None:
    """Saves `ours` under the public name of Keras's class, and loads that name as `ours`."""
    public_name = api_export.REGISTERED_OBJS_TO_NAMES[stock]
    api_export.REGISTERED_OBJS_TO_NAMES[ours] = public_name
    api_export.REGISTERED_NAMES_TO_OBJS[public_name] = ours


def is_keras_class(cls: type) -> bool:
    """Returns whether a class is part of Keras's public API."""
    return cls in api_export.REGISTERED_OBJS_TO_NAMES


_specialised: dict[tuple[type, type], type] = {}


def specialise(instance: Any, mixin: type) -> None:
    """Makes an object also an instance of `mixin`, which comes first; it is saved as its own class.

    Args:
        instance: a layer or regularizer; left as it is if it has `mixin`.
        mixin: a class whose methods call `super()`.
    """
    cls = type(instance)
    if isinstance(instance, mixin):
        return
    if (cls, mixin) not in _specialised:
        subclass = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
        for table in (api_export.REGISTERED_OBJS_TO_NAMES, object_registration.GLOBAL_CUSTOM_NAMES):
            if cls in table:
                table[subclass] = table[cls]
        _specialised[cls, mixin] = subclass
    instance.__class__ = _specialised[cls, mixin]


def original_class(cls: type) -> type:
    """Returns the class that a specialised class was made of, itself if it is none."""
    made = {subclass: base for (base, _), subclass in _specialised.items()}
    while cls in made:
        cls = made[cls]
    return cls


def despecialise(instance: Any, mixin: type) -> None:
    """Takes back what `specialise` did with `mixin` or a subclass of it, other mixins kept."""
    made = {subclass: key for key, subclass in _specialised.items()}
    mixins, cls = [], type(instance)
    while cls in made:
        cls, added = made[cls]
        mixins.append(added)
    instance.__class__ = cls
    for added in reversed(mixins):
        if not issubclass(added, mixin):
            specialise(instance, added)


def layer_path(layer: Layer) -> str:
    """Returns the layer's path; before it has one, the path it would get if it were called here and now."""
    if layer.path is not None:
        return layer.path
    parent = layer._parent_path
    parent = name_scope.current_path() if parent is None else parent
    return f"{parent}/{layer.name}" if parent else layer.name


def is_placed(layer: Layer) -> bool:
    """Returns whether the layer has a path that will not change by calling it elsewhere."""
    return layer.path is not None or layer._parent_path is not None


def flatten_layers(layer: Layer) -> list[Layer]:
    """Returns a layer and all layers inside it, each once, in an order that does not depend on names."""
    found: dict[int, Layer] = {}

    def visit(current):
        if id(current) not in found:
            found[id(current)] = current
            for child in current._layers:
                visit(child)

    visit(layer)
    return list(found.values())


def own_variables(layer: Layer) -> list[keras.Variable]:
    """Returns the layer's variables that none of its sublayers owns, random seeds left out."""
    inner = {id(variable) for child in layer._layers for variable in child.variables}
    return [v for v in layer._trainable_variables + layer._non_trainable_variables if id(v) not in inner]


def stored_dtype(variable: keras.Variable) -> str:
    """Returns the dtype that a variable is stored in, whatever autocast scope is active."""
    return variable._dtype


def attach_policy(layer: Layer, policy: keras.DTypePolicy) -> None:
    """Sets a layer's policy and nothing else; the public setter writes into shared maps and quantizes."""
    layer._dtype_policy = policy


def set_dtype(loss_or_metric: keras.Loss | keras.Metric, dtype: str) -> None:
    """Sets the dtype that a loss or metric computes in."""
    loss_or_metric._dtype = dtype


def is_quantized(layer: Layer) -> bool:
    """Returns whether Keras itself has quantized the layer's weights."""
    return bool(getattr(layer, "_is_quantized", False))


def refresh_symbolic_dtypes(model: Layer) -> None:
    """Recomputes the dtypes of a functional model's symbolic tensors after its layers' policies changed."""
    for layer in flatten_layers(model):
        functional = layer._functional if isinstance(layer, keras.Sequential) else layer
        if not isinstance(functional, Functional):
            continue
        for depth in sorted(functional._nodes_by_depth, reverse=True):
            for node in functional._nodes_by_depth[depth]:
                if node.is_input or not isinstance(node.operation, Operation):
                    continue
                specs = node.operation.compute_output_spec(*node.arguments.args, **node.arguments.kwargs)
                for tensor, spec in zip(keras.tree.flatten(node.outputs), keras.tree.flatten(specs), strict=True):
                    tensor._dtype = spec.dtype


def trainers(model: Layer) -> Iterator[keras.Model]:
    """Yields the model and its inner models that are compiled."""
    return (layer for layer in flatten_layers(model) if isinstance(layer, keras.Model) and layer.compiled)


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Returns the arguments of a model's last `compile`, as the live objects."""
    return dict(model._compile_config.config)

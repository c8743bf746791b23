"""A training step as the backend records it: operations, what they read and write, and how large that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import keras

from keras_precision import dtypes
from keras_precision.report import passes
from keras_precision.report.recorder import Recorder

# How an operation stands to memory once XLA has compiled the step. "cheap": computed within the operations that read
# it, again where need be, and stored only for one that reads stored operands. "costly": like that, but not again on the
# other side of one that stores. "alias": the same bytes in another shape. "reduces": stores its result, computes cheap
# operands itself. "stores": stores its result and reads stored operands.
Behaviour = Literal["cheap", "costly", "alias", "reduces", "stores"]

_BEHAVIOURS: dict[str, tuple[str, ...]] = {
    "alias": (
        "reshape squeeze expand_dims transpose copy copy_p stop_gradient optimization_barrier pvary",
        "Reshape Squeeze ExpandDims Transpose Identity StopGradient IdentityN ReadVariableOp",
    ),
    "costly": (
        (
            "exp exp2 expm1 log log1p logistic tanh erf erfc erf_inv sin cos tan asin acos atan atan2 sinh cosh asinh acosh "
            "atanh pow cbrt lgamma digamma"
        ),
        (
            "Exp Expm1 Log Log1p Sigmoid Tanh Erf Erfc Erfinv Sin Cos Tan Asin Acos Atan Atan2 Sinh Cosh Asinh Acosh Atanh Pow "
            "Lgamma Digamma Softplus Elu Selu"
        ),
    ),
    "reduces": (
        (
            "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin cumsum cumprod cumlogsumexp "
            "reduce_window_sum reduce_window_max reduce_window_min concatenate pad dynamic_update_slice scatter scatter-add "
            "scatter_add select_and_scatter_add"
        ),
        (
            "Sum Max Min Prod Mean All Any ArgMax ArgMin Cumsum BiasAddGrad Softmax LogSoftmax ConcatV2 Pad PadV2 MaxPool "
            "AvgPool MaxPoolGrad AvgPoolGrad SparseSoftmaxCrossEntropyWithLogits SoftmaxCrossEntropyWithLogits "
            "UnsortedSegmentSum TensorScatterUpdate TensorScatterAdd ScatterNd FusedBatchNormV3 FusedBatchNormGradV3"
        ),
    ),
    "stores": (
        (
            "dot_general conv_general_dilated ragged_dot gather sort top_k scan while cond random_bits threefry2x32 fft "
            "cholesky triangular_solve qr svd eigh lu custom_call pallas_call ffi_call dot_product_attention_fwd "
            "dot_product_attention_fwd_wrapper dot_product_attention_bwd dot_product_attention_bwd_wrapper"
        ),
        (
            "MatMul BatchMatMul BatchMatMulV2 BatchMatMulV3 Conv1D Conv2D Conv3D Conv2DBackpropInput Conv2DBackpropFilter "
            "Conv2DBackpropInputV2 Conv2DBackpropFilterV2 Conv3DBackpropInputV2 Conv3DBackpropFilterV2 "
            "DepthwiseConv2dNative DepthwiseConv2dNativeBackpropInput DepthwiseConv2dNativeBackpropFilter Einsum GatherV2 "
            "ResourceGather TopKV2 While StatelessWhile If StatelessIf PartitionedCall StatefulPartitionedCall"
        ),
    ),
}
_BEHAVIOUR_OF = {
    name: behaviour for behaviour, lists in _BEHAVIOURS.items() for names in lists for name in names.split()
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: the backend's name of what it does.
        scope: names of the scopes that it was made in.
        inputs: numbers of the values that it reads.
        outputs: numbers of those that it makes.
        casts: (from, to) dtypes if it converts floats.
        times: how often it runs, more than once within a loop.
    """

    name: str
    scope: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    casts: tuple[str, str] | None = None
    times: int = 1

    @property
    def behaviour(self) -> Behaviour:
        """How it stands to memory."""
        return _BEHAVIOUR_OF.get(self.name, "cheap")


@dataclasses.dataclass(frozen=True)
class Program:
    """The forward and backward pass of a training step, or a forward pass alone.

    Attributes:
        operations: in order.
        sizes: number of a value -> its elements and the bytes of one.
        results: values that the program returns.
    """

    operations: tuple[Operation, ...]
    sizes: dict[int, tuple[int, int]]
    results: tuple[int, ...]

    def bytes_of(self, value: int) -> int:
        """Returns the bytes of a value."""
        elements, size = self.sizes[value]
        return elements * size


def traced(model: keras.Model, batch: passes.Batch) -> Program:
    """Returns what a prepared copy computes for a batch, without computing it."""
    return _TRACERS[keras.backend.backend()](model, batch)


def _trace_jax(model, batch):
    import jax

    function = passes.pure(model, lambda: passes.loss_or_output(model, batch))
    if batch.trains:
        function = jax.value_and_grad(function)
    with Recorder(model).running():
        closed = jax.make_jaxpr(function)(*passes.values(model))
    reader = _JaxReader()
    known = {}
    reader.read(closed.jaxpr, known, "", 1)
    results = tuple(known[v] for v in closed.jaxpr.outvars if v in known) if closed.jaxpr.outvars else ()
    return Program(tuple(reader.operations), reader.sizes, results)


class _JaxReader:
    """Lists the operations of a jaxpr, those within called ones in their place."""

    def __init__(self):
        self.operations: list[Operation] = []
        self.sizes: dict[int, tuple[int, int]] = {}

    def read(self, jaxpr, known, scope, times):
        for equation in jaxpr.eqns:
            inner = list(_jaxprs(equation.params))
            name, inside = equation.primitive.name, f"{scope}/{equation.source_info.name_stack}"
            inputs = [None if _is_literal(v) else self._value(v, known) for v in equation.invars]
            is_loop = name in ("scan", "while", "cond")
            if len(inner) == 1 and not is_loop and _BEHAVIOUR_OF.get(name) is None:
                body = inner[0]
                # A literal operand has no number; a call may also leave out operands that its body doesn't take.
                mine = dict(zip(body.invars, inputs[len(inputs) - len(body.invars) :], strict=False))
                mine = {variable: number for variable, number in mine.items() if number is not None}
                self.read(body, mine, inside, times)
                for outer, variable in zip(equation.outvars, body.outvars, strict=False):
                    known[outer] = self._value(variable, mine)
                continue
            for body in inner if is_loop else ():
                repeats = times * int(equation.params.get("length", 1)) if name == "scan" else times
                self._casts_within(body, inside, repeats)
            outputs = tuple(self._value(v, known) for v in equation.outvars)
            casts = None
            if name == "convert_element_type":
                casts = _float_pair(equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype)
            numbers = tuple(number for number in inputs if number is not None)
            self.operations.append(Operation(name, inside, numbers, outputs, casts, times))

    def _casts_within(self, body, scope, times):
        inner = _JaxReader()
        inner.read(body, {}, scope, times)
        for operation in inner.operations:
            if operation.casts is not None:
                numbers = tuple(self._number(inner.sizes[v]) for v in (*operation.inputs, *operation.outputs))
                count = len(operation.inputs)
                self.operations.append(
                    dataclasses.replace(
                        operation, inputs=numbers[:count], outputs=numbers[count:], name="within a loop"
                    )
                )

    def _value(self, variable, known):
        size = math.prod(variable.aval.shape), _itemsize(variable.aval.dtype)
        if _is_literal(variable):  # can't be looked up
            return self._number(size)
        if variable not in known:
            known[variable] = self._number(size)
        return known[variable]

    def _number(self, size):
        self.sizes[len(self.sizes)] = size
        return len(self.sizes) - 1


def _is_literal(variable):
    return hasattr(variable, "val")


def _itemsize(dtype):
    return getattr(dtype, "itemsize", 4)


def _jaxprs(params) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            found = getattr(one, "jaxpr", one)
            if hasattr(found, "eqns"):
                yield found


def _float_pair(source, target):
    pair = keras.backend.standardize_dtype(source), keras.backend.standardize_dtype(target)
    return pair if pair[0] != pair[1] and all(one in dtypes.DTYPES for one in pair) else None


def _trace_tensorflow(model, batch):
    import tensorflow as tf

    def forward():
        return keras.tree.flatten(passes.loss_or_output(model, batch))

    def both():
        weights = [v.value for v in passes.trained(model)]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            (loss,) = forward()
        return [loss, *(g for g in tape.gradient(loss, weights) if g is not None)]

    with Recorder(model).running():
        graph = tf.function(both if batch.trains else forward, autograph=False).get_concrete_function().graph
    numbers: dict[int, int] = {}
    sizes = {}

    def number(tensor):
        if id(tensor) not in numbers:
            numbers[id(tensor)] = len(numbers)
            elements = tensor.shape.num_elements() if tensor.shape.rank is not None else None
            sizes[numbers[id(tensor)]] = (elements or 0, tensor.dtype.size or 0)
        return numbers[id(tensor)]

    operations = []
    for op in graph.get_operations():
        if op.type in ("Placeholder", "Const", "NoOp"):
            continue
        casts = _float_pair(op.inputs[0].dtype, op.outputs[0].dtype) if op.type == "Cast" else None
        read, made = tuple(map(number, op.inputs)), tuple(map(number, op.outputs))
        operations.append(Operation(op.type, op.name, read, made, casts))
    return Program(tuple(operations), sizes, tuple(map(number, graph.outputs)))


_TRACERS = {"jax": _trace_jax, "tensorflow": _trace_tensorflow}

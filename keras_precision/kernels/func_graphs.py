"""Records functions from the graph that TensorFlow traces them to."""

from __future__ import annotations

import functools

import numpy as np

from keras_precision.kernels.recording import NotElementwise, Recording, Tensor

# Operations that make one element of the result of one element of each operand.
_ELEMENTWISE = frozenset(
    "Abs Add AddV2 Cast Ceil ClipByValue Cos Div DivNoNan Equal Exp Expm1 Floor FloorDiv FloorMod Greater GreaterEqual "
    "IsFinite IsInf IsNan Less LessEqual Log Log1p LogicalAnd LogicalNot LogicalOr Maximum Minimum Mul MulNoNan Neg "
    "NotEqual Pow RealDiv Reciprocal Rsqrt SelectV2 Sigmoid Sign Sin Sqrt Square SquaredDifference Sub Tan Tanh "
    "Xdivy Xlogy".split()
)
_ALIASES = frozenset(("Identity", "PreventGradient", "Snapshot", "StopGradient"))
_CONSTANTS = frozenset(("Const", "Shape"))
# With which of their operands they fill a shape.
_BROADCASTS = {"BroadcastTo": 0, "Fill": 1, "Reshape": 0}
# What they make of what a variable holds and of their operand.
_ASSIGNMENTS = {"AssignVariableOp": None, "AssignAddVariableOp": "AddV2", "AssignSubVariableOp": "Sub"}


def record(recording: Recording, function, arguments) -> list:
    """Adds a function's operations to a recording.

    The function is traced to a graph that never runs, so that variables stay
    as they are. In it a variable holds what was assigned to it last.

    Args:
        recording: for as many arguments.
        function: of tensors, returning tensors, variables or numbers. It may
            assign to those variables that are among the arguments.
        arguments: tensors, variables, or what has their shapes and dtypes.

    Returns:
        The results, as `recording.operand` takes them.

    Raises:
        NotElementwise: an operation mixes elements, assigns to another
            variable, or has another effect.
    """
    import tensorflow as tf

    graph = tf.__internal__.FuncGraph("elementwise")
    with graph.as_default():
        placeholders = [tf.compat.v1.placeholder(x.dtype, x.shape) for x in arguments]
        results = [graph.capture(tf.convert_to_tensor(result)) for result in function(*placeholders)]
    reader = _Reader(recording, [x.handle for x in arguments if isinstance(x, tf.Variable)])
    reader.know(placeholders, recording.arguments)
    for outside, inside in graph.captures:
        reader.know([inside], [outside])
    for operation in graph.get_operations():
        if operation.type != "Placeholder":
            reader.read(operation)
    return [reader.value(result) for result in results]


class _Reader:
    """Goes through the operations of a graph in their order.

    Of a tensor it knows a value: a Tensor of the recording or a tensor of the
    graph around; of one whose elements are one number, that number.
    """

    def __init__(self, recording, assignable):
        self._recording = recording
        self._assignable = {handle.ref() for handle in assignable}
        self._known = {}
        self._held = {}  # by variables

    def know(self, tensors, values):
        """Notes the values of tensors."""
        self._known.update(zip((x.ref() for x in tensors), values, strict=True))

    def value(self, tensor):
        """Returns the value of a tensor."""
        return self._known[tensor.ref()]

    def read(self, operation):
        """Finds out the values of an operation's results."""
        operands = [self.value(x) for x in operation.inputs]
        if operation.type in _ASSIGNMENTS:
            self._assign(operation, *operands)
        else:
            self.know(operation.outputs, self._results(operation, operands))

    def _assign(self, operation, handle, value):
        import tensorflow as tf

        if handle.ref() not in self._assignable:
            raise NotElementwise("assigns to a variable")
        combines = _ASSIGNMENTS[operation.type]
        if combines:
            function = functools.partial(_named, getattr(tf.raw_ops, combines), ("x", "y"))
            value = self._applied(function, [self._read(operation, handle), value])
        self._held[handle.ref()] = value

    def _read(self, operation, handle):
        import tensorflow as tf

        if handle.ref() not in self._held:
            self._held[handle.ref()] = tf.raw_ops.ReadVariableOp(resource=handle, dtype=operation.get_attr("dtype"))
        return self._held[handle.ref()]

    def _results(self, operation, operands):
        import tensorflow as tf

        name = operation.type
        if name == "NoOp":
            return []
        if name == "ReadVariableOp":
            return [self._read(operation, *operands)]
        if name in _ALIASES:
            return operands
        if name in _CONSTANTS:
            return [self._constant(tf.get_static_value(operation.outputs[0]))]
        if operation.op_def.is_stateful:
            raise NotElementwise(name)
        if not any(map(self._is_full, [*operation.inputs, *operation.outputs])):
            found = _function_of(operation)(*operands)
            return [found] if len(operation.outputs) == 1 else list(found)
        places = [_BROADCASTS[name]] if name in _BROADCASTS else range(len(operands))
        are_alike = all(self._is_full(x) or x.shape.num_elements() == 1 for x in (operation.inputs[i] for i in places))
        if not are_alike or not all(map(self._is_full, operation.outputs)):
            raise NotElementwise(name)
        if name in _BROADCASTS:
            return [operands[places[0]]]
        if name not in _ELEMENTWISE:
            raise NotElementwise(name)
        return [self._applied(_function_of(operation), operands)]

    def _constant(self, array):
        import tensorflow as tf

        if array is None:
            raise NotElementwise("a shape that is not known")
        is_one_number = np.shape(array) == self._recording.shape and (array == array.flat[0]).all()
        return tf.constant(array.flat[0] if is_one_number else array, dtype=array.dtype)

    def _applied(self, function, operands):
        """Returns what an elementwise function makes of values."""
        if any(isinstance(x, Tensor) or self._is_full(x) for x in operands):
            return self._recording.add(function, operands)
        return function(*operands)

    def _is_full(self, tensor):
        return tensor.shape == self._recording.shape


def _function_of(operation):
    """Returns the function of tensors that an operation is."""
    import tensorflow as tf

    arguments = operation.op_def.input_arg
    if any(x.number_attr or x.type_list_attr for x in arguments):
        raise NotElementwise(f"{operation.type} has lists of operands")
    inferred = {x.type_attr for x in arguments}
    settings = {x.name: operation.get_attr(x.name) for x in operation.op_def.attr if x.name not in inferred}
    return functools.partial(_named, getattr(tf.raw_ops, operation.type), [x.name for x in arguments], **settings)


def _named(function, names, *operands, **settings):
    """Calls a raw operation, which takes its operands by name."""
    return function(**dict(zip(names, operands, strict=True)), **settings)

"""The calls of layers that multiply by their `weight_matrix` instead of a float weight."""

import keras
from keras import ops

from keras_precision.policies.resolve import resolve


class DenseProduct:
    """Multiplies as `keras.layers.Dense` does."""

    stock_class = keras.layers.Dense
    multiplies = True

    def call(self, inputs, training=None):
        """Returns activation(inputs @ kernel + bias)."""
        dtype = resolve(self).compute_dtype
        outputs = self.weight_matrix.matmul(inputs, dtype)
        if self.lora_enabled:
            low_rank = ops.matmul(
                ops.matmul(inputs, ops.cast(self.lora_kernel_a, dtype)), ops.cast(self.lora_kernel_b, dtype)
            )
            outputs = outputs + low_rank * (self.lora_alpha / self.lora_rank)
        return _biased_and_activated(self, outputs)


class EinsumProduct:
    """Multiplies as `keras.layers.EinsumDense` does, where its equation is a matmul of flattened axes."""

    stock_class = keras.layers.EinsumDense
    multiplies = True

    def call(self, inputs, training=None):
        """Returns activation(einsum(equation, inputs, kernel) + bias)."""
        order = matmul_order(self.equation, len(inputs.shape))
        if order is None:
            return super().call(inputs, training=training)
        to_rows, from_columns = order
        dtype = resolve(self).compute_dtype
        matrix = self.weight_matrix
        rows = ops.transpose(inputs, to_rows)
        batch = len(to_rows) - len(matrix.contracted)
        lead = ops.shape(rows)[:batch]
        outputs = matrix.matmul(ops.reshape(rows, (*lead, matrix.matrix_shape[0])), dtype)
        outputs = ops.reshape(outputs, (*lead, *(matrix.shape[axis] for axis in matrix.kept)))
        outputs = ops.transpose(outputs, from_columns)
        if self.lora_enabled:
            kernel = ops.matmul(self.lora_kernel_a, self.lora_kernel_b) * (self.lora_alpha / self.lora_rank)
            outputs = outputs + ops.einsum(self.equation, inputs, ops.cast(kernel, dtype))
        return _biased_and_activated(self, outputs)


def matmul_order(equation, rank):
    """Returns how to permute inputs before, and outputs after, a matmul that an equation is; None if it is none.

    The inputs' contracted axes come last, in the kernel's order; the outputs
    come as the inputs' other axes and then the kernel's.
    """
    inputs, kernel, output = equation.replace("->", ",").split(",")
    if "..." in inputs:  # as many axes as it takes, named by letters that the equation does not use
        free = [chr(code) for code in range(ord("A"), ord("z")) if chr(code).isalpha() and chr(code) not in equation]
        names = "".join(free[: rank - len(inputs.replace("...", ""))])
        inputs, output = inputs.replace("...", names), output.replace("...", names)
    contracted = [letter for letter in kernel if letter not in output]
    kept = [letter for letter in kernel if letter in output]
    batch = [letter for letter in inputs if letter not in contracted]
    is_matmul = (
        set(contracted) <= set(inputs) and not set(kept) & set(inputs) and set(output) == {*batch, *kept}
    ) and all(len(set(text)) == len(text) for text in (inputs, kernel, output))
    if not is_matmul:
        return None
    columns = [*batch, *kept]
    return tuple(inputs.index(x) for x in [*batch, *contracted]), tuple(columns.index(x) for x in output)


def _biased_and_activated(layer, outputs):
    if layer.bias is not None:
        outputs = ops.add(outputs, ops.cast(layer.bias, outputs.dtype))
    return outputs if layer.activation is None else layer.activation(outputs)


class EmbeddingProduct:
    """Looks up as `keras.layers.Embedding` and `ReversibleEmbedding` do, decoding only the rows that are asked for."""

    stock_class = keras.layers.Embedding
    multiplies = False

    def call(self, inputs, *args, **kwargs):
        """Returns the rows of the table; with ReversibleEmbedding's `reverse`, what its class returns."""
        # ReversibleEmbedding sets its mask in `call`.
        if any(args) or any(kwargs.values()) or (self.mask_zero and isinstance(self, keras.layers.ReversibleEmbedding)):
            return super().call(inputs, *args, **kwargs)
        inputs = inputs if keras.backend.is_int_dtype(inputs.dtype) else ops.cast(inputs, "int32")
        dtype = resolve(self).compute_dtype
        outputs = self.weight_matrix.gather(inputs, dtype)
        if self.lora_enabled:
            low_rank = ops.matmul(ops.take(self.lora_embeddings_a, inputs, axis=0), self.lora_embeddings_b)
            outputs = outputs + ops.cast(low_rank * (self.lora_alpha / self.lora_rank), dtype)
        return outputs

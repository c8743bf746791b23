"""Tests that the TPU column of the support matrix lowers for a TPU."""

import keras
import pytest

import keras_precision as kp
from keras_precision import hardware

MATRIX = hardware.support_matrix()
IS_JAX = keras.config.backend() == "jax"

TPU_FLOATS = [
    row
    for row in MATRIX.dtypes
    if row.startswith(("float", "bfloat"))
    and MATRIX.lookup(row, "tpu", "jax").status != "unsupported"
]


@pytest.mark.parametrize("row", TPU_FLOATS)
def test_tpu_rows_lower_for_a_tpu(row):
    """A dense layer and a convolution, forward and gradient, lower in the dtype."""
    jax = pytest.importorskip("jax")
    from jax import export

    dtype = "float8_e4m3fn" if row == "float8" else row

    def loss(kernel, filters, x, images):
        dense = jax.numpy.tanh((x @ kernel).astype("float32")).sum()
        maps = jax.lax.conv_general_dilated(
            images, filters, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return dense + maps.astype("float32").sum()

    shapes = ((4, 3), (3, 3, 2, 5), (8, 4), (2, 6, 6, 2))
    with jax.enable_x64(row == "float64"):
        arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        exported = export.export(step, platforms=["tpu"])(*arguments)
    assert exported.platforms == ("tpu",)
    assert [str(one.dtype) for one in exported.out_avals[1:]] == [dtype] * 2
    # MLIR's name of the element type stands on the dot and the convolution.
    element = {"bfloat16": "bf16", "float8_e4m3fn": "f8E4M3FN"}
    element = element.get(dtype, f"f{dtype[-2:]}")
    module = exported.mlir_module()
    for operation in ("stablehlo.dot_general", "stablehlo.convolution"):
        lines = [line for line in module.splitlines() if operation in line]
        assert lines and all(f"x{element}>" in line for line in lines)


def test_tpu_row_of_int8_lowers_for_a_tpu():
    jax = pytest.importorskip("jax")
    from jax import export

    def product(x, codes):
        return jax.lax.dot(x, codes, preferred_element_type="int32")

    arguments = [jax.ShapeDtypeStruct((8, 8), "int8")] * 2
    exported = export.export(jax.jit(product), platforms=["tpu"])(*arguments)
    assert str(exported.out_avals[0].dtype) == "int32"
    assert "(tensor<8x8xi8>, tensor<8x8xi8>)" in exported.mlir_module()


@pytest.mark.skipif(not IS_JAX, reason="a Keras layer traces through its backend")
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_keras_dense_lowers_for_a_tpu(policy):
    import jax
    from jax import export

    layer = keras.layers.Dense(3, dtype=policy)
    layer.build((None, 4))
    values = [one.value for one in layer.trainable_variables]

    def loss(values, x):
        return layer.stateless_call(values, [], x)[0].astype("float32").sum()

    x = jax.ShapeDtypeStruct((8, 4), layer.compute_dtype)
    step = jax.jit(jax.value_and_grad(loss))
    exported = export.export(step, platforms=["tpu"])(values, x)
    assert exported.platforms == ("tpu",)
    assert {str(one.dtype) for one in exported.out_avals[1:]} == {layer.variable_dtype}


@pytest.mark.skipif(not IS_JAX, reason="a Keras layer traces through its backend")
@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "int4", "int8-weight-only", "int8", "llm-int8", "float8"])
def test_quantized_layers_lower_for_a_tpu(name):
    """By the reference path, with their gradients."""
    jax = pytest.importorskip("jax")
    from jax import export

    policy = kp.get(f"{name}_from_mixed_bfloat16")
    if name == "float8":
        policy = type(policy)(**{**policy.get_config(), "min_features": 16})
    layer = keras.layers.Dense(64, dtype=policy)
    layer.build((None, 128))
    values = [[v.value for v in variables] for variables in (layer.trainable_variables, layer.non_trainable_variables)]

    def gradient(x):
        return jax.grad(lambda x: layer.stateless_call(*values, x)[0].astype("float32").sum())(x)

    exported = export.export(jax.jit(gradient), platforms=["tpu"])(jax.ShapeDtypeStruct((16, 128), "bfloat16"))
    assert exported.platforms == ("tpu",) and "custom_call @" not in exported.mlir_module().replace("@Sharding", "")

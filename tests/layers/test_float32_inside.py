"""D18 and D24: losses, metrics and regularizers in float32."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_precision.layers.float32_inside import in_float32

# The square of 300 is 90000, above float16's largest value, 65504.
LARGE = 300.0


def large(dtype="float16"):
    return ops.zeros((4, 2), dtype), ops.full((4, 2), LARGE, dtype)


class AddsMean(keras.layers.Layer):
    """Adds the mean of its input, in its own compute dtype, as a loss."""

    def call(self, inputs):
        self.add_loss(ops.mean(inputs))
        return inputs


class Scale(keras.layers.Layer):
    """Multiplies by a trainable 1, so that there is something to train."""

    def build(self, input_shape):
        self.factor = self.add_weight(shape=(), initializer="ones")

    def call(self, inputs):
        return inputs * self.factor


def fit_once(layer, value, units=1000):
    model = keras.Sequential([keras.Input((units,)), Scale(dtype="float32"), layer])
    model.compile("sgd", "mse")
    x = np.full((4, units), value, "float32")
    return model.fit(x, x, verbose=0).history["loss"][0]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_added_loss_joins_the_main_loss(policy):
    # The main loss is 0; the mean of 30s is 30, exact in both dtypes.
    assert fit_once(AddsMean(dtype=policy), 30.0) == 30.0


def test_added_losses_of_a_layer_are_float32():
    layer = AddsMean(dtype="mixed_float16")
    layer(np.ones((2, 3)))
    assert [keras.backend.standardize_dtype(loss.dtype) for loss in layer.losses] == ["float32"]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_activity_regularizer_sums_in_float32(policy):
    # 0.01 * 1000 * 30**2 = 9000 a sample; the sum over 4 samples, 3.6e6 / 100, overflows float16 before the mean.
    layer = keras.layers.Activation("linear", activity_regularizer="l2", dtype=policy)
    assert fit_once(layer, 30.0) == pytest.approx(9000.0, rel=1e-4)


def test_activity_regularizer_that_is_a_function_sums_in_float32():
    layer = keras.layers.Activation(
        "linear", activity_regularizer=lambda x: 0.01 * ops.sum(ops.square(x)), dtype="mixed_float16"
    )
    assert fit_once(layer, 30.0) == pytest.approx(9000.0, rel=1e-4)


def test_weight_regularizer_of_float16_weights_sums_in_float32():
    layer = keras.layers.Dense(1000, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L1(1.0), dtype="float16")
    layer.build((None, 1000))
    assert float(layer.losses[0]) == 1e6


def test_regularizers_are_saved_as_what_the_user_gave():
    layer = keras.layers.Dense(2, kernel_regularizer="l1", activity_regularizer="l2", dtype="mixed_float16")
    config = layer.get_config()
    layer.build((None, 2))
    assert layer.get_config() == config
    copy = keras.layers.Dense.from_config(config)
    assert type(copy.activity_regularizer) is keras.regularizers.L2


def test_float32_layers_keep_their_regularizer_untouched():
    regularizer = keras.regularizers.L2()
    keras.layers.Dense(2, activity_regularizer=regularizer, kernel_regularizer=regularizer).build((None, 2))
    assert type(regularizer) is keras.regularizers.L2


def test_metrics_in_fit_do_not_overflow():
    def squared(y_true, y_pred):
        return ops.mean(ops.square(y_pred - y_true))

    model = keras.Sequential([keras.Input((10,)), keras.layers.Activation("linear", dtype="mixed_float16")])
    model.compile("sgd", "mse", metrics=["mse", keras.metrics.MeanSquaredError(name="object"), squared])
    results = model.evaluate(np.full((4, 10), LARGE), np.zeros((4, 10)), verbose=0, return_dict=True)
    assert results == pytest.approx({"loss": 9e4, "mse": 9e4, "object": 9e4, "squared": 9e4})


@pytest.mark.parametrize("identifier", ["mse", "mean_squared_error", keras.losses.mean_squared_error])
def test_function_losses_compute_in_float32(identifier):
    values = keras.losses.get(identifier)(*large())
    assert keras.backend.standardize_dtype(values.dtype) == "float32"
    np.testing.assert_array_equal(ops.convert_to_numpy(values), [9e4] * 4)


def test_function_losses_leave_float32_and_float64_alone():
    y_true, y_pred = np.zeros((4, 2), "float32"), np.ones((4, 2), "float32")
    values = keras.losses.mean_squared_error(ops.array(y_true), ops.array(y_pred))
    assert keras.backend.standardize_dtype(values.dtype) == "float32"


def test_function_losses_are_still_saved_by_name():
    config = keras.losses.serialize(keras.losses.mean_squared_error)
    assert keras.losses.deserialize(config) is keras.losses.mean_squared_error
    assert keras.losses.get("mse") is keras.losses.mean_squared_error
    assert keras.metrics.mean_squared_error is keras.losses.mean_squared_error


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_losses_of_float16_compute_and_return_float32(dtype):
    loss = keras.losses.MeanSquaredError(dtype=dtype)(*large())
    assert (keras.backend.standardize_dtype(loss.dtype), float(loss)) == ("float32", 9e4)


def test_losses_of_bfloat16_compute_in_float32_and_return_bfloat16():
    # Summed in bfloat16, 1000 ones stop at 256.
    loss = keras.losses.MeanAbsoluteError(reduction="sum", dtype="bfloat16")
    total = loss(np.zeros((1000, 1)), np.ones((1000, 1)))
    assert (keras.backend.standardize_dtype(total.dtype), float(total)) == ("bfloat16", 1000.0)


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16", "bfloat16"])
def test_metrics_of_16_bits_accumulate_in_float32_and_return_their_dtype(dtype):
    metric = keras.metrics.Mean(dtype=dtype)
    # 4000 * 30 overflows float16; in bfloat16 the sum stops at 8192, where 8192 + 30 rounds to 8192.
    for _ in range(4):
        metric.update_state(np.full((1000,), 30.0))
    compute = keras.DTypePolicy(dtype).compute_dtype
    assert (keras.backend.standardize_dtype(metric.result().dtype), float(metric.result())) == (compute, 30.0)
    assert {variable.dtype for variable in metric.variables} == {"float32"}


def test_metrics_of_16_bits_are_saved_as_what_the_user_gave():
    metric = keras.metrics.MeanSquaredError(dtype="float16")
    config = keras.metrics.serialize(metric)
    assert (config["class_name"], config["config"]["dtype"]) == ("MeanSquaredError", "float16")
    assert keras.metrics.deserialize(config).result().dtype == metric.result().dtype


def test_in_float32_keeps_masks_and_looks_into_structures():
    seen = []

    def record(tree, mask_of):
        seen.extend(keras.backend.standardize_dtype(x.dtype) for x in tree["values"])
        return getattr(mask_of, "_keras_mask", None)

    masked = ops.ones((2,), "bfloat16")
    try:
        masked._keras_mask = ops.array([True, False])
    except AttributeError:
        pytest.skip("this backend's tensors take no attributes")
    tree = {"values": [ops.ones((), "float16"), ops.ones((), "int32"), ops.ones((), "float32")]}
    assert in_float32(record)(tree, masked) is masked._keras_mask
    assert seen == ["float32", "int32", "float32"]

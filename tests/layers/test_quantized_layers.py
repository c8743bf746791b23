"""One contract for every format on every site: values, gradients, files and configs."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_precision as kp
from keras_precision import _bridge
from keras_precision.formats import FORMATS, Codec
from keras_precision.layers.quantized import is_quantized, prepare
from keras_precision.layers.sites import SITES, sites_of_class

CODECS = [name for name, entry in FORMATS.items() if isinstance(entry, Codec)]
# Odd sizes on purpose: blocks and bytes that are not full.
CASES = {
    layers.Dense: (lambda dtype: layers.Dense(7, dtype=dtype), (3, 37)),
    layers.EinsumDense: (
        lambda dtype: layers.EinsumDense("abcd,cde->abe", output_shape=(None, 9), bias_axes="e", dtype=dtype),
        (2, 3, 5, 7),
    ),
    layers.Embedding: (lambda dtype: layers.Embedding(11, 19, dtype=dtype), "indices"),
    layers.ReversibleEmbedding: (
        lambda dtype: layers.ReversibleEmbedding(11, 19, tie_weights=False, dtype=dtype),
        "indices",
    ),
    layers.Conv1D: (lambda dtype: layers.Conv1D(5, 3, dtype=dtype), (2, 9, 7)),
    layers.Conv2D: (lambda dtype: layers.Conv2D(5, (3, 2), dtype=dtype), (2, 6, 6, 3)),
    layers.Conv3D: (lambda dtype: layers.Conv3D(5, 2, dtype=dtype), (1, 4, 4, 4, 3)),
    layers.Conv1DTranspose: (lambda dtype: layers.Conv1DTranspose(5, 3, dtype=dtype), (2, 6, 7)),
    layers.Conv2DTranspose: (lambda dtype: layers.Conv2DTranspose(5, (3, 2), dtype=dtype), (2, 4, 4, 3)),
    layers.Conv3DTranspose: (lambda dtype: layers.Conv3DTranspose(5, 2, dtype=dtype), (1, 3, 3, 3, 3)),
    layers.DepthwiseConv1D: (lambda dtype: layers.DepthwiseConv1D(3, depth_multiplier=2, dtype=dtype), (2, 9, 5)),
    layers.DepthwiseConv2D: (lambda dtype: layers.DepthwiseConv2D(3, dtype=dtype), (2, 6, 6, 3)),
    layers.SeparableConv1D: (lambda dtype: layers.SeparableConv1D(5, 3, dtype=dtype), (2, 9, 7)),
    layers.SeparableConv2D: (lambda dtype: layers.SeparableConv2D(5, 3, dtype=dtype), (2, 6, 6, 3)),
    layers.SimpleRNNCell: (lambda dtype: layers.SimpleRNN(5, dtype=dtype), (2, 4, 7)),
    layers.LSTMCell: (lambda dtype: layers.LSTM(5, dtype=dtype), (2, 4, 7)),
    layers.GRUCell: (lambda dtype: layers.GRU(5, dtype=dtype), (2, 4, 7)),
}


def made(site, dtype):
    make, shape = CASES[site]
    draw = np.random.default_rng(0)
    inputs = (
        draw.integers(0, 11, (2, 3)).astype("int32")
        if shape == "indices"
        else draw.standard_normal(shape).astype("float32")
    )
    keras.utils.set_random_seed(1)  # the same weights, whatever the dtype; initializers draw their seeds when made
    layer = make(dtype)
    return layer, inputs, layer(inputs)


def quantized_inside(layer):
    return [inner for inner in _bridge.flatten_layers(layer) if is_quantized(inner)]


def staged(function):
    """Returns a function compiled as the backend compiles a training step."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, autograph=False)


def test_every_site_has_a_case():
    assert set(CASES) == set(SITES)


@pytest.mark.parametrize("fmt", CODECS)
@pytest.mark.parametrize("site", CASES, ids=lambda cls: cls.__name__)
def test_contract(site, fmt):
    policy = kp.get(f"{fmt}_from_float32")
    layer, inputs, outputs = made(site, policy)
    plain, _, _ = made(site, "float32")
    (inner,), before = quantized_inside(layer), {}
    float_inner = plain if inner is layer else plain.cell
    # Values: each weight is what its codec makes of the float one, and the call is the stock call on those values.
    for attribute, encoded in inner.encoded_weights.items():
        weight = ops.convert_to_numpy(getattr(float_inner, attribute))
        before[attribute] = weight
        decoded = ops.convert_to_numpy(encoded.decode("float32"))
        assert decoded.shape == weight.shape
        # The widest gap between codes is 1 / 3 of the greatest magnitude (fp4), so the error is at most 1 / 6 of it;
        # double quantization moves scales by up to 1 / 64 of their range.
        assert np.abs(decoded - weight).max() <= (1 / 6 + 1 / 32) * np.abs(weight).max()
        getattr(float_inner, attribute).assign(decoded)
    expected = ops.convert_to_numpy(plain(inputs))
    # Activations in 8 bits are off by up to 1 / 254 of a row's greatest magnitude; sums of up to 37 products, at random.
    has_activations = fmt in ("int8", "llm-int8") and site in (layers.Dense, layers.EinsumDense)
    tolerance = 0.02 * np.abs(expected).max() if has_activations else 1e-5
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, rtol=0, atol=tolerance)
    # Compiled, it gives the same but for sums in another order.
    compiled = ops.convert_to_numpy(staged(layer)(ops.convert_to_tensor(inputs)))
    np.testing.assert_allclose(compiled, ops.convert_to_numpy(outputs), rtol=0, atol=1e-5)
    # Nothing of the base is trained, and its memory holds no float copy.
    encoded_variables = {id(v) for e in inner.encoded_weights.values() for v in e.variables.values()}
    assert not encoded_variables & {id(v) for v in layer.trainable_variables}
    assert not any(
        tuple(v.shape) == weight.shape and "float" in v.dtype and len(v.shape) > 1
        for v in layer.variables
        for weight in before.values()
    )
    # Config and variables make the same layer again.
    store, again = {}, type(layer).from_config(layer.get_config())
    again(inputs)
    inner.save_own_variables(store)
    (inner_again,) = quantized_inside(again)
    inner_again.load_own_variables({name: np.array(value) for name, value in store.items()})
    np.testing.assert_array_equal(ops.convert_to_numpy(again(inputs)), ops.convert_to_numpy(outputs))
    assert again.dtype_policy == policy
    # What a float layer saved is quantized as it is read.
    for attribute, weight in before.items():
        getattr(float_inner, attribute).assign(weight)
    store = {}
    float_inner.save_own_variables(store)
    third, _, _ = made(site, policy)
    (inner_third,) = quantized_inside(third)
    for variable in inner_third.variables:
        variable.assign(ops.zeros(variable.shape, variable.dtype))
    inner_third.load_own_variables({name: ops.convert_to_numpy(value) for name, value in store.items()})
    np.testing.assert_array_equal(ops.convert_to_numpy(third(inputs)), ops.convert_to_numpy(outputs))


@pytest.mark.parametrize("fmt", CODECS)
@pytest.mark.parametrize("site", CASES, ids=lambda cls: cls.__name__)
def test_special_values(site, fmt):
    """Zeros, denormals and the largest numbers of each weight; inf and NaN are refused."""
    layer, codec = made(site, "float32")[0], FORMATS[fmt]
    inner = layer if type(layer) is site else layer.cell
    largest = float(np.finfo("float32").max)
    for place in (place.attribute for place in sites_of_class(site).sites):
        variable = getattr(inner, place)
        weight = ops.convert_to_numpy(variable).copy()
        for value in (np.inf, np.nan):
            weight.flat[weight.size // 2] = value
            variable.assign(weight)
            with pytest.raises(ValueError, match="finite"):
                prepare(inner, codec)
        for start, value in enumerate((0.0, -0.0, 1e-40, -largest)):
            weight.flat[start::5] = value
        weight.flat[weight.size // 2] = 1.0
        variable.assign(weight)
        encoded, arrays = prepare(inner, codec).weights[place]
        variable.assign(np.ones_like(weight))  # finite for the next
        matrix = np.transpose(weight, encoded.contracted + encoded.kept).reshape(encoded.matrix_shape)
        tensors = {name: ops.convert_to_tensor(array) for name, array in arrays.items()}
        decoded = ops.convert_to_numpy(codec.decode(tensors, encoded.matrix_shape, "float32")).astype("float64")
        assert np.isfinite(decoded).all()
        # As in `test_contract`; each of the float32 steps between may round up by 2**-24.
        assert np.abs(decoded - matrix).max() <= (1 / 6 + 1 / 32 + 1e-6) * np.abs(matrix).max()
    encoded, arrays = prepare(_zeroed(inner), codec).weights[sites_of_class(site).sites[0].attribute]
    tensors = {name: ops.convert_to_tensor(array) for name, array in arrays.items()}
    assert not ops.convert_to_numpy(codec.decode(tensors, encoded.matrix_shape, "float32")).any()


def _zeroed(layer):
    for variable in layer.variables:
        variable.assign(ops.zeros(variable.shape, variable.dtype))
    return layer


@pytest.mark.parametrize("fmt", CODECS)
def test_jit_and_eager_are_equal_and_files_are_exact(fmt, tmp_path):
    layer, inputs, outputs = made(layers.Dense, kp.get(f"{fmt}_from_float32"))
    model = keras.Sequential([keras.Input((37,)), layer])
    predicted = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(predicted, ops.convert_to_numpy(outputs), rtol=1e-5, atol=1e-6)  # sums in another order
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(inputs, verbose=0), predicted)
    assert loaded.layers[0].dtype_policy == layer.dtype_policy
    model.save_weights(tmp_path / "w.weights.h5")
    fresh, _, _ = made(layers.Dense, kp.get(f"{fmt}_from_float32"))
    other = keras.Sequential([keras.Input((37,)), fresh])
    for variable in fresh.variables:
        variable.assign(ops.zeros(variable.shape, variable.dtype))
    other.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_array_equal(other.predict(inputs, verbose=0), predicted)


@pytest.mark.parametrize("site", CASES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("fmt", ["nf4-dq", "int8"])
def test_batches_of_any_size(site, fmt):
    """`fit` and `predict` compile for a batch whose size is not known."""
    layer, inputs, outputs = made(site, kp.get(f"{fmt}_from_float32"))
    model = keras.Sequential([keras.Input(inputs.shape[1:], dtype=inputs.dtype.name), layer])
    odd = np.concatenate([inputs, inputs, inputs])[:3]
    expected = np.concatenate([ops.convert_to_numpy(outputs)] * 3)[:3]
    np.testing.assert_allclose(model.predict(odd, batch_size=2, verbose=0), expected, rtol=1e-4, atol=1e-4)
    trained = keras.Sequential([model, layers.Dense(1)])
    trained.compile("sgd", "mse")
    history = trained.fit(odd, np.ones((*expected.shape[:-1], 1)), batch_size=2, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("site", CASES, ids=lambda cls: cls.__name__)
def test_computes_in_the_source_policy(site):
    layer, _, outputs = made(site, "nf4_from_mixed_bfloat16")
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    (inner,) = quantized_inside(layer)
    assert all(v.dtype == "float32" for v in inner.trainable_variables)


def test_int8_with_mixed_float16_accumulates_in_float32():
    """D17: refused by stock Keras."""
    layer = layers.Dense(4, use_bias=False, kernel_initializer="ones", dtype=kp.get("int8_from_mixed_float16"))
    outputs = layer(np.full((1, 60000), 1.0, "float16"))
    np.testing.assert_allclose(ops.convert_to_numpy(outputs).astype("float32"), 60000, rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    initializer = keras.initializers.Constant(bad)
    with pytest.raises(ValueError, match="'head', weight 'kernel'"):
        layers.Dense(4, kernel_initializer=initializer, dtype="nf4_from_float32", name="head").build((None, 4))


def test_gradients_reach_inputs_and_lora_and_nothing_else():
    first = layers.Dense(8, dtype="nf4_from_float32")
    model = keras.Sequential([keras.Input((16,)), layers.Dense(16, name="before"), first])
    first.enable_lora(2)
    assert [v.name for v in first.trainable_variables] == ["lora_kernel_a", "lora_kernel_b"]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = {v.path: ops.convert_to_numpy(v).copy() for v in model.variables}
    x = np.random.default_rng(0).standard_normal((8, 16))
    model.fit(x, x[:, :8], epochs=2, verbose=0)
    counts = {v.path for v in model.metrics_variables}
    moved = {v.path for v in model.variables if not np.array_equal(before[v.path], ops.convert_to_numpy(v))}
    before = model.layers[0]
    assert moved - counts == {v.path for v in [*before.trainable_variables, *first.trainable_variables]}


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: layers.Dense(8, dtype="nf4_from_float32"), (None, 64)),
        (lambda: layers.EinsumDense("ab,bcd->acd", (4, 4), dtype="nf4_from_float32"), (None, 64)),
        (lambda: layers.Embedding(11, 64, dtype="nf4_from_float32"), (None, 3)),
    ],
)
def test_lora_is_the_sum_and_merges(make, shape, tmp_path):
    layer = make()
    is_table = isinstance(layer, layers.Embedding)
    model = keras.Sequential([keras.Input(shape[1:], dtype="int32" if is_table else "float32"), layer])
    draw = np.random.default_rng(0)
    x = draw.integers(0, 11, (5, 3)) if is_table else draw.standard_normal((5, 64)).astype("float32")
    base = model.predict(x, verbose=0)
    layer.enable_lora(2, lora_alpha=4)
    # As for Keras's own layers: on TensorFlow what was compiled before goes on without. kp.enable_lora compiles anew.
    model.make_predict_function(force=True)
    np.testing.assert_array_equal(model.predict(x, verbose=0), base)  # b starts at zero
    for variable in layer.trainable_variables:
        variable.assign(0.1 * draw.standard_normal(variable.shape))
    tuned = model.predict(x, verbose=0)
    # The class's own weight property adds the low-rank product to what is decoded.
    weight = layer.embeddings if is_table else layer.kernel
    equation = "abc,cd->abd" if is_table else layer.equation if isinstance(layer, layers.EinsumDense) else "ab,bc->ac"
    exact = ops.take(weight, x, axis=0) if is_table else ops.einsum(equation, x, weight)
    np.testing.assert_allclose(tuned, ops.convert_to_numpy(exact), rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras").predict(x, verbose=0), tuned)
    layer.merge_lora()
    assert not layer.trainable_variables or not any("lora" in v.name for v in layer.variables)
    merged = ops.convert_to_numpy(layer.embeddings if is_table else layer.kernel)
    assert np.abs(merged - ops.convert_to_numpy(weight)).max() <= 0.16 * np.abs(ops.convert_to_numpy(weight)).max()
    with pytest.raises(ValueError, match="no LoRA weights"):
        layer.merge_lora()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda store: store.pop("_kernel.scale"), r"Missing: \['_kernel.scale'\]"),
        (lambda store: store.update(other=np.zeros(1)), r"Not expected: \['other'\]"),
        (
            lambda store: store.update({"_kernel.codes": store["_kernel.codes"][:-1]}),
            r"'_kernel.codes' of \(32, 8\).*\(31, 8\)",
        ),
        (lambda store: store.update({"_kernel.codes": store["_kernel.codes"].astype("int8")}), "uint8.*int8"),
    ],
)
def test_files_of_other_layers_are_refused(change, message):
    layer = layers.Dense(8, dtype="nf4_from_float32", name="head")
    layer.build((None, 64))
    store = {}
    layer.save_own_variables(store)
    change(store)
    with pytest.raises(ValueError, match=f"'head'.*{message}"):
        layer.load_own_variables(store)


def test_a_custom_call_runs_on_the_decoded_weight():
    class Doubled(layers.Dense):
        def call(self, inputs):
            return 2 * ops.matmul(inputs, self.kernel)

    layer = Doubled(8, dtype="nf4_from_float32")
    x = np.eye(64, dtype="float32")
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), 2 * ops.convert_to_numpy(layer.kernel), rtol=1e-6)


def test_users_register_sites():
    class Table(layers.Layer):
        def build(self, input_shape):
            self.table = self.add_weight(shape=(input_shape[-1], 4), name="table")

        def call(self, inputs):
            return ops.matmul(inputs, self.table)

    try:
        kp.register_site(Table, "table", contracted=(0,))
        layer = Table(dtype="nf4_from_float32")
        assert layer(np.ones((2, 64), "float32")).shape == (2, 4)
        assert [v.name for v in layer.variables] == ["table_codes", "table_scale"]
        with pytest.raises(ValueError, match="site already"):
            kp.register_site(Table, "table", contracted=(0,))
    finally:
        SITES.pop(Table, None)
    assert sites_of_class(Table) is None
    with pytest.raises(ValueError, match="subclass of keras.Layer"):
        kp.register_site(object, "table", contracted=(0,))


def test_assigning_a_quantized_weight_says_what_to_do():
    layer = layers.Dense(8, dtype="nf4_from_float32")
    layer.build((None, 64))
    with pytest.raises(AttributeError, match="dequantize"):
        layer._kernel = 1.0

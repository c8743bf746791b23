"""The audit finds planted faults, has nothing to say of healthy models, and leaves models as they were."""

import json
import random

import keras
import numpy as np
import pytest
from keras import layers, ops
from sklearn.datasets import load_digits

import keras_precision as kp
from keras_precision import _bridge, _bridge_models
from keras_precision.report import measure, passes

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def digits():
    data = load_digits()
    return (data.images[..., None] / 16).astype("float32"), data.target.astype("int32")


def mlp():
    body = [layers.Flatten(), layers.Dense(64), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.2)]
    return keras.Sequential([keras.Input((8, 8, 1)), *body, layers.Dense(10)], name="mlp")


def transformer():
    inputs = keras.Input((8, 8, 1))
    x = layers.Dense(32)(layers.Reshape((8, 8))(inputs))
    normal = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 16, dropout=0.1)(normal, normal)])
    inner = layers.Dense(64, "gelu")(layers.LayerNormalization()(x))
    x = layers.Add()([x, layers.Dense(32)(inner)])
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)), name="transformer")


def small(**kwargs):
    return keras.Sequential(
        [keras.Input((8,)), layers.Dense(16, "relu", name="body"), layers.Dense(8, name="head", **kwargs)], name="net"
    )


def inputs(rows=16, width=8, scale=1.0):
    return (np.random.default_rng(0).normal(size=(rows, width)) * scale).astype("float32")


def found(report):
    return [(finding.kind, finding.layer, finding.tensor) for finding in report.findings]


def layer(report, name):
    return next(one for one in report.layers if one.path.split("/")[-1] == name)


@pytest.fixture(scope="module", params=[mlp, transformer])
def healthy(request):
    keras.utils.set_random_seed(0)
    x, y = digits()
    model = request.param()
    model.compile(keras.optimizers.Adam(3e-3), CROSSENTROPY)
    model.fit(x[:1024], y[:1024], batch_size=64, epochs=3, verbose=0)
    return model


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", None])
def test_a_healthy_model_has_no_findings(healthy, policy):
    x, y = digits()
    report = kp.audit(healthy, x, y, policy=policy)
    assert report.findings == ()
    is_16_bit = policy is not None
    assert (report.casts > 0) == is_16_bit
    assert any(one.sqnr_db is not None and one.sqnr_db > 25 for one in report.layers) == is_16_bit
    assert report.loss_scale == (1.0 if policy != "mixed_float16" else 2.0**15)
    lost = [one.tensors["weight_gradients"].underflow for one in report.layers if "weight_gradients" in one.tensors]
    assert lost and max(lost) < 1e-5


def test_an_overflowing_layer_is_found():
    model = small()
    model.get_layer("head").kernel.assign(np.full((16, 8), 1e4))
    report = kp.audit(model, np.ones((4, 8), "float32") * 100, policy="mixed_float16")
    assert found(report)[0] == ("overflow", "net/head", "activations")
    assert all(path == "net/head" for _, path, _ in found(report))
    stats = layer(report, "head").tensors["activations"]
    assert stats.largest > 65504
    assert 0 < stats.overflow <= 1
    assert stats.nonfinite == pytest.approx(stats.overflow)
    assert "ends at" in report.findings[0].message
    assert kp.audit(model, np.ones((4, 8), "float32") * 100, policy="mixed_bfloat16").findings == ()


def test_an_overflow_within_a_layer_is_found_where_it_starts():
    class Norm(layers.Layer):
        def call(self, inputs):
            squares = ops.sum(ops.square(inputs), axis=-1, keepdims=True)
            return inputs / ops.sqrt(squares)

    model = keras.Sequential([keras.Input((8,)), Norm(name="norm"), layers.Dense(8, name="head")], name="net")
    report = kp.audit(model, np.full((4, 8), 300, "float32"), policy="mixed_float16")
    # 8 * 300**2 is inf in float16, and x / inf is 0: nothing in the outputs tells but the error.
    assert ("low_sqnr", "net/norm", "activations") in found(report)

    class Softplus(layers.Layer):
        def call(self, inputs):
            return ops.log(ops.exp(inputs))

    model = keras.Sequential([keras.Input((8,)), Softplus(name="plus"), layers.Dense(8, name="head")], name="net")
    report = kp.audit(model, np.full((4, 8), 20, "float32"), policy="mixed_float16")
    assert found(report) == [("overflow", "net/plus", "activations")]
    assert "intermediate" in report.findings[0].message


def test_values_that_are_not_finite_in_float32_are_no_policys_fault():
    x = inputs()
    x[0, 0] = np.inf
    kinds = {kind for kind, _, _ in found(kp.audit(small(), x, policy="mixed_bfloat16"))}
    assert kinds == {"overflow"} or kinds == {"not_finite"}


class MakesFloat32Constants(layers.Layer):
    """Defect 20: upcasts on JAX, fails on TensorFlow."""

    def call(self, inputs):
        return inputs * ops.ones((inputs.shape[-1],))


class LeaksInside(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(8, name="inner")

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, inputs):
        return self.inner(ops.multiply(inputs, ops.ones((inputs.shape[-1],))))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_a_float32_constant_is_found(policy):
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8), MakesFloat32Constants(name="scale"), layers.Dense(8)], name="net"
    )
    report = kp.audit(model, inputs(), inputs(), loss="mse", policy=policy)
    assert found(report) == [("dtype_leak", "net/scale", "activations")]
    assert "self.compute_dtype" in report.findings[0].message


def test_a_leak_that_a_sublayer_hides_is_found():
    model = keras.Sequential([keras.Input((8,)), LeaksInside(name="block")], name="net")
    report = kp.audit(model, inputs(), policy="mixed_bfloat16")
    assert found(report) == [("dtype_leak", "net/block", "activations")]


def test_a_layer_given_float32_is_no_leak():
    model = small()
    policy = kp.DTypePolicyMap("mixed_bfloat16", {"body": "float32"})
    report = kp.audit(model, inputs(), policy=policy)
    assert report.findings == ()
    assert (layer(report, "body").compute_dtype, layer(report, "head").compute_dtype) == ("float32", "bfloat16")
    assert (layer(report, "body").sqnr_db, layer(report, "head").sqnr_db > 30) == (None, True)


def test_an_underflowing_gradient_is_found():
    model = small()
    model.compile(keras.optimizers.SGD(), "mse", auto_scale_loss=False)
    y = model.predict(inputs(), verbose=0) + 1e-6
    report = kp.audit(model, inputs(), y, policy=None)
    assert report.findings == ()  # float32 holds them
    kp.set_policy(model, "mixed_float16")
    model.compile(keras.optimizers.SGD(), "mse", auto_scale_loss=False)
    model.get_layer("head").bias.assign(np.full(8, 1e-4))  # the error, 1e-4 over 64 outputs of each row
    faulty = kp.audit(model, inputs(), y)
    assert faulty.loss_scale == 1.0
    kinds = {(kind, tensor) for kind, _, tensor in found(faulty)}
    assert ("underflow", "activation_gradients") in kinds
    assert "loss scale" in faulty.findings[0].message


def test_loss_scaling_mends_an_underflowing_gradient():
    model = small()
    y = model.predict(inputs(), verbose=0) + 1e-3
    model.compile("sgd", "mse")
    report = kp.audit(model, inputs(), y, policy="mixed_float16")
    assert (report.loss_scale, report.findings) == (2.0**15, ())
    assert "optimizer" in report.loss_scale_source


def test_the_loss_scale_comes_down_until_no_gradient_overflows():
    model = small()
    report = kp.audit(model, inputs(scale=30.0), inputs() * 100, loss="mse", policy="mixed_float16")
    assert report.loss_scale < 2.0**15
    assert "brought down" in report.loss_scale_source
    assert [f for f in report.findings if f.kind == "overflow"] == []


@pytest.mark.parametrize(
    ("policy", "size", "padded"),
    [("mixed_float16", 100, 104), ("mixed_bfloat16", 1001, 1008), ("int8_from_mixed_bfloat16", 104, 112)],
)
def test_an_unaligned_dimension_is_found(policy, size, padded):
    model = keras.Sequential([keras.Input((64,)), layers.Dense(size, name="wide")], name="net")
    report = kp.audit(model, inputs(width=64), policy=policy)
    assert found(report) == [("unaligned", "net/wide", "kernel")]
    assert str(padded) in report.findings[0].message
    assert layer(report, "wide").unaligned[0].size == size


def test_small_dimensions_are_listed_but_are_no_finding():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(10, name="head")], name="net")
    report = kp.audit(model, inputs(), policy="mixed_float16")
    assert report.findings == ()
    assert [d.size for d in layer(report, "head").unaligned] == [10]
    assert layer(kp.audit(model, inputs()), "head").unaligned == ()  # float32


def test_activations_and_gradients_are_those_of_a_slow_reference():
    model = small()
    model.get_layer("body").activation = keras.activations.linear
    x, y = inputs(rows=4), inputs(rows=4)
    report = kp.audit(model, x, y, loss="mse", policy="bfloat16")
    w1, b1, w2, b2 = (np.asarray(v, "float64") for v in map(ops.convert_to_numpy, model.weights))
    hidden = x.astype("float64") @ w1 + b1
    out = hidden @ w2 + b2
    d_out = 2 * (out - y) / out.size
    d_hidden = d_out @ w2.T
    expected = {
        ("body", "activations"): hidden,
        ("head", "activations"): out,
        ("head", "activation_gradients"): d_out,
        ("body", "activation_gradients"): d_hidden,
        ("head", "weight_gradients"): np.concatenate([(hidden.T @ d_out).ravel(), d_out.sum(0)]),
        ("body", "weight_gradients"): np.concatenate([(x.T @ d_hidden).ravel(), d_hidden.sum(0)]),
        ("body", "weights"): np.concatenate([w1.ravel(), b1]),
    }
    for (name, kind), values in expected.items():
        stats = layer(report, name).tensors[kind]
        # float32's rounding (2**-24 an operation, 16 terms) may move a value over a power of 2: rarely more than one.
        exponents = np.floor(np.log2(np.abs(values[values != 0]))).astype(int)
        counts = {int(e): int(n) for e, n in zip(*np.unique(exponents, return_counts=True), strict=True)}
        moved = sum(abs(counts.get(e, 0) - stats.histogram.get(e, 0)) for e in counts.keys() | stats.histogram.keys())
        assert moved <= 2, (name, kind)
        assert stats.elements == values.size
        assert stats.largest == pytest.approx(np.abs(values).max(), rel=1e-5)


def test_many_layers_that_are_alike_are_measured_as_few(monkeypatch):
    """On JAX these run op by op, and fewer ones as one program."""
    monkeypatch.setattr(passes, "_LAYERS_A_SHAPE", 8)
    body = [layers.Dense(8, name=f"dense_{place}") for place in range(12)]
    model = keras.Sequential([keras.Input((8,)), *body], name="net")
    report = kp.audit(model, inputs(), inputs(), loss="mse", policy="mixed_bfloat16")
    head = keras.Sequential([keras.Input((8,)), *body[:3]], name="net")
    few = kp.audit(head, inputs(), inputs(), loss="mse", policy="mixed_bfloat16")
    for kind in ("weights", "activations"):
        assert layer(report, "dense_2").tensors[kind] == layer(few, "dense_2").tensors[kind]
    assert layer(report, "dense_2").sqnr_db == pytest.approx(layer(few, "dense_2").sqnr_db, abs=0.5)
    assert set(layer(report, "dense_11").tensors) == set(measure.KINDS)


def test_sqnr_is_that_of_the_two_outputs():
    model = small()
    x = inputs()
    report = kp.audit(model, x, policy="bfloat16")
    plain = ops.convert_to_numpy(model(x)).astype("float64")
    kp.set_policy(model, "bfloat16")
    rounded = ops.convert_to_numpy(ops.cast(model(x), "float32")).astype("float64")
    expected = 10 * np.log10((plain**2).sum() / ((rounded - plain) ** 2).sum())
    assert layer(report, "head").sqnr_db == pytest.approx(expected, abs=0.5)


def state_of(model):
    names = _bridge_models.global_state.get_global_attribute("object_name_uids")
    optimizer = model.optimizer
    return {
        "weights": [ops.convert_to_numpy(v).tobytes() for v in model.variables],
        "policies": [id(one.dtype_policy) for one in _bridge.flatten_layers(model)],
        "classes": [type(one) for one in _bridge.flatten_layers(model)],
        "optimizer": (id(optimizer), [ops.convert_to_numpy(v).tobytes() for v in optimizer.variables]),
        "functions": (id(model.train_function), id(model.predict_function), id(model.history), id(model.loss)),
        "losses": [repr(value) for value in model.losses],
        "metrics": [ops.convert_to_numpy(v).tobytes() for v in model.metrics_variables],
        "names": dict(names),
        "random": (random.getstate(), np.random.get_state()[1].tobytes()),
        "seed": ops.convert_to_numpy(
            _bridge_models.global_state.get_global_attribute("global_seed_generator").state
        ).tobytes(),
        "policy": kp.global_policy(),
        "signatures": [v.trainable for v in model.variables],
    }


def compiled():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(8, activity_regularizer="l2"),
            layers.Dropout(0.5),
            layers.BatchNormalization(),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-3), "mse", metrics=["mae"])
    model.fit(inputs(), inputs(), verbose=0)
    keras.random.uniform((1,))  # the global generator of random numbers is there
    return model


@pytest.mark.parametrize("policy", [None, "mixed_float16", "nf4_from_mixed_bfloat16"])
def test_nothing_is_changed(policy):
    model = compiled()
    before = state_of(model)
    kp.audit(model, inputs(), inputs(), policy=policy)
    assert state_of(model) == before


@pytest.mark.parametrize("where", ["compare", "Reference", "judged_dtypes"])
def test_nothing_is_changed_by_an_audit_that_fails(monkeypatch, where):
    model = compiled()
    before = state_of(model)

    def fail(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(measure, where, fail)
    with pytest.raises(RuntimeError, match="planted"):
        kp.audit(model, inputs(), inputs(), policy="mixed_float16")
    assert state_of(model) == before


def test_training_goes_on_as_if_there_had_been_no_audit():
    histories = []
    for audits in (False, True):
        keras.utils.set_random_seed(3)
        model = compiled()
        if audits:
            kp.audit(model, inputs(), inputs(), policy="mixed_bfloat16")
        histories.append(model.fit(inputs(), inputs(), epochs=2, verbose=0).history["loss"])
    assert histories[0] == histories[1]


@keras.saving.register_keras_serializable("audit_test")
class Subclassed(keras.Model):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.body = layers.Dense(width, name="body")
        self.head = layers.Dense(8, name="head")

    def call(self, inputs):
        return self.head(self.body(self.body(inputs)))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


def test_subclassed_models_and_shared_layers():
    model = Subclassed(8, name="net")
    model(inputs())
    report = kp.audit(model, inputs(), inputs(), loss="mse", policy="mixed_bfloat16")
    assert {one.path for one in report.layers} == {"net", "net/body", "net/head"}
    assert layer(report, "body").tensors["activations"].elements == 2 * 16 * 8  # called twice
    assert layer(report, "body").tensors["weight_gradients"].elements == 8 * 8 + 8


def test_nested_models_and_several_inputs():
    inner = small()
    first, second = keras.Input((8,), name="first"), keras.Input((8,), name="second")
    model = keras.Model({"first": first, "second": second}, layers.Add()([inner(first), inner(second)]), name="outer")
    x = {"first": inputs(), "second": inputs()}
    report = kp.audit(model, x, inputs(), loss="mse", policy="mixed_bfloat16")
    assert layer(report, "head").tensors["activations"].elements == 2 * 16 * 8


def test_recurrent_layers():
    model = keras.Sequential(
        [keras.Input((5, 8)), layers.LSTM(4, dropout=0.5, name="lstm"), layers.Dense(1)], name="net"
    )
    x = inputs(width=40).reshape(16, 5, 8)
    report = kp.audit(model, x, np.ones((16, 1)), loss="mse", policy="mixed_bfloat16")
    assert report.findings == ()
    assert layer(report, "lstm").tensors["activations"].elements == 16 * 4


def test_quantized_models_and_policies():
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(64, name="body"), layers.Dense(16, name="head")], name="net"
    )
    x = inputs(width=64)
    kp_policy = kp.audit(model, x, policy=kp.DTypePolicyMap("mixed_bfloat16", {"body": "nf4"}))
    plain = kp.audit(model, x, policy="mixed_bfloat16")
    assert layer(kp_policy, "body").policy == "nf4_from_mixed_bfloat16"
    assert layer(kp_policy, "body").sqnr_db < layer(plain, "body").sqnr_db - 10
    assert kp_policy.memory.weights < plain.memory.weights
    kp.quantize(model, "int8_from_float32", verbose=0)
    assert kp.audit(model, x).memory.weights < plain.memory.weights / 3
    assert layer(kp.audit(model, x, policy="mixed_bfloat16"), "body").policy == "mixed_bfloat16"


@pytest.mark.parametrize("mode", ["float8", "float8/delayed"])
def test_float8_models_and_policies(mode):
    body, head = layers.Dense(64, name="body"), layers.Dense(4, name="head")
    model = keras.Sequential([keras.Input((64,)), body, head], name="net")
    policy = kp.QuantizedFloat8DTypePolicy(mode, "mixed_bfloat16", min_features=16)
    x, y = inputs(width=64), inputs(width=4)
    report, plain = (kp.audit(model, x, y, loss="mse", policy=p) for p in (policy, "mixed_bfloat16"))
    assert report.findings == ()
    assert [layer(report, name).policy for name in ("body", "head")] == [policy.name, "mixed_bfloat16"]  # 4 columns
    assert 20 < layer(report, "body").sqnr_db < layer(plain, "body").sqnr_db - 10
    kp.quantize(model, policy, verbose=0)
    own, again = (kp.audit(model, x, y, loss="mse", policy=p) for p in (None, policy))
    for name in ("body", "head"):
        assert layer(own, name) == layer(again, name) == layer(report, name)
    assert layer(kp.audit(model, x, y, loss="mse", policy="mixed_bfloat16"), "body") == layer(plain, "body")
    with pytest.raises(ValueError, match=r"min_features=2048\. Pass"):
        kp.audit(model, x, policy="float8_from_mixed_bfloat16")


def test_memory_of_weights_gradients_and_optimizer_is_what_they_take():
    model = small()
    model.compile("adam", "mse")
    parameters = 8 * 16 + 16 + 16 * 8 + 8
    report = kp.audit(model, inputs(), inputs(), policy="bfloat16")
    assert (report.memory.weights, report.memory.gradients) == (2 * parameters, 2 * parameters)
    assert 2 * 4 * parameters <= report.memory.optimizer < 2 * 4 * parameters + 64  # two float32 slots, and counters
    assert kp.audit(small(), inputs(), inputs(), loss="mse").memory.optimizer == 0


def test_memory_of_activations_is_what_the_backward_pass_needs(backend):
    model = keras.Sequential([keras.Input((256,)), *(layers.Dense(256, "relu") for _ in range(4))])
    x = np.ones((1024, 256), "float32")
    report = kp.audit(model, x, x, loss="mse", batch_size=None)
    # The outputs of four products, each kept for its ReLU's and the next product's gradient, and one or two gradients.
    one = 1024 * 256 * 4
    assert 5 * one <= report.memory.activations <= 10 * one
    halved = kp.audit(model, x, x, loss="mse", batch_size=512).memory
    assert halved.activations == pytest.approx(report.memory.activations / 2, rel=0.1)
    assert halved.weights == report.memory.weights


def test_casts_are_counted_by_layer():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, use_bias=False, name="head")], name="net")
    one = layer(kp.audit(model, inputs(rows=4), policy="mixed_bfloat16"), "head")
    # The kernel, 64 values from 4 bytes to 2, and the inputs, 32 values, here or in the model around.
    assert one.casts in (1, 2)
    assert one.cast_bytes in (64 * 6, 64 * 6 + 32 * 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": inputs(), "y": inputs()}, "Expected a loss for y"),
        ({"x": inputs(), "loss": "mse"}, "Expected y"),
        ({"x": inputs(), "y": inputs(rows=3), "loss": "mse"}, "as many rows"),
        ({"x": inputs(rows=0)}, "1 or more"),
        ({"x": 3.0}, "Expected arrays"),
        ({"x": inputs(), "batch_size": 0}, "batch_size >= 1"),
        ({"x": inputs(), "policy": "mixed_flaot16"}, "mixed_float16"),
    ],
)
def test_wrong_input_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        kp.audit(small(), **arguments)


def test_models_that_cannot_be_audited_are_told():
    with pytest.raises(TypeError, match=r"Expected a keras\.Model"):
        kp.audit(layers.Dense(2), inputs())
    with pytest.raises(ValueError, match="not built"):
        kp.audit(keras.Sequential([layers.Dense(2)]), inputs())

    class NoConfig(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, inputs):
            return self.inner(inputs)

        def get_config(self):
            raise NotImplementedError("no config")

    model = NoConfig(layers.Dense(2))
    model(inputs())
    with pytest.raises(ValueError, match="get_config"):
        kp.audit(model, inputs())


def test_progress_is_shown_on_terminals(capsys, monkeypatch):
    kp.audit(small(), inputs(), policy="mixed_bfloat16")
    assert capsys.readouterr().err == ""  # no progress bar in a pipe
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal then
    kp.audit(small(), inputs(), policy="mixed_bfloat16", verbose=0)
    assert capsys.readouterr().err == ""
    kp.audit(small(), inputs(), policy="mixed_bfloat16")
    assert "3/3" in capsys.readouterr().err


def test_to_dict_is_json():
    report = kp.audit(small(), inputs(), inputs(), loss="mse", policy="mixed_float16")
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["casts"] == report.casts > 0
    assert [one["path"] for one in data["layers"]] == [one.path for one in report.layers]
    histogram = data["layers"][1]["tensors"]["weights"]["histogram"]
    assert sum(histogram.values()) == 8 * 16  # the bias is 0


def test_it_prints_as_a_table():
    report = kp.audit(small(), inputs(), policy="mixed_float16")
    for text in ("net/body", "float16", "SQNR", "Nothing found"):
        assert text in str(report)
    assert repr(report).startswith("<Audit of 'net' under mixed_float16")

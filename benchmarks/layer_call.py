"""Time of eager layer calls against stock Keras."""

import timing

CALLS = 10
POLICIES = ("float32", "mixed_bfloat16")


def cases(side: timing.Side) -> dict[str, timing.Case]:
    """Returns four layers, built under each policy, on inputs so small that Python takes most of the time."""
    import keras

    set_global_policy = keras.config.set_dtype_policy
    if side == "ours":
        import keras_precision

        set_global_policy = keras_precision.set_global_policy
    layers = keras.layers
    inputs = keras.ops.ones((2, 4, 8))
    found = {}
    for policy in POLICIES:
        set_global_policy(policy)
        for layer, arguments in (
            (layers.Dense(8), (inputs,)),
            (layers.LayerNormalization(), (inputs,)),
            (layers.Dropout(0.1), (inputs,)),
            (layers.MultiHeadAttention(2, 4), (inputs, inputs)),
        ):
            layer(*arguments)
            found[f"{type(layer).__name__}, {policy}"] = _repeated(layer, arguments)
    return found


def _repeated(layer, arguments):
    from keras import ops

    def run():
        for _ in range(CALLS):
            outputs = layer(*arguments)
        ops.convert_to_numpy(outputs)  # JAX answers before it has computed

    return timing.Case(run, CALLS)


if __name__ == "__main__":
    timing.run(__file__, "Eager layer calls", cases, timing.Goal(timing.RATIO, 1.03), pairs=5, samples=40)

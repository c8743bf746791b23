"""Time to resolve a model of 2,000 layers against 200 rules."""

import contextlib
import itertools
import re

import timing

STAGES, BLOCKS = 40, 10
LEAVES = ("query", "key", "value", "norm", "output")
LAYERS = STAGES * BLOCKS * len(LEAVES)
RULES = 200

# Keras's own map takes regexes only, and no two may match one path: a rule for each kind of leaf in each stage.
REGEXES = [rf"tower/stage_{stage}/block_\d+/{leaf}" for stage in range(STAGES) for leaf in LEAVES]


def rules_of_all_kinds() -> list:
    """Returns rules of which paths come first, so that most layers are tried on the rest."""
    from keras import layers

    stages = range(STAGES)
    classes = (
        *(layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.EinsumDense, layers.Embedding, layers.LSTM, layers.GRU),
        *(layers.MultiHeadAttention, layers.GroupQueryAttention, layers.BatchNormalization, layers.GroupNormalization),
        *(layers.SpectralNormalization, layers.Softmax, layers.Dropout, layers.GaussianNoise, layers.Rescaling),
        *(layers.Normalization, layers.AveragePooling2D, layers.UnitNormalization, layers.LayerNormalization),
    )
    return [
        *(f"tower/stage_{stage}/block_{stage % BLOCKS}/query" for stage in stages),
        *(f"stage_{stage}/block_0/norm" for stage in stages),
        *(f"tower/stage_{stage}/*/key" for stage in stages[::2]),
        *(f"stage_{stage}/**/output" for stage in stages[::2]),
        *(rf"tower/stage_{stage}/block_[0-4]/value" for stage in stages),
        *(rf".*/stage_{stage}/block_\d/(key|value)" for stage in stages[1::2]),
        *classes,
    ]


def cases(side: timing.Side) -> dict[str, timing.Case]:
    """Returns the rules that both maps can hold, and rules of all kinds, for which Keras's map gets the former."""
    import keras

    layers = tower()
    if side == "ours":
        import keras_precision

        map_class, mixed = keras_precision.DTypePolicyMap, rules_of_all_kinds()

        def resolve_all(policy_map):
            for layer in layers:
                policy_map.resolve(layer)
    else:
        map_class, mixed = keras.dtype_policies.DTypePolicyMap, REGEXES
        paths = [layer.path for layer in layers]

        def resolve_all(policy_map):
            for path in paths:
                policy_map[path]

    assert len(layers) == LAYERS and len(REGEXES) == len(mixed) == RULES

    def make(keys):
        return map_class("mixed_bfloat16", dict.fromkeys(keys, "float32"))

    def fresh(keys):
        re.purge()  # a first map's regexes are not compiled yet
        return (make(keys),)

    return {
        f"{RULES} regexes": timing.Case(resolve_all, prepare=lambda: fresh(REGEXES)),
        f"{RULES} rules of all kinds": timing.Case(resolve_all, prepare=lambda: fresh(mixed)),
        "the same, and making the map": timing.Case(lambda keys: resolve_all(*fresh(keys)), prepare=lambda: (mixed,)),
    }


def tower() -> list:
    """Returns built layers whose paths are `tower/stage_3/block_7/query`."""
    import keras

    layers = []
    for stage, block, leaf in itertools.product(range(STAGES), range(BLOCKS), LEAVES):
        with contextlib.ExitStack() as scopes:
            for part in ("tower", f"stage_{stage}", f"block_{block}"):
                scopes.enter_context(keras.name_scope(part))
            layer = keras.layers.LayerNormalization(name=leaf) if leaf == "norm" else keras.layers.Dense(1, name=leaf)
            layer.build((None, 1))
        layers.append(layer)
    return layers


if __name__ == "__main__":
    title = f"Resolving {LAYERS:,} layers against {RULES} rules"
    timing.run(__file__, title, cases, timing.Goal(timing.OURS, 0.100), pairs=3, samples=7)

"""Time of `get("mixed_bfloat16")` against Keras's."""

import timing

CALLS = 5_000
NAME = "mixed_bfloat16"


def cases(side: timing.Side) -> dict[str, timing.Case]:
    """Returns the call of each side's own `get`."""
    import keras

    get = keras.dtype_policies.get
    if side == "ours":
        import keras_precision

        get = keras_precision.get

    def run():
        for _ in range(CALLS):
            get(NAME)

    return {f'get("{NAME}")': timing.Case(run, CALLS)}


if __name__ == "__main__":
    timing.run(__file__, "Policy by name", cases, timing.Goal(timing.RATIO, 1.0), pairs=5, samples=20)

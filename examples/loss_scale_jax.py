"""Trains a float16 network in a hand-written JAX loop under jit, the loss scale being part of its state."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

from keras_precision.scaling import DynamicLossScale, found_inf

LOSS_SCALE = DynamicLossScale(initial_scale=2.0**24, growth_interval=100)
LEARNING_RATE = 0.1


def loss_of(weights, x, y):
    """Returns the mean squared error of a two-layer network computed in float16."""
    hidden = jax.nn.relu(x.astype("float16") @ weights["hidden"].astype("float16"))
    prediction = hidden @ weights["output"].astype("float16")
    return jnp.mean(jnp.square(prediction[:, 0].astype("float32") - y))


@jax.jit
def step(weights, scale_state, x, y):
    """Returns weights, the scale's state and the loss after one step of gradient descent."""

    def scaled_loss(weights):
        loss = loss_of(weights, x, y)
        return LOSS_SCALE.scale(scale_state, loss), loss

    gradients, loss = jax.grad(scaled_loss, has_aux=True)(weights)
    overflowed = found_inf(gradients)
    gradients = LOSS_SCALE.unscale(scale_state, gradients)
    stepped = jax.tree.map(lambda w, g: w - LEARNING_RATE * g, weights, gradients)
    weights = jax.tree.map(lambda new, old: jnp.where(overflowed, old, new), stepped, weights)
    return weights, LOSS_SCALE.update(scale_state, overflowed), loss


def main() -> tuple[float, float, int]:
    """Prints the loss as it falls; returns the first and last loss and the number of skipped steps."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 8)).astype("float32")
    y = np.sin(x[:, 0]) + x[:, 1]
    weights = {
        "hidden": jnp.asarray(rng.standard_normal((8, 32)) / 8**0.5, "float32"),
        "output": jnp.asarray(rng.standard_normal((32, 1)) / 32**0.5, "float32"),
    }
    scale_state = LOSS_SCALE.init()
    losses = []
    for i in range(200):
        weights, scale_state, loss = step(weights, scale_state, x, y)
        losses.append(float(loss))
        if i % 50 == 0 or i == 199:
            print(f"step {i:3d}  loss {losses[-1]:.4f}  scale {float(scale_state.scale):g}")
    skipped = int(scale_state.skipped_steps)
    print(f"{skipped} steps were skipped while the scale came down from {LOSS_SCALE.initial_scale:g}")
    return losses[0], losses[-1], skipped


if __name__ == "__main__":
    main()

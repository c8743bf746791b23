"""Trains a float16 network in a TensorFlow GradientTape loop, with a Keras optimizer and the loss scale around it."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf

from keras_precision.scaling import LossScaleOptimizer


def main() -> tuple[float, float, int]:
    """Prints the loss as it falls; returns the first and last loss and the number of skipped steps."""
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    x = rng.standard_normal((256, 8)).astype("float32")
    y = np.sin(x[:, 0]) + x[:, 1]
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(32, "relu", dtype="mixed_float16"),
            keras.layers.Dense(1, dtype="mixed_float16"),
        ]
    )
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**24, dynamic_growth_steps=100)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            prediction = model(x, training=True)
            loss = tf.reduce_mean(tf.square(tf.cast(prediction[:, 0], "float32") - y))
            scaled_loss = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    losses = []
    for i in range(200):
        losses.append(float(step(x, y)))
        if i % 50 == 0 or i == 199:
            print(f"step {i:3d}  loss {losses[-1]:.4f}  scale {optimizer.get_scale():g}")
    skipped = int(optimizer.skipped_steps)
    print(f"{skipped} steps were skipped while the scale came down from {optimizer.initial_scale:g}")
    return losses[0], losses[-1], skipped


if __name__ == "__main__":
    main()

"""Makes the replicas of a tf.distribute strategy decide alike."""

import keras
from keras import ops


def run_update(optimizer, flags, step, grads, variables) -> None:
    """Calls `step(flags, update)`, once for all replicas.

    Args:
        optimizer: the wrapper; `update` applies gradients with its inner optimizer.
        flags: bool (n,) tensor, which gradients of this replica are not finite.
            What `step` gets is true where any replica's is: Keras sums
            gradients over the replicas only inside the inner optimizer.
        step: skips or calls `update`.
        grads: list of this replica's gradients, unscaled.
        variables: list of the weights.
    """
    inner = optimizer.inner_optimizer
    if keras.backend.backend() != "tensorflow":
        step(flags, lambda: inner.apply(grads, variables))
        return
    import tensorflow as tf

    if tf.distribute.in_cross_replica_context():
        raise ValueError("Expected a call in a replica. Received one outside: call apply inside strategy.run(...).")
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync > 1:
        flags = ops.greater(replica.all_reduce("SUM", ops.cast(flags, "float32")), 0)
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        step(flags, lambda: inner.apply(grads, variables))
        return

    # tf.cond around a merge_call, which the inner optimizer makes, is allowed only where there are no replicas.
    def for_all(strategy, flags, grads, variables):
        flags = strategy.experimental_local_results(flags)[0]
        step(flags, lambda: strategy.extended.call_for_each_replica(inner.apply, args=(grads, variables)))

    replica.merge_call(for_all, args=(flags, grads, variables))

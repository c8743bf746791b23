"""What the bridge asks of the rest of the package."""

from keras_precision._bridge_training import release
from keras_precision.attach import wrapped_for
from keras_precision.hooks import Hooks
from keras_precision.layers.after_build import after_build
from keras_precision.layers.convert import report_unmatched_of, takes_policy
from keras_precision.layers.float32_inside import compute_in_float32, in_float32
from keras_precision.layers.saving import loading, saved_dtype
from keras_precision.optimizers.slot_files import reads_packed
from keras_precision.policies import registry, resolve, scope
from keras_precision.policies.resolve import keras_quantization_mode
from keras_precision.scaling.monitor import monitored


def _before_compile(model, optimizer, auto_scale_loss):
    report_unmatched_of(model)
    return wrapped_for(model, optimizer, auto_scale_loss)


hooks = Hooks(
    policy_for=registry.for_keras,
    current_policy=scope.current,
    replace_policy=scope.replace,
    resolve=resolve,
    takes_policy=takes_policy,
    quantization_mode=keras_quantization_mode,
    after_build=after_build,
    saved_dtype=saved_dtype,
    loading=loading,
    in_float32=in_float32,
    compute_in_float32=compute_in_float32,
    before_compile=_before_compile,
    reads_packed=reads_packed,
    fit_callbacks=monitored,
    after_fit=release,
)

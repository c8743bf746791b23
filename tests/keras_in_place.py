"""Pytest plugin that puts our policy classes in place of Keras's in the names of Keras's own policy tests."""

import types

import keras.src.dtype_policies

import keras_precision

# Private names of Keras that the tests also use stay as they are.
REPLACEMENTS = {
    name: getattr(keras_precision, name)
    for name in (
        "DTypePolicy",
        "DTypePolicyMap",
        "FloatDTypePolicy",
        "QuantizedDTypePolicy",
        "QuantizedFloat8DTypePolicy",
        "deserialize",
        "dtype_policy",
        "get",
        "serialize",
        "set_dtype_policy",
    )
}


class _DTypePolicies(types.ModuleType):
    """Stands for the module `keras.src.dtype_policies`, whose other names stay Keras's."""

    def __getattr__(self, name):
        return getattr(keras.src.dtype_policies, name)


_dtype_policies = _DTypePolicies("dtype_policies")
vars(_dtype_policies).update(REPLACEMENTS)


def pytest_collection_modifyitems(items):
    ours = {**REPLACEMENTS, "dtype_policies": _dtype_policies}
    for module in {item.module for item in items}:
        vars(module).update({name: ours[name] for name in ours.keys() & vars(module).keys()})

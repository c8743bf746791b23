"""The `keras-precision` command: it chooses Keras's backend, which has to happen before anything imports Keras."""

from __future__ import annotations

import os
import sys

BACKENDS = ("jax", "tensorflow")
_KERAS_BACKENDS = (*BACKENDS, "torch", "numpy", "openvino")
# The modules whose absence means "this backend is not installed", rather than a defect.
_BACKEND_MODULES = ("jax", "jaxlib", "tensorflow", "torch")


def main() -> None:
    """Runs the command line on the backend that `--backend` or KERAS_BACKEND names."""
    requested = requested_backend(sys.argv[1:])
    if requested in BACKENDS:
        os.environ["KERAS_BACKEND"] = requested
    chosen = os.environ.get("KERAS_BACKEND")
    if chosen and chosen not in _KERAS_BACKENDS:
        sys.exit(_bad_input(f"Expected KERAS_BACKEND to be one of {_KERAS_BACKENDS}. Received: {chosen!r}."))
    # TensorFlow writes start-up notices of its C++ libraries to stderr; errors still come through.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        from keras_precision.cli import main as command_line
    except ModuleNotFoundError as error:
        if error.name not in _BACKEND_MODULES:
            raise
        source = f"KERAS_BACKEND={chosen}" if chosen else "no KERAS_BACKEND, so Keras's default"
        extras = " or ".join(f"'keras-precision[{backend}]'" for backend in BACKENDS)
        sys.exit(
            _bad_input(
                f"Expected an installed Keras backend. Received: {source}, which needs {error.name!r}. "
                f"Run pip install {extras}, or pass --backend with one that is installed."
            )
        )
    command_line(prog_name="keras-precision")


def requested_backend(arguments: list[str]) -> str | None:
    """Returns the value of `--backend` among the options before the command, None without one.

    >>> requested_backend(["--backend", "jax", "doctor"])
    'jax'
    >>> requested_backend(["--backend=tensorflow", "demo"])
    'tensorflow'
    >>> requested_backend(["doctor", "--json"]) is None
    True
    """
    for position, argument in enumerate(arguments):
        if not argument.startswith("-"):
            break
        option, equals, value = argument.partition("=")
        if option == "--backend":
            return value if equals else "".join(arguments[position + 1 : position + 2])
    return None


def _bad_input(message: str) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()

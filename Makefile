# Needs Python 3.11 or newer and a package registry; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Four workers: a worker starts in about 10 s and holds 1 GB, so more of them cost more than they save.
# Each gets tests that stand together, and so share fixtures, and takes over others' when it has none left.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-jax test-jax-fast test-jax-default-xla test-tensorflow keras-tests bench clean

help:
	@echo "make demo   train a small network under six policies and compare them (about 2 minutes)"
	@echo "make test   run the suite on JAX and on TensorFlow, then Keras's own"
	@echo "make bench  run every script of benchmarks/"
	@echo "make clean  remove .venv, caches and what the demo wrote"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp a set of extras: installed again only when pyproject.toml changes.
$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

# keras-hub asks for the whole of TensorFlow, which its backbones don't use; the rest of what it asks for is in `test`.
$(VENV)/keras-hub: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps keras-hub
	@touch $@

demo: $(VENV)/installed-demo
	KERAS_BACKEND=jax $(BIN)/keras-precision demo

test: test-jax test-tensorflow keras-tests

# What looks at the programs that XLA makes gets them as users do; JAX compiles all others in less time.
test-jax: test-jax-fast test-jax-default-xla

test-jax-fast: $(VENV)/keras-hub
	KERAS_BACKEND=jax $(PYTEST) -m "not default_xla"

test-jax-default-xla: $(VENV)/keras-hub
	KERAS_BACKEND=jax XLA_FLAGS= $(PYTEST) -m default_xla

test-tensorflow: $(VENV)/keras-hub
	KERAS_BACKEND=tensorflow $(PYTEST)

keras-tests: $(VENV)/installed-test
	$(BIN)/python tests/keras_suite.py

bench: $(VENV)/installed-test
	@for script in $(filter-out benchmarks/timing.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(BIN)/python $$script || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis keras-precision-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

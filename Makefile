# make demo   the whole path of Code Llama on this machine's CPU, in minutes
# make test   the tests
PYTHON ?= python3
BIN := .venv/bin
# Tests compile for TPUs. The compiler lies apart: where it is installed JAX looks for a TPU, for long
COMPILER := $(CURDIR)/.venv/tpu-compiler
PYTEST := PYTHONPATH=$(COMPILER) $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-fast venv lint lock clean

demo: .venv/installed
	$(BIN)/python recipes/nano.py

test: .venv/installed-test
	$(PYTEST)

test-fast: .venv/installed-test
	$(PYTEST) -m "not slow"

venv: .venv/installed-test

lint: .venv/installed-test
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

.venv/installed: constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.12 demo")'
	@# pip's script is the last that venv writes: where it does not run, the rest may be half there
	$(BIN)/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) -e .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) -e '.[test]'
	$(PIP) --no-deps --upgrade --target $(COMPILER) \
	  'libtpu; sys_platform == "linux" and platform_machine == "x86_64"'
	touch $@

# needs uv; writes versions for every Python that setup.cfg allows
lock:
	uv pip compile pyproject.toml --extra test --extra aot --universal --python-version 3.11 \
	  --fork-strategy requires-python --no-annotate --no-header --output-file constraints.txt

clean:
	rm -rf .venv runs

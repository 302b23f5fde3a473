# make demo: the whole story. make test: all tests and checks. make test-fast: the inner loop. make docs: the pages, in site/.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint docs clean

demo: .venv/ready
	$(BIN)/looptransfer demo

test: .venv/ready lint
	$(BIN)/python -m pytest -n auto

test-fast: .venv/ready
	$(BIN)/python -m pytest -n auto -q -m "not slow"

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Where the lock's torch is a CUDA build, it needs its own libraries, which --no-deps leaves out: the third line fetches them.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv dist demo site

# Everything a newcomer needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV   := .venv
OLDEST := .venv-oldest
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# OpenMP's threads else wait for each other by spinning: ruinous where another process holds a core.
export GOMP_SPINCOUNT ?= 10000

# A process takes up to a gigabyte.
WORKERS := -n auto --maxprocesses 4

# The versions that the wheel is tried with.
CONSTRAINTS := constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest test-gpu lint format bench docs docs-serve architecture wheel clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv with the pinned versions and this checkout

$(READY): constraints.txt
$(OLDEST)/.ready: constraints-oldest.txt

$(READY) $(OLDEST)/.ready: %/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "resolvent needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(filter constraints%,$^) torch
	$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(filter constraints%,$^) --editable '.[dev]'
	@touch $@

demo: setup  ## train a small model on the default corpus, compare it with a 3-gram model, write some text
	$(BIN)/python examples/demo.py

test: setup  ## run the tests (CPU, under ten minutes on two cores)
	$(BIN)/python -m pytest $(WORKERS)

test-all: setup  ## run the slow tests too
	$(BIN)/python -m pytest -m 'not gpu' $(WORKERS)

test-oldest: $(OLDEST)/.ready  ## run the tests with the oldest versions, in an environment of their own
	$(OLDEST)/bin/python -m pytest $(WORKERS)

test-gpu:  ## run the CUDA tests, in the current environment
	$(PYTHON) -m pytest -m gpu

lint: setup  ## ruff, the type checker, the import contract, the spelling and the prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/python scripts/check_prose.py

format: setup  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## measure speed and memory on the CPU beside a Transformer of the same size
	$(BIN)/resolvent benchmark --device cpu

build/.docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@mkdir -p build && touch $@

docs: build/.docs  ## build the documentation into build/site, which opens from disk
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html in a browser"

docs-serve: build/.docs  ## show the documentation at http://127.0.0.1:8000, rebuilt as files change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

architecture: setup  ## draw the packages and their imports anew, for docs/architecture.md
	$(BIN)/python scripts/draw_architecture.py docs/images/architecture.svg

wheel:  ## build the wheel into dist and try it with nothing but its dependencies, in an environment of their own
	rm -rf build dist
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) dist/*.whl
	$(PYTHON) scripts/try_command.py build/wheel/bin/resolvent

clean:  ## remove the environments, runs and caches
	rm -rf $(VENV) $(OLDEST) runs .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist src/*.egg-info

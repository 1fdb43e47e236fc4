# hierens: `make demo` and `make test` need Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETTINGS := OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1
RUN := $(SETTINGS) $(BIN)/python

comma := ,
LOWEST := .venv-lowest
FAST_TESTS := tree predictions objectives branching calibration policies metrics uncertainty labels modes reading files
LOWEST_TESTS := package tree cutting branching ensemble exits adaptive modes objectives predictions fuse hub policies

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow test-lowest upgrade lint format types docs docs-serve bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# $(call install,folder,what uv shall install there)
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "hierens needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(1)/bin/uv pip install --quiet --compile-bytecode --python $(1)/bin/python $(2)
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),--constraint constraints.txt --editable ".[all]")

$(LOWEST)/.installed: pyproject.toml
	$(call install,$(LOWEST),--resolution lowest-direct --editable ".[train$(comma)demo$(comma)dev]")

demo: $(VENV)/.installed ## train a small ensemble on photographs of clothes, on a CPU, in a minute or two
	$(BIN)/hierens demo

test: $(VENV)/.installed ## run the tests
	$(RUN) -m pytest --numprocesses 2 --sample

test-fast: $(VENV)/.installed ## run the tests of the core alone, while you work
	$(RUN) -m pytest --numprocesses 2 $(FAST_TESTS:%=tests/test_%.py)

test-slow: $(VENV)/.installed ## run the long tests too
	$(RUN) -m pytest --numprocesses 2 -m "slow or not slow"

test-lowest: $(LOWEST)/.installed ## run the core tests with the lowest versions that pyproject.toml allows (Python 3.11)
	$(SETTINGS) $(LOWEST)/bin/python -m pytest --numprocesses 2 $(LOWEST_TESTS:%=tests/test_%.py) tests/cli/test_training.py

upgrade: $(VENV)/.installed ## take the newest versions of everything, into constraints.txt once the tests pass with them
	$(BIN)/uv pip compile --quiet --universal --upgrade --extra all --no-header --no-annotate pyproject.toml \
		--output-file $(VENV)/constraints.txt
	rm $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint $(VENV)/constraints.txt --upgrade --editable ".[all]"
	$(RUN) -m pytest --numprocesses 2
	mv $(VENV)/constraints.txt constraints.txt
	@touch $(VENV)/.installed

lint: $(VENV)/.installed ## check style, which way imports run, and the Dockerfile
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/hadolint examples/Dockerfile

format: $(VENV)/.installed ## put style right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.installed ## check types, strictly
	$(BIN)/mypy

docs: $(VENV)/.installed ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed ## show the documentation while writing it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: $(VENV)/.installed ## train on Fashion-MNIST and write docs/results/fashion_mnist.md: DATA=folder of the idx files
	$(BIN)/python benchmarks/fashion_mnist.py --data-dir $(DATA)

clean: ## remove the environment and what runs and builds left
	rm -rf $(VENV) $(LOWEST) runs site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

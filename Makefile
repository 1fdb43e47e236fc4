# hierens: `make demo` and `make test` need Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1 $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-lowest upgrade lint format types docs docs-serve bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "hierens needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[all]"
	@touch $@

demo: $(VENV)/.installed ## train a small ensemble on scikit-learn's digits, on a CPU, in about a minute
	$(BIN)/python examples/train_imagenet.py

test: $(VENV)/.installed ## run the tests
	$(RUN) -m pytest --numprocesses 2

test-slow: $(VENV)/.installed ## run the long tests too
	$(RUN) -m pytest --numprocesses 2 -m "slow or not slow"

# What trees, exits, objectives, inference, saving and training are; the programs around them need newer packages.
CORE := $(addprefix tests/,$(addsuffix .py,test_tree test_cutting test_branching test_ensemble test_exits test_objectives \
	test_fusing test_hub test_policies test_calibration test_metrics training/test_trainer training/test_checkpoint))
LOWEST := .venv-lowest

test-lowest: ## run the core tests with the lowest versions that pyproject.toml allows, in an environment of their own
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable ".[train,demo,dev]"
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest --numprocesses 2 $(CORE)

upgrade: $(VENV)/.installed ## install the newest versions, run the tests with them, and write them into constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --upgrade --editable ".[all]"
	$(RUN) -m pytest --numprocesses 2
	{ head -n 1 constraints.txt; $(BIN)/uv pip freeze --quiet --python $(BIN)/python --exclude-editable; } > constraints.new
	mv constraints.new constraints.txt
	@touch $(VENV)/.installed

lint: $(VENV)/.installed ## check style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed ## put style right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.installed ## check types, strictly
	$(BIN)/mypy

docs: $(VENV)/.installed ## build the documentation into site/
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed ## show the documentation while writing it
	$(BIN)/mkdocs serve

bench: $(VENV)/.installed ## train on Fashion-MNIST and write docs/results/fashion_mnist.md: DATA=folder of the idx files
	$(BIN)/python benchmarks/fashion_mnist.py --data-dir $(DATA)

clean: ## remove the environment and what runs and builds left
	rm -rf $(VENV) $(LOWEST) runs site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Each target sets up what it needs. Only make and a Python >= 3.11 must be there: `make PYTHON=python3.12 …` names another.

PYTHON ?= python3
PROMPT ?= What is the capital of France?
VENV := .venv
BIN := $(VENV)/bin
FIXTURES_VENV := .venv-fixtures

.DEFAULT_GOAL := help
.PHONY: help run test check lint types bench fixtures clean

help:  ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Error: Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo 'installing into $(VENV), once'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo 'installing into $(VENV), once'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed

run: $(VENV)/.installed  ## Ask the default model a question: make run PROMPT="Why is the sky blue?"
	@$(BIN)/ollama-mlx-runner try "$${PROMPT}"

test: $(VENV)/.installed-dev  ## Run the tests
	$(BIN)/pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types  ## What CI runs: lint, import contracts, types, tests with coverage
	$(BIN)/pytest --cov --cov-report=term-missing:skip-covered

bench: $(VENV)/.installed-dev  ## Measure beside others, into bench-results/: make bench BENCH="--rounds 5"
	$(BIN)/python -m tests.bench $(BENCH)

$(FIXTURES_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(FIXTURES_VENV)
	$(FIXTURES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable . torch transformers
	@touch $@

fixtures: $(FIXTURES_VENV)/.installed  ## Make the tiny checkpoints and their reference outputs anew
	@set -e; for script in tests/parity/make_*.py; do echo "$$script"; $(FIXTURES_VENV)/bin/python "$$script"; done

clean:  ## Remove everything that the other targets made here
	rm -rf $(VENV) $(FIXTURES_VENV) bench-results build dist *.egg-info .coverage .coverage.* htmlcov
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find runner models protocol tests -name __pycache__ -type d -prune -exec rm -rf {} +

export PROMPT

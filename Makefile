# Each target sets up what it needs. Only make and a Python >= 3.11 must be there: `make PYTHON=python3.12 …` names another.

PYTHON ?= python3
PROMPT ?= What is the capital of France?
VENV := .venv
BIN := $(VENV)/bin
FIXTURES_VENV := .venv-fixtures

.DEFAULT_GOAL := help
.PHONY: help run test check lint types bench fixtures clean ollama ollama-serve test-ollama

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

# The last Ollama with image models, and the newest; a version's .mod file (go.mod for the newest) pins it.
OLLAMA_OLD := v0.32.5
OLLAMA_NEW := v0.34.4
OLLAMA_VERSION ?= $(OLLAMA_NEW)
OLLAMA := tests/ollama
OLLAMA_STORE ?= $(OLLAMA)/bin/models
OLLAMA_HOST ?= 127.0.0.1:11435

ollama: $(OLLAMA)/bin/ollama-$(OLLAMA_OLD) $(OLLAMA)/bin/ollama-$(OLLAMA_NEW)  ## Build Ollama with this runner in it (needs Go and a C compiler)

$(OLLAMA)/bin/ollama-$(OLLAMA_OLD): MODFILE := -modfile=$(OLLAMA_OLD).mod
$(OLLAMA)/bin/ollama-%: $(wildcard $(OLLAMA)/*.go $(OLLAMA)/*.mod)
	@command -v go >/dev/null || { echo 'Error: Go is needed to build Ollama; see https://go.dev/dl' >&2; exit 1; }
	cd $(OLLAMA) && CGO_ENABLED=1 go build $(MODFILE) -trimpath -buildvcs=false \
		-ldflags '-s -w -X github.com/ollama/ollama/version.Version=$(*:v%=%)' -o bin/$(@F) .

ollama-serve: $(OLLAMA)/bin/ollama-$(OLLAMA_VERSION) $(VENV)/.installed  ## Serve Ollama on loopback, with a store of its own: OLLAMA_VERSION=v0.32.5 for the older
	OLLAMA_HOST=$(OLLAMA_HOST) OLLAMA_MODELS=$(abspath $(OLLAMA_STORE)) OLLAMA_MLX_RUNNER=$(abspath $(BIN)/ollama-mlx-runner) $< serve

$(VENV)/.installed-ollama: pyproject.toml $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ollama]'
	@touch $@

test-ollama: $(VENV)/.installed-ollama  ## Run the tests with real Ollama servers; skipped where there is no Go
	@if command -v go >/dev/null; then $(MAKE) --no-print-directory ollama; fi
	$(BIN)/pytest -m ollama tests/ollama

clean:  ## Remove everything that the other targets made here
	rm -rf $(VENV) $(FIXTURES_VENV) bench-results build dist *.egg-info .coverage .coverage.* htmlcov
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find runner models protocol tests -name __pycache__ -type d -prune -exec rm -rf {} +

export PROMPT

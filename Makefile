# Each target sets up what it needs. Only make and a Python >= 3.11 must be there: `make PYTHON=python3.12 …` names another.

PYTHON ?= python3
PROMPT ?= Name the capital of France.
PICTURE = $(if $(filter file,$(origin PROMPT)),a red circle on a white background,$(PROMPT))
VENV := .venv
BIN := $(VENV)/bin
FIXTURES_VENV := .venv-fixtures

.DEFAULT_GOAL := help
.PHONY: help run run-image test check lint types bench bench-serve bench-image bench-ollama fixtures clean ollama ollama-serve test-ollama

help:  ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

run-image: $(VENV)/.installed  ## Make a picture with the demonstration model: make run-image PROMPT="a blue star on black"
	@$(BIN)/ollama-mlx-runner try --image "$${PICTURE}" -o image.png

# Two processes, each with files of its own: half of the tests wait for a child process rather than for a core.
IN_TWO := -n 2 --dist loadfile

test: $(VENV)/.installed-dev  ## Run the tests
	$(BIN)/pytest $(IN_TWO)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types  ## Before a change lands: lint, import contracts, types, tests with coverage
	$(BIN)/pytest $(IN_TWO) --cov --cov-report=term-missing:skip-covered

bench: $(VENV)/.installed-dev  ## Measure beside others, into bench-results/: make bench BENCH="--rounds 5"
	$(BIN)/python -m tests.bench $(BENCH)

bench-serve: $(VENV)/.installed-dev  ## The same for many requests at once: make bench-serve BENCH="--quick"
	$(BIN)/python -m tests.bench.serving $(BENCH)

bench-image: $(VENV)/.installed-dev  ## The same for pictures, beside diffusers and mflux: make bench-image BENCH="--quick"
	$(BIN)/python -m tests.bench.image $(BENCH)

SINGLE_BENCHES := bench-depth bench-embed bench-busy bench-quality bench-large bench-sampling bench-memory bench-format bench-experts bench-recurrent bench-vision bench-distributed
.PHONY: $(SINGLE_BENCHES)
$(SINGLE_BENCHES): bench-%: $(VENV)/.installed-dev
	$(BIN)/python -m tests.bench.$* $(BENCH)

bench-ollama: $(VENV)/.installed-ollama ollama  ## Measure what a real Ollama adds to a token
	$(BIN)/python -m tests.bench.ollama_parent $(BENCH)

$(FIXTURES_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(FIXTURES_VENV)
	$(FIXTURES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable . torch torchvision transformers diffusers peft
	@touch $@

fixtures: $(FIXTURES_VENV)/.installed  ## Make the tiny checkpoints and their reference outputs anew
	@set -e; for script in tests/parity/make_*.py tests/parity_embedding/make_*.py tests/parity_vision/make_*.py tests/parity_image/make_*.py tests/parity_image/merge_lora.py; do echo "$$script"; $(FIXTURES_VENV)/bin/python "$$script"; done

# The last Ollama with the classic dialect, the last with image models and the newest (in go.mod, the others in VERSION.mod).
OLLAMA_CLASSIC := v0.24.0
OLLAMA_IMAGES := v0.32.5
OLLAMA_NEWEST := v0.34.4
OLLAMA_VERSION ?= $(OLLAMA_NEWEST)
OLLAMA := tests/ollama
OLLAMA_STORE ?= $(OLLAMA)/bin/models
OLLAMA_HOST ?= 127.0.0.1:11435
OLLAMA_SOURCES := $(wildcard $(OLLAMA)/*.go $(OLLAMA)/*.mod $(OLLAMA)/*/*.go)
OLLAMA_HEADERS := $(OLLAMA)/bin/headers
# The runner computes: what is compiled from C and C++, which cuts texts and makes grammars, need not be fast, only soon built.
GO_BUILD = CGO_CFLAGS='-O0 -g0' CGO_CXXFLAGS='-O0 -g0' go build $(MODFILE) -trimpath -buildvcs=false -ldflags '-s -w -X github.com/ollama/ollama/version.Version=$(*:v%=%)'
OLLAMA_VERSIONS := $(OLLAMA_CLASSIC) $(OLLAMA_IMAGES) $(OLLAMA_NEWEST)
OLLAMA_DECODERS := $(OLLAMA_VERSIONS:%=$(OLLAMA)/bin/decode-%)
HEADERS_OF = $$(go list -modfile=headers.mod -m -f '{{.Dir}}' github.com/$(1))

ollama: $(OLLAMA_VERSIONS:%=$(OLLAMA)/bin/ollama-%)  ## Build Ollama with this runner in it (needs Go and a C++ compiler)

CLASSIC := $(OLLAMA)/bin/ollama-$(OLLAMA_CLASSIC) $(OLLAMA)/bin/decode-$(OLLAMA_CLASSIC)
$(CLASSIC): MODFILE := -modfile=$(OLLAMA_CLASSIC).mod -tags classic
$(CLASSIC): export CGO_CPPFLAGS = -I$(abspath $(OLLAMA_HEADERS))
$(CLASSIC): $(OLLAMA_HEADERS)/.there
$(OLLAMA)/bin/ollama-$(OLLAMA_IMAGES) $(OLLAMA)/bin/decode-$(OLLAMA_IMAGES): MODFILE := -modfile=$(OLLAMA_IMAGES).mod -tags before_v0_34_2
$(OLLAMA)/bin/ollama-%: $(OLLAMA_SOURCES)
	@command -v go >/dev/null || { echo 'Error: Go is needed to build Ollama; see https://go.dev/dl' >&2; exit 1; }
	cd $(OLLAMA) && CGO_ENABLED=1 $(GO_BUILD) -o bin/$(@F) .

# The path in an #include names a folder, so the headers stand in such folders here; one header is all of the JSON parser.
$(OLLAMA_HEADERS)/.there: $(OLLAMA)/headers.mod $(OLLAMA)/headers.sum
	@command -v go >/dev/null || { echo 'Error: Go is needed to build Ollama; see https://go.dev/dl' >&2; exit 1; }
	mkdir -p $(@D)/nlohmann $(@D)/stb $(@D)/miniaudio
	cd $(OLLAMA) && go mod download -modfile=headers.mod
	cd $(OLLAMA) && common="$(call HEADERS_OF,ollama/ollama)/llama/llama.cpp/common" && ln -sf "$$common/stb_image.h" bin/headers/stb && \
		ln -sf "$$common/json.hpp" bin/headers/nlohmann/json.hpp && ln -sf json.hpp bin/headers/nlohmann/json_fwd.hpp
	cd $(OLLAMA) && ln -sf "$(call HEADERS_OF,gen2brain/malgo)/miniaudio.h" bin/headers/miniaudio
	@touch $@

$(OLLAMA)/bin/decode-%: $(OLLAMA_SOURCES)
	cd $(OLLAMA) && CGO_ENABLED=1 $(GO_BUILD) -o bin/$(@F) ./decode

ollama-serve: $(OLLAMA)/bin/ollama-$(OLLAMA_VERSION) $(VENV)/.installed  ## Serve Ollama on loopback, with a store of its own: OLLAMA_VERSION=v0.32.5 or v0.24.0 for an older
	OLLAMA_HOST=$(OLLAMA_HOST) OLLAMA_MODELS=$(abspath $(OLLAMA_STORE)) OLLAMA_MLX_RUNNER=$(abspath $(BIN)/ollama-mlx-runner) $< serve

$(VENV)/.installed-ollama: pyproject.toml $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ollama]'
	@touch $@

test-ollama: $(VENV)/.installed-ollama  ## Run the tests with real Ollama servers; skipped where there is no Go
	@if command -v go >/dev/null; then $(MAKE) --no-print-directory ollama $(OLLAMA_DECODERS); fi
	$(BIN)/pytest $(IN_TWO) -m ollama tests/ollama

clean:  ## Remove everything that the other targets made here
	rm -rf $(VENV) $(FIXTURES_VENV) bench-results build dist *.egg-info .coverage .coverage.* htmlcov
	rm -rf $(OLLAMA)/bin
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find runner models protocol tests -name __pycache__ -type d -prune -exec rm -rf {} +

export PROMPT PICTURE

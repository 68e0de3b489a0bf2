# Every target sets up what it needs; a second run finds it done.
PYTHON ?= python3
# make serve HOST=... PORT=...; from the environment only under names that are the server's own.
HOST := $(or $(DYNAMIC_LORA_LISTEN_HOST),127.0.0.1)
PORT := $(or $(DYNAMIC_LORA_LISTEN_PORT),8000)
# TORCH=cpu takes PyTorch's CPU build; otherwise pip's index gives its own, PyPI's on Linux with CUDA.
# PyTorch's index is asked for torch alone: where it cannot be reached, each package would wait.
TORCH :=
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
VENV := .venv
STAMP := $(VENV)/.installed
BENCH ?=

.DEFAULT_GOAL := help
.PHONY: help setup serve test check format coverage bench image-check pins clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install everything, pinned (TORCH=cpu: without CUDA)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(if $(filter-out cpu,$(TORCH)),$(error TORCH=$(TORCH): expected cpu or nothing))
	$(if $(TORCH),$(VENV)/bin/python -m pip install -c constraints.txt --no-deps \
	  --extra-index-url $(TORCH_CPU_INDEX) torch)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

serve: $(STAMP)  ## serve on HOST and PORT, in the foreground
	@exec $(VENV)/bin/dynamic-lora serve --host $(HOST) --port $(PORT)

test: $(STAMP)  ## run the tests
	$(VENV)/bin/python -m pytest

check: $(STAMP)  ## lint, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)  ## apply the formatter and the safe lint fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

coverage: $(STAMP)  ## run the tests with branch coverage
	$(VENV)/bin/python -m pytest --cov --cov-report=term-missing:skip-covered

bench: $(STAMP)  ## this server beside its peers, many and cold adapters (BENCH='...' for the first)
	$(VENV)/bin/python -m benchmarks.serve --compare $(BENCH)
	$(VENV)/bin/python -m benchmarks.many_adapters
	$(VENV)/bin/python -m benchmarks.cold_adapter
	$(VENV)/bin/python -m benchmarks.figures

image-check: $(STAMP)  ## build the image, start it, send it a request
	PYTHON=$(CURDIR)/$(VENV)/bin/python scripts/image_check.sh

pins: $(STAMP)  ## print the pins of the installed versions
	@$(VENV)/bin/python scripts/pins.py

clean:  ## remove .venv and the caches of the tools
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage dist build

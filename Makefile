# `make demo` and `make test` need nothing but Python >= 3.11 and make.

PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
EXTRAS ?= dev,docs
# The extra "backpack", installed without its dependencies: they would bring torchvision.
WITHOUT_DEPENDENCIES := backpack-for-pytorch einops unfoldNd
ARGS ?=
# The models of the tests are tiny: two processes with a thread each, and the tests of a file together.
PARALLEL ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed
# pyproject.toml says which transformers is the oldest one, and nothing else does.
OLDEST_TRANSFORMERS := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\)",$$/\1/p' pyproject.toml)

# Nothing here needs the network once the environment is installed.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# mkdocs-material announces the next major version of mkdocs on every build otherwise.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow test-oldest check docs bench clean clean-env

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## the virtual environment, with everything to run, test and build the docs

# Made again only when what it was made from has changed. Every install goes through the constraints.
$(INSTALLED) $(OLDEST_INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fisherscope needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(@D) \
	  || { echo "$(PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "installing into $(@D): a few minutes, about 2 GB"
	@$(@D)/bin/python -m pip install -qq -c constraints.txt -e '.[$(EXTRAS)]' $(PINNED)
	@$(@D)/bin/python -m pip install -qq -c constraints.txt --no-deps $(WITHOUT_DEPENDENCIES)
	@$(@D)/bin/python scripts/check_install.py
	@touch $@

$(OLDEST_INSTALLED): PINNED := transformers==$(OLDEST_TRANSFORMERS)

demo: $(INSTALLED)  ## collect and analyse the embedded trained model; ends with the path of the report
	@$(BIN)/fisherscope demo --out demo-run $(ARGS)

test: $(INSTALLED)  ## the default test suite
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(INSTALLED)  ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-oldest: $(OLDEST_INSTALLED)  ## the default test suite with the oldest supported transformers
	@$(OLDEST_VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

check: $(INSTALLED)  ## linters, types, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
# not with --quiet, which hides the warnings from --strict
	$(BIN)/mkdocs build --strict

docs: $(INSTALLED)  ## the documentation, served while you write
	$(BIN)/mkdocs serve

bench: $(INSTALLED)  ## collection against a plain forward+backward and against the loop over samples
	$(BIN)/python benchmarks/collect.py $(ARGS)

clean:  ## remove what was built; the environment stays
	rm -rf build dist site demo-run .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage *.egg-info
	find fisherscope tests scripts examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

clean-env:  ## remove the virtual environments
	rm -rf $(VENV) $(OLDEST_VENV)

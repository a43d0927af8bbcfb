# `make demo` and `make test` need nothing but Python >= 3.11 with venv, make, and an index of packages.

PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest
ARGS ?=
# The models of the tests are tiny: two processes with a thread each, and the tests of a file together.
PARALLEL ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed
NEWEST_INSTALLED := $(NEWEST_VENV)/.installed

# Nothing here needs the network once the environment is installed.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# mkdocs-material announces the next major version of mkdocs on every build otherwise.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow test-oldest test-newest check docs bench constraints clean clean-env

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## the virtual environment, with everything to run, test and build the docs

# Made anew, from nothing, when what it was made from has changed.
$(INSTALLED) $(OLDEST_INSTALLED) $(NEWEST_INSTALLED): pyproject.toml constraints.txt constraints-oldest.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fisherscope needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) --version 2>&1): name another one, make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) scripts/make_environment.py $(@D) $(KIND)

$(INSTALLED): KIND := pinned
$(OLDEST_INSTALLED): KIND := oldest
$(NEWEST_INSTALLED): KIND := newest

demo: $(INSTALLED)  ## collect and analyse the embedded trained model; ends with the path of the report
	@$(BIN)/fisherscope demo --out demo-run $(ARGS)

test: $(INSTALLED)  ## the default test suite
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(INSTALLED)  ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-oldest: $(OLDEST_INSTALLED)  ## the default test suite with the lowest versions that pyproject.toml admits
	@$(OLDEST_VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

test-newest: $(NEWEST_INSTALLED)  ## the same with the newest of everything; rm -r .venv-newest for those of today
	@$(NEWEST_VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

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

constraints:  ## resolve every package anew: writes constraints.txt and constraints-oldest.txt
	@$(PYTHON) scripts/make_constraints.py

clean:  ## remove what was built; the environment stays
	rm -rf build dist site demo-run .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage *.egg-info
	find fisherscope tests scripts examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

clean-env:  ## remove the virtual environments
	rm -rf $(VENV) $(OLDEST_VENV) $(NEWEST_VENV)

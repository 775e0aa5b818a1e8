# From a fresh clone: needs Python 3.11 or newer, a C++17 compiler and a package index; nvcc where there is one.
#   make demo    train a character language model with torch.nn and with rnnkernels
#   make test    everything that must hold: C++ tests, sanitizers, Python tests, lint
#   make bench   measure against torch.nn
# The build leaves build/compile_commands.json, where clangd finds it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
CMAKE := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DPython_EXECUTABLE=$(BIN)/python --log-level=WARNING
# The baseline's kernels alone: the sanitizers do not see into vector instructions, and each instruction set takes them minutes.
CHECKED := -DRNNKERNELS_X86=OFF -DRNNKERNELS_TESTS=ON -DRNNKERNELS_PYTHON=OFF -DRNNKERNELS_CUDA=0
CTEST := $(BIN)/ctest --parallel 2 --output-on-failure --no-tests=error --test-dir

# Kernels that spill do not build.
export RNNKERNELS_STRICT := 1
# A package is also built as PTX for what is to come, which takes a fifth longer.
export RNNKERNELS_CUDA_ARCHS ?= 80-real;90a-real
export RNNKERNELS_CUDA_WARM_ARCHS ?= 90a-real

.NOTPARALLEL:
.PHONY: demo test bench lint clean build test-cpp test-sanitize test-thread test-python

demo: build
	$(BIN)/python examples/char_lm.py --output build/char_lm

test: test-cpp test-sanitize test-thread test-python lint

bench: build
	$(BIN)/python -m rnnkernels bench

# ---- the environment, once

$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools pybind11 cmake ninja
	touch $@

build/.installed: $(VENV)/.tools pyproject.toml setup.py
	$(PIP) --no-build-isolation --editable '.[bench,cli,dev,test]'
	touch $@

# ---- what changed since, every time

build: build/.installed
	$(CMAKE) -S . -B build -DRNNKERNELS_TESTS=ON
	$(BIN)/cmake --build build
	$(BIN)/cmake --install build --component python --prefix . > /dev/null

test-cpp: build
	$(CTEST) build

test-sanitize: $(VENV)/.tools
	$(CMAKE) -S . -B build/sanitize $(CHECKED) '-DRNNKERNELS_SANITIZE=address;undefined'
	$(BIN)/cmake --build build/sanitize
	$(CTEST) build/sanitize

# Only the barrier, which needs nothing built and runs on std::thread: ThreadSanitizer is blind to libgomp's own hand-overs. It also needs a
# memory layout that some kernels do not give.
test-thread:
	@mkdir -p build/thread
	@if echo 'int main() {}' | $(CXX) -x c++ -fsanitize=thread - -o build/thread/works && build/thread/works; then \
	  set -ex; \
	  $(CXX) -std=c++17 -O1 -g -fopenmp -fsanitize=thread -Icsrc csrc/test/team_test.cpp -o build/thread/team_test; \
	  build/thread/team_test; \
	else \
	  echo 'test-thread: not run, ThreadSanitizer does not work on this machine'; \
	fi

# Two at a time, since what takes long are the witnesses, loops in Python; idle threads sleep, or they would hold the other one's core.
test-python: build
	OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses 2 --dist worksteal

lint: build/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info rnnkernels/_C*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

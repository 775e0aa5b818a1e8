# From a fresh clone: needs Python 3.11 or newer, a C++17 compiler and a package index; nvcc where there is one.
#   make demo    train a character language model with torch.nn and with rnnkernels
#   make test    everything that must hold: C++ tests, sanitizers, Python tests, lint
#   make bench   measure against torch.nn
# The build leaves build/compile_commands.json, where clangd finds it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
CMAKE := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(BIN)/ninja -DPython_EXECUTABLE=$(BIN)/python
CTEST := $(BIN)/ctest --output-on-failure --no-tests=error --test-dir

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
	$(CMAKE) -S . -B build -DRNNKERNELS_TESTS=ON --log-level=WARNING
	$(BIN)/cmake --build build
	$(BIN)/cmake --install build --component python --prefix . > /dev/null

test-cpp: build
	$(CTEST) build

test-sanitize: $(VENV)/.tools
	$(CMAKE) -S . -B build/sanitize -DRNNKERNELS_TESTS=ON -DRNNKERNELS_PYTHON=OFF -DRNNKERNELS_CUDA=0 "-DRNNKERNELS_SANITIZE=address;undefined" --log-level=WARNING
	$(BIN)/cmake --build build/sanitize
	$(CTEST) build/sanitize

# ThreadSanitizer needs a memory layout that some kernels do not give; where it cannot run, say so.
test-thread: $(VENV)/.tools
	@mkdir -p build/thread
	@if echo 'int main() {}' | $(CXX) -x c++ -fsanitize=thread - -o build/thread/works && build/thread/works; then \
	  $(MAKE) --no-print-directory test-thread-run; \
	else \
	  echo 'ThreadSanitizer does not work on this machine: the test of the thread team was not run under it'; \
	fi

.PHONY: test-thread-run
test-thread-run:
	$(CMAKE) -S . -B build/thread -DRNNKERNELS_TESTS=ON -DRNNKERNELS_PYTHON=OFF -DRNNKERNELS_CUDA=0 -DRNNKERNELS_SANITIZE=thread --log-level=WARNING
	$(BIN)/cmake --build build/thread --target team_test
	$(CTEST) build/thread --tests-regex '^team_test$$'

test-python: build
	$(BIN)/pytest

lint: build/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf build dist *.egg-info rnnkernels/_C*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Two commands on a fresh machine with Python >= 3.10: `make demo` and `make test`.
# Both make the environment in .venv where it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.PHONY: help demo test test-all cuda lint info bench gpu-check sanitize clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train three multi-task models by several methods; pictures in demo_output/"
	@echo "make test       run the tests, a few minutes; the long sweeps among them are left out"
	@echo "make test-all   run all tests, the long sweeps too: a quarter of an hour on two cores"
	@echo "make cuda       compile the CUDA C++ kernels too (needs nvcc; some two minutes)"
	@echo "make lint       ruff and mypy"
	@echo "make info       versions, device, and which backend serves which operation"
	@echo "make bench      what operations and a training step cost here, beside others: figures, pictures"
	@echo "make bench WHAT=...  operations, training, cpu, quick, counts, host, weighting, overlap, experiments"
	@echo "make gpu-check  tests, figures and sanitizers on an NVIDIA GPU; results in gpu_check_output/"
	@echo "make sanitize   the CPU backend's tests under sanitizers of addresses, undefined behaviour, threads"
	@echo "make clean      remove the environment and what was built"
	@echo 'Options go in ARGS, for example: make demo ARGS="--images ~/photos"'

# pip compiles the C++ kernels of the CPU where there is a compiler, and only what has changed.
KERNELS := setup.py $(wildcard csrc/cpu/*.cpp csrc/cpu/*.h csrc/common/*)

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo $(ARGS)

# On all cores, of which more than four gain little; what a process has not begun another takes over.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test: $(VENV)/.dev
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.dev
	$(PYTEST) -m "slow or not slow" $(ARGS)

# What make has installed before stays: pip builds the extension in its place, ninja what changed.
cuda: $(VENV)/.torch
	GCOND_BUILD_CUDA=1 $(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(VENV)/.dev $(VENV)/.demo
	@$(BIN)/python -c 'from gcond_kernels import _cuda; print("built for", _cuda.ARCHITECTURES)'

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy gcond_kernels

info: $(VENV)/.demo
	$(BIN)/python -m gcond_kernels info

# What is measured: make bench WHAT=host; one that is unknown prints the list.
WHAT ?= all

bench: $(VENV)/.dev
	$(BIN)/python -m bench $(WHAT) $(ARGS)

gpu-check: $(VENV)/.dev
	PYTHON=$(BIN)/python bench/gpu_check.sh gpu_check_output

sanitize: $(VENV)/.dev
	$(PIP) install --quiet pybind11 setuptools
	PYTHON=$(BIN)/python tests/sanitize.sh $(ARGS)

$(VENV)/.demo: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml $(KERNELS)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@ $(VENV)/.demo

# torch first and alone, so that nothing else decides which build of it comes. Without an
# NVIDIA driver it is the CPU build where one is to be had: the default build on Linux brings
# several gigabytes of CUDA libraries along.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10: make PYTHON=/path/to/python3.10 ..."; exit 1; }
	@echo "Making the environment in $(VENV) (once)"
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
		$(PIP) install --quiet torch==$(TORCH); \
	else \
		$(PIP) install --quiet torch==$(TORCH)+cpu 2>/dev/null || \
		$(PIP) install --quiet --index-url $(CPU_WHEELS) torch==$(TORCH)+cpu || \
		{ echo "No CPU build of torch $(TORCH) found: taking the default build (large)"; \
		  $(PIP) install --quiet torch==$(TORCH); }; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info gcond_kernels/_cpu.*.so gcond_kernels/_cpu_missing.txt \
		gcond_kernels/_cuda.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two commands do everything from a fresh clone: `make train` and `make test`. Variables:
#   PYTHON  interpreter to build the environment from (3.11 or newer)
#   VENV    where the environment goes
#   EXTRA   device support: cuda12, cuda13, or empty for a CPU
#   ARGS    flags passed on, e.g. `make train ARGS="--lmhead_chunks 16 --steps 50"`
PYTHON ?= python3
VENV ?= .venv
EXTRA ?=
ARGS ?=

comma := ,
INSTALLED := $(VENV)/.installed$(if $(EXTRA),-$(EXTRA))

.PHONY: train bench microbench test test-gpu lint clean

train: $(INSTALLED)
	$(VENV)/bin/python scripts/train.py --lmhead_chunks 4 $(ARGS)

bench: $(INSTALLED)
	$(VENV)/bin/python scripts/bench_lm_head.py $(ARGS)

microbench: $(INSTALLED)
	$(VENV)/bin/python scripts/microbench.py $(ARGS)

# Most of the tests' time is LLVM's, for programs that run once: it is told not to try hard.
test: $(INSTALLED)
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 $(VENV)/bin/python -m pytest -n auto $(ARGS)

# What needs an NVIDIA GPU: `make test-gpu EXTRA=cuda13`. Programs run once, so XLA is not to time kernels for them, but
# for tests of what it makes of a program in training (without it no GEMM adds to its result) and of power.
test-gpu: $(INSTALLED)
	XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_autotune_level=0 \
		$(VENV)/bin/python -m pytest -m "gpu and not alone" -n 8 $(ARGS)
	$(VENV)/bin/python -m pytest -m "gpu and alone" $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)

# Python compiles what it imports by itself: pip would take 20 s to compile everything.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable ".[test,lint$(if $(EXTRA),$(comma)$(EXTRA))]"
	touch $@

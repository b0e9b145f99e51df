# make                        the benchmark (make bench)
# make test                   the tests that every change must pass
# make test-all               those and the slow ones
# make sweep                  compile every reachable kernel configuration, no GPU needed
# make check                  ruff, mypy, architecture test, documentation
# make docs                   the documentation, in build/docs: warnings are errors
# make gpu                    tests, checkers, tuning, timings and counters on an NVIDIA GPU; installs nothing
# make clean                  builds and caches; keeps the environment and bench-results/
#
# Each makes .venv and installs into it when needed.
#   SYSTEM=1                  reuse a torch that is already installed
#   VENV= PYTHON=python3      install nothing, use this Python as it is
#   PIP_ARGS, PYTEST_ARGS, BENCH_ARGS, GPU_ARGS   more arguments for pip, pytest, the benchmark, its GPU part

PYTHON ?= python3
VENV ?= .venv
SYSTEM ?=
WORKERS ?= 2

# Keeps `import kernels` from finding our folder of that name.
export PYTHONSAFEPATH := 1

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)$(addprefix :,$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready$(SYSTEM)
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dlgpu needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(if $(SYSTEM),--system-site-packages) $(VENV)
	$(PY) -m pip install $(PIP_ARGS) $(if $(SYSTEM),,-c constraints.txt) -e '.[dev]'
	touch $@
endif

PYTEST := $(PY) -m pytest
# Workers share the cores: with more than one BLAS thread each, they wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := bench
.PHONY: bench test test-all sweep check docs gpu clean

bench: $(READY)
	$(PY) -m dlgpu.bench $(BENCH_ARGS)

# With what is there: no environment is made for it, and no network needed.
GPU_PY = $(or $(if $(strip $(VENV)),$(wildcard $(VENV)/bin/python)),$(PYTHON))
gpu: export PYTHONPATH := $(CURDIR)$(addprefix :,$(PYTHONPATH))
gpu:
	@$(GPU_PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None and "no torch: make gpu PYTHON=...")'
	$(GPU_PY) -m dlgpu.bench gpu $(BENCH_ARGS) $(GPU_ARGS)

# Tests of speed have every core to themselves. Pytest's exit status 5 means that none were selected.
test: $(READY)
	$(ONE_THREAD) $(PYTEST) -n $(WORKERS) -m 'not slow and not perf' $(PYTEST_ARGS)
	$(PYTEST) -m 'perf and not slow' $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-all: $(READY)
	$(ONE_THREAD) $(PYTEST) -n $(WORKERS) -m 'not perf' $(PYTEST_ARGS)
	$(PYTEST) -m perf $(PYTEST_ARGS) || [ $$? -eq 5 ]

sweep: $(READY)
	$(ONE_THREAD) $(PYTEST) -n $(WORKERS) tests/sweep_compile.py $(PYTEST_ARGS)

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p dlgpu
	$(PYTEST) -q tests/test_architecture.py
	$(PY) -m mkdocs build --strict --quiet

docs: $(READY)
	$(PY) -m mkdocs build --strict --quiet

clean:
	rm -rf build dist dlgpu.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find bench dlgpu examples kernels tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

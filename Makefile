# Everything sets itself up: `make demo` and `make test` need only Python >= 3.11, make and pip.
#   make test PYTHON=python3.13 VENV=.venv-313    another interpreter, in an environment of its own
#   make demo SMOKE=1                             the demo in short

PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-benchmarks
DOCS_STAMP := $(VENV)/.installed-docs

# JAX keeps compiled programs here between runs; `make clean` forgets them.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
# The tests and the short demo spend their time compiling: optimising less is faster there (a quarter, measured), and so
# are XLA's older emitters (a third; jaxlib 0.12 no longer has them). The short demo solves many ODEs: level 1, not 0.
test test-worlds test-all slow-list: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= 1
ifneq ($(SMOKE),)
demo: export XLA_FLAGS := $(strip $(XLA_FLAGS) --xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true)
endif
QUICK_FLAG := --xla_cpu_use_fusion_emitters=false
QUICK = XLA_FLAGS="$$XLA_FLAGS $$(XLA_FLAGS=$(QUICK_FLAG) $(BIN)/python -c 'import jax; jax.devices()' >/dev/null 2>&1 \
	&& echo $(QUICK_FLAG))"
# Batches of small matrices: XLA already uses every core, and OpenBLAS's own threads wait for each other (60 times, measured).
test test-worlds test-all slow-list demo: export OPENBLAS_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What may differ between versions of Python, JAX, NumPyro and ArviZ: reading models, kernels, saving, ArviZ, docstrings.
WORLDS := scoreinfer tests/test_arviz.py tests/test_architecture.py tests/test_comparison.py tests/test_identity.py \
	tests/test_names.py tests/test_pickling.py tests/calibration tests/mcmc/test_kernels.py tests/mcmc/test_langevin.py \
	tests/model/test_model.py tests/posterior/test_saving.py \
	tests/posterior/test_path_saving.py tests/posterior/test_surface.py \
	tests/test_memory.py::test_bytes_of_loops_count_what_they_keep tests/test_memory.py::test_what_all_rows_share_does_not_count

.PHONY: help demo test test-worlds test-all slow-list lint format types bench docs setup clean

help:
	@echo "make demo [SMOKE=1]   the lynx-hare example, end to end"
	@echo "make test             the tests (test-all: the slow ones too; test-worlds: those of another Python or ArviZ)"
	@echo "make lint | types     ruff | mypy        make format   let ruff rewrite"
	@echo "make bench            the accuracy benchmarks   make docs    the site, in docs/_build/html"

setup: $(STAMP)

# Where venv lacks ensurepip (some Linux distributions), the interpreter's own pip fills the environment.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "scoreinfer needs Python >= 3.11; name one with: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("scoreinfer needs Python >= 3.11, got %d.%d; use make PYTHON=..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[benchmarks]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

demo: $(STAMP)
	$(if $(SMOKE),$(QUICK)) $(BIN)/python examples/lynx_hare.py $(if $(SMOKE),--smoke)

test: $(STAMP)
	$(QUICK) $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-worlds: $(STAMP)
	$(QUICK) $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS) $(WORLDS)

test-all: $(STAMP)
	$(QUICK) $(BIN)/python -m pytest $(PYTEST_ARGS)

# Measures the quick tests, in minutes on two cores, and adds those that are slow to tests/slow.txt.
slow-list: $(STAMP)
	rm -f .costs
	JAX_COMPILATION_CACHE_DIR=$$(mktemp -d) $(QUICK) $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS) \
		--jaxtyping-packages= -p costs --costs $(CURDIR)/.costs tests
	$(BIN)/python tests/costs.py .costs && rm .costs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

bench: $(BENCH_STAMP)
	$(BIN)/python benchmarks/accuracy.py $(BENCH_ARGS)

# Everything from nothing, offline: warnings are errors, every internal link is checked, then a browser looks.
docs: $(DOCS_STAMP)
	rm -rf docs/_build/html docs/api
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html
	$(BIN)/python docs/_ext/check_links.py docs/_build/html
	$(BIN)/python -m pytest -q tests/docs/test_browser.py

clean:
	rm -rf docs/_build docs/_made docs/api .jax_cache .mypy_cache .pytest_cache .ruff_cache build dist outputs

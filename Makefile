# make demo and make test do all the set-up themselves. Variables, on the command line or in the environment:
#   PYTHON=python3.12   the Python to build on (3.11 or newer)      VENV=.venv   where the environment goes
#   SYSTEM_TORCH=1      use the torch and the other packages that PYTHON has; fetches nothing
#   PIP_ARGS=...        more arguments for pip, e.g. an index of CPU builds of torch, which spares a machine
#                       without a GPU the gigabytes of CUDA
PYTHON ?= python3
VENV ?= .venv
SYSTEM_TORCH ?=
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt $(PIP_ARGS)
BUILD_FILES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)
KIND := $(if $(SYSTEM_TORCH),system,own)
DEMO_READY := $(VENV)/.ready-$(KIND)-train
TEST_READY := $(VENV)/.ready-$(KIND)-test
# with the system's packages the GPU's tests and benchmarks do without what is missing, and say so
GPU_READY := $(if $(SYSTEM_TORCH),$(VENV)/.ready-system,$(TEST_READY))

.PHONY: help demo test test-slow lint bench record docs-check gpu clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install, train the demo recipe, evaluate it: runs/demo/metrics.json and pictures"
	@echo "make test    install, lint, the quick tests with coverage"
	@echo "make test-slow  the long tests, every command of the documentation, and an older processor's instruction sets"
	@echo "make lint    ruff and mypy"
	@echo "make bench   this machine's CPU in 20 minutes: operators, network, training step, loader and deployment beside"
	@echo "             their peers, scaling curves, plots -> benchmarks/output/"
	@echo "make record  replace the tracked results, benchmarks/results/, by what bench, gpu and studies wrote"
	@echo "make docs-check  every command of README.md and docs/, run on small data or at least parsed"
	@echo "make gpu     tests and benchmarks that need a CUDA device, in nine minutes -> benchmarks/output/"
	@echo "make clean   remove builds and caches (not $(VENV), not runs/)"

demo: $(DEMO_READY)
	$(BIN)/python -m maskformer_fast.train

# Two processes of one thread each fill two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(TEST_READY) lint
	$(PYTEST) tests -m "not slow" --cov=maskformer_fast --cov-report=term --cov-fail-under=80

# What takes long: every target's compilation, sanitizers, cross compilers, restarted groups, killed runs, each command of
# the documentation, and the quick tests with the instruction sets of an older processor.
test-slow: $(TEST_READY)
	$(PYTEST) tests -m slow
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.docs.run
	OPENBLAS_CORETYPE=Haswell ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m "not slow" \
	  tests/ops tests/modeling tests/kernels tests/inference tests/training
	ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m slow -k int8 tests/deploy

lint: $(TEST_READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# Twenty minutes at most on two cores. What fails does not keep the rest from running.
bench: $(TEST_READY)
	@status=0; set -x; \
	$(BIN)/python -m benchmarks --minutes 13 || status=1; \
	$(BIN)/python -m benchmarks.studies.end_to_end --count 2 --classes 150 --kinds random || status=1; \
	$(BIN)/python -m benchmarks.studies.scaling --minutes 4 || status=1; \
	$(BIN)/python -m benchmarks.plots || status=1; \
	exit $$status

# Replaces the tracked results, which the documentation quotes, by what the last runs wrote.
record:
	cp -R benchmarks/output/. benchmarks/results/
	rm -f benchmarks/results/gpu_tests.xml

docs-check: $(TEST_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.docs.run

# Nine minutes at most: the build, a first look of 150 seconds, 130 seconds of tests, four minutes of benchmarks or what
# is left. Built for this machine's GPU alone, which is quickest. Tests run one at a time where pytest-xdist is missing.
GPU_STARTED := $(shell date +%s)
gpu: export CUDAARCHS ?= native
gpu: $(GPU_READY)
	@$(if $(SYSTEM_TORCH),$(BIN)/python .ci/missing_packages.py --tell train test)
	mkdir -p benchmarks/output
	@status=0; set -x; \
	timeout -s INT -k 10 160 $(BIN)/python -m benchmarks.studies.gpu_first_look --seconds 150 || status=1; \
	plugins=$$($(BIN)/python -c "from importlib.util import find_spec as found; \
	  print('-n 4' * bool(found('xdist')), '--timeout 60' * bool(found('pytest_timeout')))"); \
	timeout -s INT -k 10 130 $(BIN)/python -m pytest tests -m gpu -p tests.support.gpu_context $$plugins \
	  --junitxml=benchmarks/output/gpu_tests.xml || status=1; \
	minutes=$$(awk "BEGIN { left = (490 + $(GPU_STARTED) - $$(date +%s)) / 60; print (left < 4 ? left : 4) }"); \
	$(BIN)/python -m benchmarks --device cuda --minutes $$minutes || status=1; \
	exit $$status

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	rm -f maskformer_fast/_C.*
	rm -f $(VENV)/.ready-*
	find maskformer_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "maskformer_fast needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--without-pip) $(VENV)

ifeq ($(SYSTEM_TORCH),)
$(DEMO_READY): $(BUILD_FILES) | $(BIN)/python
	$(PIP_INSTALL) -e ".[train]"
	touch $@

$(TEST_READY): $(BUILD_FILES) | $(BIN)/python
	$(PIP_INSTALL) -e ".[train,test,cross,rtx]"
	touch $(DEMO_READY) $@
else
# A path file and not --system-site-packages, which would miss the packages of a PYTHON that is itself an environment.
$(VENV)/.ready-system: $(BUILD_FILES) | $(BIN)/python
	@$(PYTHON) -c "import torch, pip" || { echo "SYSTEM_TORCH=1: $(PYTHON) must have torch and pip" >&2; exit 1; }
	@# an environment made with pip has a setuptools of its own, which may be too old and would hide that of PYTHON
	test ! -e $(BIN)/pip || $(BIN)/python -m pip uninstall -q -y setuptools
	$(PYTHON) -c "import sys; print('\n'.join(f'import site; site.addsitedir({p!r})' for p in sys.path \
	  if p.endswith(('site-packages', 'dist-packages'))))" \
	  > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system_packages.pth"
	$(BIN)/python .ci/missing_packages.py --build
	$(PIP_INSTALL) -e . --no-build-isolation --no-deps
	touch $@

$(DEMO_READY): $(VENV)/.ready-system
	$(BIN)/python .ci/missing_packages.py train
	touch $@

$(TEST_READY): $(VENV)/.ready-system
	$(BIN)/python .ci/missing_packages.py train test
	touch $@
endif

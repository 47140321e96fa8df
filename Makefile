# Two commands do everything: `make demo` and `make test`. Each makes .venv first if it is not there.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test fast nightly lint type docs site check bench wheel clean

# torch is installed first, so that TORCH can name another version. The default build for Linux brings gigabytes of CUDA libraries; without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu chooses the build without them.
$(BIN)/.installed: pyproject.toml setup.py $(wildcard billhook/runtime/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

$(BIN)/.installed-dev-slow: $(BIN)/.installed-dev
	$(BIN)/pip install -q -e ".[dev-slow]"
	touch $@

setup: $(BIN)/.installed-dev

demo: $(BIN)/.installed
	$(BIN)/billhook demo --output demo-output

test: $(BIN)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

fast: $(BIN)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not nightly and not gate"

# Everything: all model families, faults, sanitizers, several processes, every example and page. About an hour on two cores.
nightly: $(BIN)/.installed-dev-slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "nightly or not nightly"

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(BIN)/.installed-dev
	$(BIN)/mypy

docs: $(BIN)/.installed-dev
	$(BIN)/python tools/make_docs.py

site: docs $(BIN)/.installed-dev-slow
	$(BIN)/mkdocs build --strict

check: lint type test

# Every benchmark that runs without being told about models and texts; a few hours on two cores. One alone: make bench BENCH=benchmarks/auto.py
TOLD := $(shell grep -l -e 'argument."model"' -e 'argument."folder"' -e 'argument."what"' -e required=True benchmarks/*.py)
BENCH ?= $(filter-out $(addprefix benchmarks/,published.py quiet_timing.py) $(TOLD),$(wildcard benchmarks/*.py))

bench: $(BIN)/.installed-dev
	@for file in $(BENCH); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# A wheel for this platform, kernels compiled in, and the source distribution, under dist/.
wheel: $(BIN)/.installed
	$(BIN)/pip install -q build
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist demo-output site

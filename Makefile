# `make` lists what there is. Every target makes .venv by itself.
# PIP_ARGS is handed to every pip call, for instance an index of CPU wheels of torch.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin

# Which tests `make quick` runs, as pytest's -m takes it; ARGS goes to pytest as it is (a file, -k name, -x).
QUICK ?= not slow and not gpu and not full
ARGS ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo evidence quick test slow lmms kvpress format lint types notebooks docs build check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "avlprof needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null 2>&1; then true; else \
	  $(BIN)/python -m pip install -q $(PIP_ARGS) -r constraints-cpu.txt; fi
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e '.[dev]'
	touch $@

demo: $(VENV)/ready ## the whole loop on the embedded model: trace, analyse, derive, tune, prove, run
	$(BIN)/avlprof demo --out demo

evidence: $(VENV)/ready ## docs/evidence.md: trace, tune and compare on tiny, tiny-mrope and small (fetched first); over an hour
	$(BIN)/avlprof models fetch small
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.evidence $(ARGS)

quick: $(VENV)/ready ## the inner loop: tests that are not full, slow or for a GPU; `make quick ARGS=tests/test_docs.py`
	$(PYTEST) -m '$(QUICK)' $(ARGS)

test: $(VENV)/ready ## all tests but the slow ones; those for a GPU are skipped without one
	$(PYTEST) -m 'not slow' $(ARGS)

slow: $(VENV)/ready ## the slow tests: large matrices, campaigns of damaged files, kills
	$(PYTEST) -m slow $(ARGS)

lmms: $(VENV)/lmms ## lmms-eval, for the tests of its plug-in; they are skipped without it

$(VENV)/lmms: $(VENV)/ready requirements-lmms.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps -r requirements-lmms.txt
	touch $@

kvpress: .venv-kvpress/ready ## kvpress in its own environment, for the test of what is exported to it

.venv-kvpress/ready: requirements-kvpress.txt constraints-cpu.txt
	$(PYTHON) -m venv .venv-kvpress
	if command -v nvidia-smi >/dev/null 2>&1; then true; else \
	  .venv-kvpress/bin/python -m pip install -q $(PIP_ARGS) -r constraints-cpu.txt; fi
	.venv-kvpress/bin/python -m pip install -q $(PIP_ARGS) -r requirements-kvpress.txt
	touch $@

format: $(VENV)/ready ## mend style: imports, layout, what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/ready ## ruff, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready ## mypy, strict
	$(BIN)/mypy

notebooks: $(VENV)/ready ## run every notebook from start to end
	$(BIN)/python notebooks/run.py

docs: $(VENV)/docs ## the documentation site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/docs: $(VENV)/ready
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e '.[docs]'
	touch $@

build: $(VENV)/ready ## wheel and sdist in dist/
	$(BIN)/python -m build

check: test lint types notebooks docs ## all that must pass before a change is merged

clean: ## remove what the targets made
	rm -rf $(VENV) demo build dist site

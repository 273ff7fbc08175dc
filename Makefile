# `make demo` shows the main job, `make test` passes the tests; both make .venv by themselves.
# PIP_ARGS is handed to every pip call, for instance an index of CPU wheels of torch.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo test lmms lint types notebooks check clean

$(VENV)/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "avlprof needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null 2>&1; then true; else \
	  $(BIN)/python -m pip install -q $(PIP_ARGS) -r constraints-cpu.txt; fi
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/avlprof demo --out demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

# lmms-eval, for the tests of its plug-in; they are skipped without it
lmms: $(VENV)/lmms

$(VENV)/lmms: $(VENV)/ready requirements-lmms.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps -r requirements-lmms.txt
	touch $@

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

notebooks: $(VENV)/ready
	$(BIN)/python notebooks/run.py

check: test lint types notebooks

clean:
	rm -rf $(VENV) demo build dist

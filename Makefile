# make demo, make test: from a fresh clone, everything they need is set up first, and not again while nothing changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint notebooks clean

demo: $(READY)
	$(BIN)/python run.py experiment=demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(READY)
	$(BIN)/python -m analysis.plots
	$(BIN)/python -m analysis.execute

# --no-compile: most modules of the packages are never imported, and need no bytecode.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)

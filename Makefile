PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the tests in a browser saw.
export ADOPT_SCREENSHOTS ?= $(CURDIR)/build/screenshots

.PHONY: demo test slow lint format types bench docs clean

# Everything on a fresh machine: environment, package, search, table, picture.
demo: $(VENV)/installed
	$(BIN)/adopt run --study faces-4
	$(BIN)/adopt sample --study faces-4 --out faces-4.png
	@echo "to type adopt alone: . $(BIN)/activate"

# On all cores; a process that runs out of tests takes some of another's.
test: $(VENV)/tested
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

slow: $(VENV)/tested
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/tested
	$(BIN)/mypy autodiffusion_optuna

# Hours on two cores; each script writes benchmarks/results/NAME.json.
bench: $(VENV)/tested
	$(BIN)/python benchmarks/studies.py digits-4 digits-4-paper digits-10-layers faces-4 faces-6 faces-10 faces-solvers-6 --seeds 0 1 2
	for script in race prefix prefix_solvers skip_time overhead frechet dashboard storage model_card; do $(BIN)/python benchmarks/$$script.py || exit 1; done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check cmaes # one of the rivals needs it, the package does not
	$(BIN)/python benchmarks/rivals.py
	$(BIN)/python docs/generate.py

# The tables of README and docs/, from the code and from benchmarks/results.
docs: $(VENV)/tested
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/tested: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@ $(VENV)/installed

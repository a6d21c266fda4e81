PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the tests in a browser saw.
export ADOPT_SCREENSHOTS ?= $(CURDIR)/build/screenshots

.PHONY: demo test slow lint format types bench clean

# Everything on a fresh machine: environment, package, search, table, picture.
demo: $(VENV)/installed
	$(BIN)/adopt run --study digits-4
	$(BIN)/adopt sample --study digits-4 --out digits-4.png

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
	$(BIN)/python benchmarks/studies.py digits-4 digits-6 digits-10 digits-4-paper digits-10-layers
	for script in prefix prefix_solvers skip_time overhead mixture frechet dashboard storage model_card tables; do $(BIN)/python benchmarks/$$script.py || exit 1; done

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

# Needs Python 3.11 or newer and make; everything else is installed into .venv, once.
PYTHON ?= python3
BIN := .venv/bin
# Small models on shared cores: a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test lint toy clean

quickstart: .venv/ready
	rm -rf runs/quickstart
	$(BIN)/pgpo fit --config configs/quickstart.yaml

test: .venv/ready lint
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check pgpo_lightning callbacks tests benchmarks
	$(BIN)/ruff format --check pgpo_lightning callbacks tests benchmarks

# Rebuilds the shipped base model of the toy task.
toy: .venv/ready
	$(BIN)/python -m pgpo_lightning.data.toy_base --seed 0 --output pgpo_lightning/assets/toy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

clean:
	rm -rf .venv runs

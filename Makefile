# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.PHONY: setup quickstart test test-engines lint

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/mllm-cl run recipes/quickstart.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not engines' -n 2 --dist loadfile

test-engines: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m engines

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

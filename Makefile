# Nothing but Python 3.11+ is needed (PYTHON=python3.12 make test picks one).

PYTHON ?= python3
BIN := .venv/bin

help:           ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST)

demo: .venv/ready  ## FARSS and LoRA on the microcosm, side by side, in one table (one to three minutes)
	$(BIN)/python train.py

lint: .venv/ready-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint      ## lint, then all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-referee: .venv-referee/ready  ## lm_eval's own code beside this one's, in an environment of its own
	HF_HUB_OFFLINE=1 .venv-referee/bin/python -m pytest tests/test_referee.py

clean:          ## remove the environment, all runs and all caches
	rm -rf .venv .venv-referee runs .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11+ is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

# curvlinops asks for torchvision through backpack, which no test uses and which would replace torch
.venv/ready-dev: .venv/ready requirements-dev.txt requirements-transformers4.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1
	$(BIN)/pip install --quiet --upgrade --no-deps --target .venv/transformers4 --requirement requirements-transformers4.txt
	touch $@

# llama-index-core for NLTK's sentence splitter alone, which IFEval takes and no package has by itself
.venv-referee/ready: requirements-referee.txt
	$(PYTHON) -m venv --clear .venv-referee
	.venv-referee/bin/pip install --quiet --requirement requirements-referee.txt
	.venv-referee/bin/pip install --quiet --no-deps --target .venv-referee/splitter llama-index-core==0.12.52
	mv .venv-referee/splitter/llama_index/core/_static/nltk_cache .venv-referee/nltk_data
	rm -r .venv-referee/splitter
	touch $@

.PHONY: help demo lint test test-referee clean

# make demo    set up .venv and run FARSS and LoRA, training and evaluation
# make test    set up .venv with the test requirements and run all tests
# Nothing else is needed on a machine with Python 3.11+ (PYTHON=python3.12 make test picks one).

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

demo: .venv/ready
	@echo "Until the small default world exists, this is a tiny Llama of RANDOM weights:"
	@echo "it shows the path from initialisation to table, and can know and answer nothing."
	rm -rf $(DEMO)
	$(BIN)/python tests/tiny.py $(DEMO)
	for method in farss lora; do \
	  $(BIN)/python train.py --model $(DEMO)/model --data $(DEMO)/train.jsonl --method $$method \
	    --rank 8 --r-avg 4 --r-max 8 --calibration 32 --batch-size 8 --epochs 4 --lr 3e-3 \
	    --out $(DEMO)/$$method || exit 1; \
	done
	for target in model farss lora; do \
	  $(BIN)/python eval.py $(DEMO)/$$target --max-new-tokens 32 --out $(DEMO)/results-$$target \
	    --data gsm8k=$(DEMO)/test.jsonl nq_open=$(DEMO)/nq.jsonl webqs=$(DEMO)/webqs.json \
	    || exit 1; \
	done
	$(BIN)/python eval.py --table $(DEMO)/results-model $(DEMO)/results-farss $(DEMO)/results-lora

test: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11+ is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

# curvlinops asks for torchvision through backpack, which no test uses and which would replace torch
.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis

.PHONY: demo test clean

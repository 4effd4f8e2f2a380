# make demo   set up, then run the whole method on the embedded TOY dataset (no account, no data, no GPU needed)
# make test   set up, then run every test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/python toy.py
	$(BIN)/python preprocessing.py --dataset TOY --backbone efficientnet_lite2 --img_size 224
	$(BIN)/python train_joint.py --wandb offline

test: $(VENV)/installed-test
	$(BIN)/python -m pytest tests

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 12) else "Python 3.10 to 3.12 is needed, this is " + sys.version.split()[0] + "; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache

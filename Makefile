# make demo        set up, then run the whole method on the embedded TOY dataset (no account, no data, no GPU needed)
# make test        set up, then run every test; make test-long adds the long kill tests
# make doctor      check the installation and the data, and say what to run next
# make seeds DATASET=CUB N=5 [FLAGS=...]    N runs in sequence, then the table
# make ablations [DATASET=TOY N=3 FLAGS=...] every file of wandb_config/ablations, N seeds each, then the table
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATASET ?= TOY
N ?= 3
SCRIPT = train_joint.py --dataset $(DATASET)
CONFIG = wandb_config/$(if $(filter TOY,$(DATASET)),toy,$(shell echo $(DATASET) | tr A-Z a-z)_gzsl).yaml

.PHONY: demo test test-long doctor seeds ablations clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/python -m scegg.datasets.toy
	$(BIN)/python preprocessing.py --dataset TOY --backbone efficientnet_lite2 --img_size 224 --normalization backbone
	$(BIN)/python train_joint.py --wandb offline

test: $(VENV)/installed-test
	$(BIN)/python -m pytest tests

test-long: $(VENV)/installed-test
	$(BIN)/python -m pytest tests -m "long or not long"

doctor: $(VENV)/installed
	$(BIN)/python -m scegg.doctor

seeds: $(VENV)/installed
	for seed in $$(seq 1 $(N)); do $(BIN)/python $(SCRIPT) --seed $$seed $(FLAGS) || exit; done
	$(BIN)/python results.py --dataset $(DATASET)

ablations: $(VENV)/installed
	for seed in $$(seq 1 $(N)); do for changes in "" wandb_config/ablations/*.yaml; do \
	    $(BIN)/python $(SCRIPT) --config $(CONFIG) $$changes --seed $$seed --reuse_scen --runs runs/ablations $(FLAGS) || exit; done; done
	$(BIN)/python results.py runs/ablations --dataset $(DATASET)

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

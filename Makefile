# make demo         set up, then run the whole method on built-in TOY: no account, no data, no GPU
# make test         set up, then run every test but the long ones
# make test-long    the same with the long ones
# make lint         check the code with ruff alone
# make format       format the code with ruff
# make toy          render TOY below data/
# make doctor       check the installation and the data, and say what to run next
# make benchmark    time every stage [FLAGS="--size SUN --against plain"]
# make gpu          measure all that a GPU has to show, in 8 minutes [FLAGS="--parts cub,sun"]
# make seeds        train with N seeds, then print the table [DATASET=CUB N=5 FLAGS=...]
# make ablations    train every file of wandb_config/ablations with N seeds, then print the table
# make reproduce    train the rows of docs/results.md with N seeds, compare them with the records
#                   [DATASET=TOY|CUB50|CUB50_PAPER_PIXELS|CUB|SUN|AWA2 N=3 DATA_ROOT=data]
# make clean        remove the virtual environment and the tools' caches
#
# Python 3.11 to 3.14 is needed; choose one with: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV ?= .venv
DATASET ?= TOY
N ?= 3
FLAGS ?=
DATA_ROOT ?= data

BIN := $(VENV)/bin
TRAIN = $(BIN)/python train_joint.py --dataset $(DATASET)

LOWER = $(shell echo $(DATASET) | tr A-Z a-z)
CONFIG = wandb_config/$(if $(filter TOY,$(DATASET)),toy,$(LOWER)_gzsl).yaml

# how docs/results.md makes its rows: features, settings, what of wandb_config/ablations is laid over
CUB50_RUN = --backbone efficientnet_lite2 --batch_size 40 --scen_iterations 800 \
    --distill_iterations 1000 --nepoch 4
PIXELS_TOY = --backbone efficientnet_lite2 --img_size 224 --normalization backbone
PIXELS_CUB50 = --backbone efficientnet_lite2 --normalization backbone
PIXELS_CUB50_PAPER_PIXELS = --backbone efficientnet_lite2
SETTINGS_CUB50 = $(CUB50_RUN) --matmul_precision medium --joint_refresh 92
SETTINGS_CUB50_PAPER_PIXELS = $(CUB50_RUN)
CHANGES_CUB50 = wandb_config/ablations/*.yaml
RECORDS_CUB50_PAPER_PIXELS = docs/records/paper_pixels_float32

IS_CUB50 = $(filter CUB50%,$(DATASET))
NAME = $(if $(IS_CUB50),CUB,$(DATASET))
SETTINGS = $(SETTINGS_$(DATASET)) $(FLAGS)
RECORDS = $(or $(RECORDS_$(DATASET)),docs/records)
BASE = $(if $(IS_CUB50),wandb_config/sun_gzsl.yaml,$(CONFIG))
FEATURES = data/$(NAME)/reproduce_$(DATASET).hdf5

.PHONY: demo test test-long lint format toy doctor benchmark gpu seeds ablations reproduce clean
.DELETE_ON_ERROR:

demo: toy
	$(BIN)/python preprocessing.py --dataset TOY \
	    --backbone efficientnet_lite2 --img_size 224 --normalization backbone
	$(BIN)/python train_joint.py --wandb offline

# Two tests at a time: most of them wait for processes that they started.
test: lint
	$(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal

test-long: $(VENV)/installed-test
	$(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal -m "long or not long"

lint: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/installed-test
	$(BIN)/ruff format

toy: $(VENV)/installed
	$(BIN)/python -m scegg.datasets.toy

doctor: $(VENV)/installed
	$(BIN)/python -m scegg.doctor

benchmark: $(VENV)/installed
	$(BIN)/python -m benchmarks $(FLAGS)

gpu: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.gpu $(FLAGS)

seeds: $(VENV)/installed
	for seed in $$(seq 1 $(N)); do \
	    $(TRAIN) --seed $$seed $(FLAGS) || exit; \
	done
	$(BIN)/python results.py --dataset $(DATASET)

# "" is SC-EGG itself, without changes.
ablations: $(VENV)/installed
	for seed in $$(seq 1 $(N)); do \
	    for changes in "" wandb_config/ablations/*.yaml; do \
	        $(TRAIN) --config $(CONFIG) $$changes --seed $$seed \
	            --reuse_scen --runs runs/ablations $(FLAGS) || exit; \
	    done; \
	done
	$(BIN)/python results.py runs/ablations --dataset $(DATASET)

reproduce: $(VENV)/installed $(if $(filter TOY,$(DATASET)),toy)
	test -f $(FEATURES) || $(BIN)/python preprocessing.py --dataset $(NAME) \
	    --data_root $(DATA_ROOT) $(or $(PIXELS_$(DATASET)),--compression) --output $(FEATURES)
	for seed in $$(seq 1 $(N)); do \
	    for changes in "" $(CHANGES_$(DATASET)); do \
	        $(BIN)/python train_joint.py --dataset $(NAME) --data_root $(DATA_ROOT) \
	            --features $(FEATURES) --config $(BASE) $$changes $(SETTINGS) --seed $$seed \
	            --log_figures true --reuse_scen --runs runs/reproduce_$(DATASET) || exit; \
	    done; \
	done
	$(BIN)/python results.py runs/reproduce_$(DATASET) --dataset $(NAME) --against $(RECORDS)

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || \
	    { echo "Python 3.11 to 3.14 is needed, and $(PYTHON) is not one:" \
	           "choose another with make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt requirements-timm.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

# make demo   search a cell on real handwritten digits, train the network it makes, test it
# make test   lint, then the tests
# make lint   lint alone
# make slow   the tests that take long
# make evidence  the published search four times, and what its cells are worth: weeks on one GPU
# make gpu    all that needs a CUDA GPU: tests, benchmark, a short search; gpu-report.md
# make clean  remove the virtual environment and the caches; runs stay
#
# The first of them makes a virtual environment in .venv with all that is needed in it; the tests
# install more (requirements-dev.txt) than the demo (requirements.txt).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.installed
READY_DEV = $(VENV)/.installed-dev

RUNS ?= runs
SEARCH_FLAGS ?= --set digits --layers 5 --epochs 8 --begin 3 --batch_size 64
TRAIN_FLAGS ?= --set digits --layers 8 --init_channels 16 --epochs 20 --batch_size 64 --drop_path_prob 0.1
SEARCH = $$(ls -d $(RUNS)/search-demo-* | tail -n 1)
TRAIN = $$(ls -d $(RUNS)/eval-demo-* | tail -n 1)

# Of the published sizes an estimate, from published figures alone: 4 searches of 0.1 GPU days (Xu et
# al., 2020, table 1) and 18 trainings of 600 epochs, each 1.5 (Liu et al., 2019, appendix A.2.1), both
# on a GTX 1080 Ti: 27 GPU days. Nothing of it was measured with this code.
EVIDENCE_COST = estimated from published figures, GTX 1080 Ti: 4 searches of 0.1, 18 trainings of 1.5
EVIDENCE_FLAGS ?= --set cifar10 --searches 4 --seeds 2 --epochs 600 --init_channels 36 --layers 20

.PHONY: demo test lint slow gpu evidence clean

demo: $(READY)
	$(BIN)/python train_search.py --save $(RUNS)/demo $(SEARCH_FLAGS)
	$(BIN)/python train.py --save $(RUNS)/demo --arch "$(SEARCH)" $(TRAIN_FLAGS)
	@echo
	@grep -h "test accuracy" "$(TRAIN)/log.txt" | tail -n 1
	@echo "the search, and the cell it found:  $(SEARCH)/genotype.json"
	@echo "the network trained from that cell: $(TRAIN)/weights.pt"

test: lint  # two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

slow: $(READY_DEV)
	$(BIN)/python -m pytest -m slow

evidence: $(READY)
	@echo "In the published sizes about 27 GPU days ($(EVIDENCE_COST))."
	$(BIN)/python -m evidence.cells --root $(RUNS)/cells $(EVIDENCE_FLAGS)

gpu: $(READY_DEV)  # docs/gpu.md
	$(BIN)/python tests/gpu.py gpu-report.md

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY_DEV): $(READY) $(wildcard requirements*.txt)
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

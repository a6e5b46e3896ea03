# make demo   search a cell on small real images, train the network it makes, test it
# make test   lint, then the tests
# make slow   the tests that take long
# make clean  remove the virtual environment and the caches; runs stay
#
# The first of them makes a virtual environment in $(VENV) with all that is needed in it.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.installed

DEMO = demo
SEARCH_FLAGS ?= --set digits
TRAIN_FLAGS ?= --set digits

.PHONY: demo test lint slow clean

demo: $(READY)
	$(BIN)/python train_search.py --save $(DEMO) $(SEARCH_FLAGS)
	search=$$(ls -d search-$(DEMO)-* | tail -n 1) && \
		$(BIN)/python train.py --arch "$$search" --save $(DEMO) $(TRAIN_FLAGS)
	@search=$$(ls -d search-$(DEMO)-* | tail -n 1) && \
		eval=$$(ls -d eval-$(DEMO)-* | tail -n 1) && \
		echo && tail -n 1 "$$eval/log.txt" && \
		echo "the search and the cell it found: $$search (genotype.json)" && \
		echo "the network trained from the cell: $$eval (weights.pt)"

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

slow: $(READY)
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 2; }
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

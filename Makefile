# Needs python3 (3.11 or newer), git and make; everything else goes into .venv.
PYTHON ?= python3
PYTHON_NEXT ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help install install-test test test-next test-slow lint demo clean

help:
	@echo "make install        jgrpo and what it needs, at pinned versions, into .venv"
	@echo "make demo           train a tiny model end to end on the CPU"
	@echo "make test           lint, import rules and all tests"
	@echo "make test-next      what depends most on versions, on $(PYTHON_NEXT) with its newest JAX, in .venv-next"
	@echo "make test-slow      what takes minutes a test: kills, lost hosts, two processes, buckets, optimised programs"
	@echo "make lint           ruff and the import rules only"
	@echo "make install-test   what the tests need besides"
	@echo "make clean          remove .venv and caches"

install: $(VENV)/.installed

install-test: $(VENV)/.installed-test

test: lint
	@echo "==> pytest"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-next:
	@$(MAKE) --no-print-directory install-test VENV=.venv-next PYTHON=$(PYTHON_NEXT)
	@echo "==> pytest on $$(.venv-next/bin/python --version)"
	@.venv-next/bin/python -m pytest -q -n 2 --dist loadfile tests/parity tests/invariance tests/e2e/test_bucket.py

test-slow: install-test
	@$(BIN)/python -m pytest -q -m slow
	@OPTIMISED=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/invariance

lint: install-test
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> import rules"
	@$(BIN)/lint-imports --no-logo

demo: install
	@$(BIN)/jgrpo demo

clean:
	rm -rf .venv .venv-next .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing jgrpo and its dependencies into $(VENV)"
	@$(PIP) --editable .
	@touch $@

# torchaudio is the reference for the log-mel front end. Its wheel carries libraries built for CUDA that do not load
# beside a CPU torch; without them it falls back to Python, and MelSpectrogram needs nothing more.
$(VENV)/.installed-test: $(VENV)/.installed
	@echo "==> installing the test tools and the reference implementation (torch) into $(VENV)"
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps torchaudio==2.11.0
	@find $(VENV) -path '*/torchaudio/*' -name '*.so' -delete
	@touch $@

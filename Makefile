# Needs python3 (3.11 or newer), git and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help install install-test test lint demo clean

help:
	@echo "make install        jgrpo and what it needs, at pinned versions, into .venv"
	@echo "make demo           train a tiny model end to end on the CPU"
	@echo "make test           lint, import rules and all tests"
	@echo "make lint           ruff and the import rules only"
	@echo "make install-test   what the tests need besides"
	@echo "make clean          remove .venv and caches"

install: .venv/.installed

install-test: .venv/.installed-test

test: lint
	@echo "==> pytest"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: install-test
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> import rules"
	@$(BIN)/lint-imports --no-logo

demo: install
	@$(BIN)/jgrpo demo

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "==> creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing jgrpo and its dependencies into .venv"
	@$(PIP) --editable .
	@touch $@

# torchaudio is the reference for the log-mel front end. Its wheel carries libraries built for CUDA that do not load
# beside a CPU torch; without them it falls back to Python, and MelSpectrogram needs nothing more.
.venv/.installed-test: .venv/.installed
	@echo "==> installing the test tools and the reference implementation (torch) into .venv"
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps torchaudio==2.11.0
	@find .venv -path '*/torchaudio/*' -name '*.so' -delete
	@touch $@

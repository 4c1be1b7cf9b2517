# Two commands do everything: `make demo` and `make test`. Each sets up .venv first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: help venv demo test test-slow lint clean
help:
	@sed -n 's/^## //p' Makefile

## make venv       .venv with every package of this tree, editable, under constraints.txt
venv: $(STAMP)

$(STAMP): requirements.txt requirements-test.txt $(CONSTRAINTS) $(wildcard */pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --requirement requirements.txt --requirement requirements-test.txt
	@touch $@

## make demo       text to trained, evaluated, exported model, in a few minutes on two cores; see demo-run/report.md
demo: $(STAMP)
	$(VENV)/bin/python -m tests.demo --out demo-run

## make test       all quick tests
test: $(STAMP)
	$(VENV)/bin/python -m pytest -m "not slow and not gpu" -n 2 $(PYTEST_ARGS)

## make test-slow  the tests that take minutes
test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest -m "slow and not gpu" -n 2 $(PYTEST_ARGS)

## make lint       ruff
lint: $(STAMP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) demo-run

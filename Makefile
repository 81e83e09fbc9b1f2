# Needs Python 3.11 or newer and nothing else: each target first installs what it needs into .venv, once.
#
#   make demo                  200 orders, a killed worker, and the books (less than a minute)
#   make demo ORDERS=file      the same with orders of your own, one JSON object a line
#   make test                  the tests; ARGS="-k refund" goes to pytest
#   make bench                 this beside chain, celery-saga and others, in 3 to 4 minutes; ARGS="--full", ARGS="--list"
#   make lint                  ruff, mypy, import-linter
#   make clean                 removes .venv and what the tools leave behind

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test bench lint clean
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/.demo
	@$(BIN)/python -m tasks.demo $(if $(ORDERS),--orders "$(ORDERS)")

test: .venv/.test
	$(BIN)/python -m pytest -n 4 --dist=loadscope --no-loadscope-reorder $(ARGS)

bench: .venv/.bench$(if $(findstring --full,$(ARGS)),-full)
	$(BIN)/python -m benchmarks $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find benchmarks orchestrator tasks tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.%: pyproject.toml | .venv/bin/python
	@echo "Installing celery-orchestrator[$*] into .venv"
	@$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv .venv

# Everything a user does. All state stays in this folder: .venv/ and .kat/.
PYTHON ?= python3.11
VENV := .venv
KAT := $(VENV)/bin/kat
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup run up down report test check clean

help:  ## show this help
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## make .venv from the pinned constraints

$(STAMP): pyproject.toml constraints/py311.txt
	@scripts/setup "$(PYTHON)" "$(VENV)"
	@touch $@

run: setup  ## the whole loop through Airflow, to the end (PRESET=nano SEED=0)
	@$(KAT) run --preset $(or $(PRESET),nano) --seed $(or $(SEED),0)

up: setup  ## Airflow UI on :8080 and MLflow UI on :5000, both on loopback
	@$(KAT) up

down:  ## stop what `up` started
	@test ! -x $(KAT) || $(KAT) down

report: setup  ## the last run's table
	@$(KAT) report

check: setup  ## format, lint, types, import contracts
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	PYTHONPATH=plugins $(VENV)/bin/lint-imports

test: check  ## everything the gate runs
	$(VENV)/bin/pytest -n 2 --dist loadgroup

clean: down  ## remove the environment and all runs
	rm -rf $(VENV) .kat

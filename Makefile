# Every target makes what it needs: a virtual environment, the installation, nothing outside this folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE
.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench claims torture torture-recall clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(VENV)/base ## a week in the life of a model, two ways; ends by naming report.html
	$(BIN)/remanence demo

test: $(VENV)/dev ## the tests (about ten minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not long" -n auto --dist worksteal

lint: $(VENV)/dev ## ruff, mypy, and who may import whom
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/dev ## the documentation site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/dev ## speed beside peers, in one run
	$(BIN)/python -m benchmarks

claims: $(VENV)/base ## run every desk claim and save what came out
	$(BIN)/remanence reproduce --all --save

torture: $(VENV)/dev ## kill a run at 100 random instants, resume it, compare
	$(BIN)/python -m benchmarks.torture

torture-recall: $(VENV)/dev ## fifty clients, kills, a full disk, damage and nonsense against the conversation memory
	$(BIN)/python -m benchmarks.torture_recall

clean: ## remove what these targets made here
	rm -rf $(VENV) .venv-avalanche .venv-titans .venv-recall-peers runs site

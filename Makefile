# The one face of the project: make demo, make test; `make help` lists the rest.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export OMP_WAIT_POLICY = passive

.PHONY: help install demo test test-all lint fmt clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(VENV)/.stamp  ## make .venv, or bring it up to date

$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV); some minutes the first time ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install    ## three phantom sites, end to end, to a report
	@$(BIN)/synthward run configs/demo.toml

test: install    ## everything that is quick: under 10 minutes on two cores
	@$(BIN)/python -m pytest

test-all: install  ## also the slow ones
	@$(BIN)/python -m pytest -m ""

lint: install    ## ruff, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports

fmt: install     ## format, and mend what ruff can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:           ## remove what was built, but no run
	@rm -rf $(VENV) build dist *.egg-info .ruff_cache .pytest_cache .hypothesis *.fab

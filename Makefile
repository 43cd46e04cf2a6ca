# The one face of the project: make demo, make test; `make help` lists the rest.
VENV := .venv
BIN := $(VENV)/bin
# The first Python on the path that fits `requires-python`; or say it: make install PYTHON=/path/to/python3.11
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	2>/dev/null && command -v $$p && break; done)

# Flower neither phones home nor installs anything by itself; idle OpenMP threads sleep.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export UV_OFFLINE = 1
export RAY_USAGE_STATS_ENABLED = 0
export OMP_WAIT_POLICY = passive

.DEFAULT_GOAL := help
.PHONY: help install demo deploy-demo soak test test-all docker-test mutations lint fmt report bench-utility clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 12

install: $(VENV)/.stamp  ## make .venv, or bring it up to date

# A virtual environment that is missing, half made, moved or of another Python is made anew; else it is brought up to
# date. The stamp is written last, so an installation that was cut off is taken up by the next call.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(BIN)/python -c 'import sys, pip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
		test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 with venv on the path. Install python3.11-venv, or give PYTHON=..." >&2; exit 2; }; \
		echo "making $(VENV) with $(PYTHON) ..."; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing into $(VENV); some minutes the first time ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install    ## three phantom sites, end to end, to a report
	@$(BIN)/synthward run configs/demo.toml

deploy-demo: install  ## a coordinator and three hospitals as separate processes, two of them killed on the way
	@$(BIN)/python tests/deploy_demo.py

soak: install    ## MINUTES=30 of studies by SITES=5 hospitals, whose parts are killed at random; memory has to stay flat
	@MINUTES=$(or $(MINUTES),30) SITES=$(or $(SITES),5) $(BIN)/python tests/soak.py

test: install    ## everything that is quick: under 10 minutes on two cores
	@$(BIN)/python -m pytest

test-all: install  ## also the slow ones
	@$(BIN)/python -m pytest -m ""

docker-test: install  ## builds the images without a container engine and takes a study through them (root, buildah)
	@SYNTHWARD_DOCKER_TEST=1 $(BIN)/python -m pytest -m "" -rs tests/docker

mutations: install  ## takes out one guard at a time; the quick tests have to see each (about 15 minutes)
	@$(BIN)/python tests/mutations.py $(ARGS)

lint: install    ## ruff, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports --no-logo --no-cache

fmt: install     ## format, and fix what ruff can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# QUICK=1: two small runs in under ten minutes, kept out of the committed results; ARGS="--only pneumoniamnist-eps8".
DATA ?= ../shared/data
bench-utility: install  ## utility over epsilon on real images, to benchmarks/utility; QUICK=1, DATA=folder of npz files
	@$(BIN)/python -m benchmarks.utility.run --data "$(DATA)" $(if $(QUICK),--quick --out runs/bench-utility-quick) $(ARGS)

report:          ## where the newest run's report is
	@ls -t runs/*/release/report.html 2>/dev/null | head -n 1 | grep . || { echo "no report under runs/: make demo makes one" >&2; exit 1; }

clean:           ## remove what was built, but no run
	@rm -rf $(VENV) build dist *.egg-info .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.fab

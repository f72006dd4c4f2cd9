# Everything a checkout needs, given make and Python 3.11 or newer. `make` lists the targets.
# Works from anywhere with `make -C <checkout>`; recipes run beside this file.

# An interpreter with an environment of your own, given on the command line; empty: .venv, made on first use.
PYTHON :=
# Build of torch, if it has to be installed: cpu or cuda; empty: as the machine is.
TORCH ?=
# Ray's usage statistics are sent only to those who ask for it.
RAY_USAGE_STATS_ENABLED ?= 0
export TORCH RAY_USAGE_STATS_ENABLED

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help quickstart test faults check check-cluster crds format clean always

ifeq ($(wildcard cluster/install.sh),)
$(error this is not the checkout; use make -C <checkout>)
endif

ifeq ($(strip $(PYTHON)),)
python := .venv/bin/python
ready := .venv/.ready-
# An environment that was copied or moved still points at the place it came from.
moved := $(shell [ "$$(cat .venv/.place 2>/dev/null)" = "$$(pwd -P)" ] || echo always)
else
python := $(PYTHON)
ready := yours-
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s%s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=/path/to/python uses that environment instead of .venv and adds what it lacks."
	@echo "  TORCH=cpu or TORCH=cuda chooses the build that is installed; after make clean if there is one."

quickstart: $(ready)base ## log to verified bundle on a synthetic log, into runs/quickstart
	@"$(python)" jobs/train.py

# Two files at a time, as most tests wait for processes that they start; in the order of their collection.
test: $(ready)test ## run the tests
	@"$(python)" -m pytest -n 2 --dist loadfile --no-loadscope-reorder

faults: $(ready)test ## run the tests that lose, drain and hang nodes of clusters of their own, and kill nights: many minutes
	@"$(python)" -m pytest -m faults

check: $(ready)dev ## what a change has to pass besides the tests: format, lint, types
	@"$(python)" -m ruff format --check .
	@"$(python)" -m ruff check .
	@"$(python)" -m mypy

check-cluster: crds $(ready)test ## check cluster/ against the schemas of a KubeRay release: CRDS=<folder of its CRDs>
	@CRDS="$(abspath $(CRDS))" "$(python)" -m pytest tests/test_cluster.py

format: $(ready)dev ## apply the format and the fixes that are safe
	@"$(python)" -m ruff check --fix --exit-zero --quiet .
	@"$(python)" -m ruff format .

clean: ## remove .venv, runs/quickstart and every cache
	rm -rf .venv runs/quickstart build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . \( -name .git -o -name runs \) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# The last thing an installation writes; one a set of extras.
.venv/.ready-%: pyproject.toml $(moved)
	@sh cluster/install.sh $*

# Somebody else's environment may change at any time, so it is looked at each time.
yours-%: always
	@sh cluster/install.sh $* "$(PYTHON)"

# Before anything is installed.
crds:
	@test -d "$(CRDS)" || { echo "CRDS=$(CRDS): give the folder of a KubeRay release's CRDs, helm-chart/kuberay-operator/crds"; exit 2; }

always:

# Everything sets itself up on a fresh Debian 12 as root: `make test`, `make demo`, `make bench`.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
T ?= all
ROWS ?=
PYTEST_ARGS ?=

# The lab and the harness are packages below tests/ and deploy/.
export PYTHONPATH := $(CURDIR):$(CURDIR)/tests:$(CURDIR)/deploy
export PYTHONDONTWRITEBYTECODE ?= 1

.PHONY: help venv peers test lint demo bench clean

help:
	@echo 'make test [T=unit,property,pair,interop]   run all tests, or some tiers'
	@echo 'make test T=realkernel                     only those in a Debian kernel under QEMU (part of all, too)'
	@echo 'make lint                                  ruff, formatting, mypy --strict'
	@echo 'make demo                                  two gateways and two hosts, in under a minute'
	@echo 'make bench [ROWS=a,b]                      figures, beside strongSwan'
	@echo 'make venv | peers | clean                  set up, take away'

$(STAMP): pyproject.toml
	@.ci/provide python "$(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

venv: $(STAMP)

# Foreign peers and the lab's tools; installs only what is missing, and starts no service. Peers of a newer Debian go into build/peers.
peers:
	@.ci/provide peers

test: venv peers
	$(BIN)/python -m pytest $(shell .ci/provide tiers '$(T)') $(PYTEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=tests:deploy $(BIN)/mypy --strict -p lab -p bench -p demo -p simulation

demo: venv
	@.ci/provide demo
	@$(BIN)/python -m demo

bench: venv peers
	@$(BIN)/python -m bench $(if $(ROWS),--rows '$(ROWS)')

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

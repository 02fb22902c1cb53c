# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes .venv,
# installs what it uses and runs.

SHELL := /bin/bash
VENV ?= .venv
TORCH ?= torch==2.13.0

# The first interpreter that really starts (a shim on PATH may not) and can make an environment;
# 3.11 and 3.12 are tested, hence before anything newer.
PYTHON ?= $(shell for newest in 12 99; do for python in python3 python3.12 python3.11; do \
	$$python -c "import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $$newest))" \
	>/dev/null 2>&1 && echo $$python && exit; done; done)

PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all lint paper picture clean

demo: $(VENV)/installed-plots
	$(VENV)/bin/mnemosyne demo

test: $(VENV)/installed-plots-serve-smollm2-dev
	$(VENV)/bin/python -m pytest -q

test-all: $(VENV)/installed-plots-serve-smollm2-dev
	$(VENV)/bin/python -m pytest -q -m ""

lint: $(VENV)/installed-plots-serve-smollm2-dev
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/mypy

# docs/paper.md: the paper's figures beside simulated ones; about half an hour
paper: $(VENV)/installed-plots
	$(VENV)/bin/python tools/paper

# docs/rooms.svg: the rooms and what they import
picture: $(VENV)/installed-plots
	$(VENV)/bin/python tools/rooms_picture.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Torch goes first: what depends on it then takes the build that is there.
$(VENV)/torch:
	@test -n "$(PYTHON)" || { echo "error: make needs Python 3.11 or newer with venv (Debian:" \
		"apt install python3-venv), found none; name one with PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON) and installing $(TORCH) (once; a large download) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@touch $@

# installed-plots-serve-dev means: the package, editable, with the extras plots, serve and dev.
comma := ,
$(VENV)/installed-%: pyproject.toml | $(VENV)/torch
	@echo "Installing mnemosyne[$*] ..."
	@$(PIP) --editable ".[$(subst -,$(comma),$*)]"
	@touch $@

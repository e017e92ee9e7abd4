# `make demo` and `make test` work as the first command after a clone: their requirements are installed into .venv.
PYTHON ?= python3
READY := .venv/installed

.PHONY: demo demo-short test test-fast bench lint format docs help

demo: $(READY)          ## train the whole method on 5,000 digits, on a CPU, and draw a picture of it
	.venv/bin/mixar demo

demo-short: $(READY)    ## every stage of the demo in about a minute
	.venv/bin/mixar demo --short

test: $(READY)          ## all tests
	.venv/bin/python -m pytest

test-fast: $(READY)     ## all tests but the slow ones, in under three minutes
	.venv/bin/python -m pytest -m 'not slow'

bench: $(READY)         ## time the step, sampling and the operators against the reference, and count a GPU's step
	.venv/bin/python benchmarks/bench.py
	.venv/bin/python benchmarks/count.py configs/mixar_l.yaml

lint: $(READY)          ## the checks of a change before its tests
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: $(READY)        ## format the code, and fix what the linter can
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

docs: $(READY)          ## build the site into build/site; a broken link or an unlisted page is an error
	.venv/bin/mkdocs build --strict

help:                   ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 16

# the stamp is written last: without it an installation is incomplete, which pip cannot repair, so it starts again
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'Python 3.11 or newer with its venv module is needed: sudo apt-get install python3 python3-venv,' \
	       'or name one with make PYTHON=/path/to/python3.11' >&2; exit 1; }
	test -e $@ || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --editable '.[dev]'
	@touch $@

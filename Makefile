# `make demo` and `make test` work as the first command after a clone: what they need is installed into .venv.
PYTHON ?= python3
READY := .venv/installed

.PHONY: demo demo-short test test-fast bench lint

demo: $(READY)
	.venv/bin/mixar demo

demo-short: $(READY)
	.venv/bin/mixar demo --short

test: $(READY)
	.venv/bin/python -m pytest

test-fast: $(READY)
	.venv/bin/python -m pytest -m 'not slow'

bench: $(READY)
	.venv/bin/python benchmarks/bench.py

lint: $(READY)
	.venv/bin/ruff check
	.venv/bin/mypy

# the stamp comes last: without it an installation was cut short, which pip cannot mend, so it starts from nothing
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'Python 3.11 or newer with its venv module is needed: sudo apt-get install python3 python3-venv,' \
	       'or name one with make PYTHON=/path/to/python3.11' >&2; exit 1; }
	test -e $@ || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --editable '.[dev]'
	@touch $@

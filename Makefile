PYTHON ?= python3
VENV := .venv

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e ".[dev]"
	touch $@

.PHONY: setup test lint proto
setup: $(VENV)/.stamp

test: setup
	$(VENV)/bin/python -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/buf lint

proto:
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install -q grpcio-tools==1.76.0 mypy-protobuf==3.7.0 setuptools
	PATH="$(CURDIR)/.venv-proto/bin:$$PATH" .venv-proto/bin/python scripts/generate_stubs.py

.PHONY: demo
demo: setup
	$(VENV)/bin/python scripts/demo.py

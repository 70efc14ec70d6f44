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
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/buf lint

# The oldest generator the project supports: what it makes runs on every newer protobuf runtime.
.venv-proto/.stamp:
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install -q grpcio-tools==1.76.0 mypy-protobuf==3.7.0 setuptools==80.9.0
	touch $@

.PHONY: proto-tools
proto-tools: .venv-proto/.stamp

proto: proto-tools
	PATH="$(CURDIR)/.venv-proto/bin:$$PATH" .venv-proto/bin/python scripts/generate_stubs.py

.PHONY: demo
demo: setup
	$(VENV)/bin/python scripts/demo.py

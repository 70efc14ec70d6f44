PYTHON ?= python3
VENV := .venv

$(VENV)/.stamp: pyproject.toml
	PYTHON=$(PYTHON) scripts/install_missing.sh python
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e ".[dev,examples]"
	touch $@

.PHONY: setup test lint proto
setup: $(VENV)/.stamp nodejs go network postgres

# Three processes: much of the time tests wait. PYTEST_FLAGS="-n 0" runs all in one.
test: setup
	$(VENV)/bin/python -m pytest -n 3 $(PYTEST_FLAGS)

# What to run at each change: all but the tests that start servers, or processes in great numbers.
.PHONY: check
check: lint
	$(VENV)/bin/python -m pytest -n 2 -m "not slow and not exhaustive" $(PYTEST_FLAGS)

# Also the tests that are left out of `make test` because another one takes nearly the same way.
.PHONY: test-all
test-all: setup
	$(VENV)/bin/python -m pytest -n 3 $(PYTEST_FLAGS) -m "exhaustive or not exhaustive"

lint: $(VENV)/.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/buf lint
	BUF=$(VENV)/bin/buf scripts/lint_breaking.sh

# The contract as it is now becomes what later changes are compared with; a decision page must name its digest.
.PHONY: baseline
baseline: $(VENV)/.stamp
	$(VENV)/bin/buf build --as-file-descriptor-set --exclude-source-info -o proto/lattice_v1.binpb
	sha256sum proto/lattice_v1.binpb

# The Node.js examples, and tools of tests. On a machine that has no Node.js and may not install it, their tests are
# skipped.
.PHONY: nodejs
nodejs: $(foreach folder,examples/nodejs examples/nodejs-worker tests/tools,$(folder)/node_modules/.stamp)

%/node_modules/.stamp: %/package.json %/package-lock.json
	scripts/install_missing.sh nodejs
	if command -v npm >/dev/null; then cd $* && npm ci --silent && touch node_modules/.stamp; fi

# The Go example. On a machine that has no Go and may not install it, its tests are skipped.
.PHONY: go
go: examples/go/.build/.stamp

examples/go/.build/.stamp: $(VENV)/.stamp scripts/build_go.sh $(wildcard examples/go/*.* examples/go/lattice/* proto/lattice/v1/*.proto)
	scripts/install_missing.sh go
	if command -v go >/dev/null && command -v protoc-gen-go-grpc >/dev/null; then scripts/build_go.sh; fi

# Tests of clusters build a network of hosts. Where that is impossible they are skipped.
.PHONY: network
network:
	scripts/install_missing.sh network

# Tests of the journal in PostgreSQL start a server of their own. Where that is impossible they are skipped.
.PHONY: postgres
postgres:
	scripts/install_missing.sh postgres

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
demo: $(VENV)/.stamp
	$(VENV)/bin/python scripts/demo.py

.PHONY: bench
bench: setup
	$(VENV)/bin/python -m benchmarks

PYTHON ?= python3
VENV := .venv
# The parts of the set-up wait for different servers, and each of the checks uses one processor.
MAKEFLAGS += --jobs=4

# Python compiles what is imported, which is a fifth of what is installed.
$(VENV)/.stamp: pyproject.toml
	PYTHON=$(PYTHON) scripts/install_missing.sh python
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --no-compile -e ".[dev,examples]"
	touch $@

.PHONY: setup test lint proto
setup: $(VENV)/.stamp nodejs go network docker proto-tools

# One test of each behaviour. Four processes, because tests wait much of the time; PYTEST_FLAGS="-n 0" runs all in one.
test: setup
	$(VENV)/bin/python -m pytest -n 4 $(PYTEST_FLAGS)

# To run at each change: all but the tests that start servers, or processes in great numbers. Style and types are
# checked beside them. All of tests/e2e is slow, and importing it takes a quarter of the collection of tests.
.PHONY: check check-tests
check: lint check-tests

check-tests: $(VENV)/.stamp
	$(VENV)/bin/python -m pytest -n 2 -m "not slow and not exhaustive" --ignore=tests/e2e $(PYTEST_FLAGS)

# Also the repetitions that `make test` leaves out: tests whose behaviour another test has, and most generated examples.
.PHONY: test-all
test-all: setup postgres prometheus models
	LATTICE_EXAMPLES=$${LATTICE_EXAMPLES:-5} $(VENV)/bin/python -m pytest -n 4 $(PYTEST_FLAGS) -m "exhaustive or not exhaustive"

# The tests of the client that start no server, on Python 3.13 and without Ray.
PYTHON_3_13 ?= $(lastword python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python))
.PHONY: test-3.13
test-3.13: .venv-3.13/.stamp
	.venv-3.13/bin/python -m pytest -n 2 -m "not slow and not exhaustive" $(PYTEST_FLAGS) tests/client

.venv-3.13/.stamp: pyproject.toml
	$(PYTHON_3_13) -m venv .venv-3.13
	.venv-3.13/bin/pip install -q -e ".[server,langgraph,test]"
	touch $@

.PHONY: lint-types lint-imports lint-style lint-contract
lint: lint-types lint-imports lint-style lint-contract

lint-types: $(VENV)/.stamp
	$(VENV)/bin/mypy

lint-imports: $(VENV)/.stamp
	$(VENV)/bin/lint-imports --no-logo

lint-style: $(VENV)/.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lint-contract: $(VENV)/.stamp
	$(VENV)/bin/buf lint
	BUF=$(VENV)/bin/buf scripts/lint_breaking.sh

# Makes the present contract the baseline of later changes; a decision page must name its digest.
.PHONY: baseline
baseline: $(VENV)/.stamp
	$(VENV)/bin/buf build --as-file-descriptor-set --exclude-source-info -o proto/lattice_v1.binpb
	sha256sum proto/lattice_v1.binpb

# All that the set-up needs from the system, in one call of the package manager.
.PHONY: system
system:
	PYTHON=$(PYTHON) scripts/install_missing.sh python nodejs go network docker

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

# One test has Prometheus read the metrics of a server. Elsewhere it is skipped.
.PHONY: prometheus
prometheus:
	scripts/install_missing.sh prometheus

# Tests of clusters build a network of hosts. If the machine does not allow this they are skipped.
.PHONY: network
network:
	scripts/install_missing.sh network

# Tests of containers run an engine of their own. On a machine that has none and may not install it they are skipped.
.PHONY: docker
docker: .engine/.stamp

# The large part of their image.
.engine/.stamp: $(VENV)/.stamp lattice_worker/containers/rootfs.py
	scripts/install_missing.sh docker
	$(VENV)/bin/python -m tests.containers.engines
	mkdir -p .engine && touch $@

# The image of tasks with isolation="docker", in this machine's engine. PACKAGES="numpy pandas" names its packages.
.PHONY: sandbox-image
sandbox-image: $(VENV)/.stamp
	$(VENV)/bin/python -m lattice_worker.containers.image $(addprefix --package ,$(PACKAGES))

# Tests of the journal in PostgreSQL start a server of their own. Where that is impossible they are skipped.
.PHONY: postgres
postgres:
	scripts/install_missing.sh postgres

# Tests of models run the server of transformers with a tiny model, on the CPU. Where it is not installed they are skipped.
.PHONY: models
models: .venv-models/.stamp

.venv-models/.stamp:
	$(PYTHON) -m venv .venv-models
	.venv-models/bin/pip install -q --no-compile "torch==2.13.0" "transformers[serving]>=5.24,<6"
	touch $@

# The oldest supported generator: its code runs on every newer protobuf runtime.
.venv-proto/.stamp: | $(VENV)/.stamp
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install -q --no-compile grpcio-tools==1.76.0 mypy-protobuf==3.7.0 setuptools==80.9.0
	touch $@

.PHONY: proto-tools
proto-tools: .venv-proto/.stamp

proto: proto-tools
	PATH="$(CURDIR)/.venv-proto/bin:$$PATH" .venv-proto/bin/python scripts/generate_stubs.py

.PHONY: demo
demo: $(VENV)/.stamp
	$(VENV)/bin/python scripts/demo.py

# Measures for some minutes, on a machine that does nothing else, and writes docs/performance.md.
.PHONY: bench
bench: $(VENV)/.stamp
	$(VENV)/bin/python -m benchmarks --page docs/performance.md

# Installs Ray, Dask, Prefect and LangGraph, each in an environment of its own, measures for some minutes on a machine
# that does nothing else, and writes docs/peers.md.
.PHONY: bench-peers
bench-peers: $(VENV)/.stamp
	$(VENV)/bin/python -m benchmarks.peers --page docs/peers.md

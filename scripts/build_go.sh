#!/bin/sh
# Builds the Go example and its tests with the packages that Debian has, so without the network.
#
# Debian's Go packages lie in a GOPATH, and the example in another one. A project of its own uses modules instead: see
# examples/go/README.md.
set -eu
cd "$(dirname "$0")/../examples/go"
BUF="${BUF:-$PWD/../../.venv/bin/buf}"
(cd ../.. && "$BUF" generate --template examples/go/buf.gen.yaml -o examples/go)
mkdir -p .build/path/src/example.com
ln -sfn ../../../.. .build/path/src/example.com/lattice
export GO111MODULE=off GOPATH="$PWD/.build/path:/usr/share/gocode"
cd .build/path/src/example.com/lattice
test -z "$(gofmt -l main.go lattice)"
go build -ldflags "-s -w" -o .build/example .
go test -c -ldflags "-s -w" -o .build/lattice.test ./lattice
touch .build/.stamp

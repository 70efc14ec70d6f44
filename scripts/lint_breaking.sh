#!/bin/sh
# Fails when the contract breaks its callers: compares proto/ with the baseline, which a decision page names by digest.
#
# A change that is meant is made in two steps: write a decision page, then `make baseline`.
set -eu
cd "$(dirname "$0")/.."
exec "${BUF:-.venv/bin/buf}" breaking --against proto/lattice_v1.binpb

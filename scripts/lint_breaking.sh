#!/bin/sh
# Fails when the contract breaks its callers: compares proto/ with the last commit and with the one before it.
#
# The first catches a break before it is committed, the second one that was committed without looking. A break that is
# meant needs a line `BREAKING CHANGE: why` in the message of its commit. A checkout without history, such as
# an archive or a shallow clone, is compared with as much history as it has.
set -eu
cd "$(dirname "$0")/.."
buf=${BUF:-.venv/bin/buf}

if ! git rev-parse --verify -q HEAD >/dev/null 2>&1; then
    echo "buf breaking: no git history here, nothing to compare with"
    exit 0
fi
old=$(mktemp -d)
trap 'rm -rf "$old"' EXIT
for commit in HEAD HEAD~1; do
    if ! git cat-file -e "$commit:proto" 2>/dev/null; then
        echo "buf breaking: no proto/ at $commit here, nothing to compare with"
    elif [ "$commit" = HEAD~1 ] && git log -1 --format=%B | grep -q '^BREAKING CHANGE: '; then
        echo "buf breaking: the last commit breaks the contract and says so"
    else
        mkdir "$old/$commit"
        git archive "$commit" proto buf.yaml | tar -x -C "$old/$commit"
        "$buf" breaking --against "$old/$commit" && continue
        echo "buf breaking: proto/ breaks callers of $commit; see scripts/lint_breaking.sh" >&2
        exit 1
    fi
done

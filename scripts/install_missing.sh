#!/bin/sh
# Installs what the project needs from the system and a bare Debian machine lacks. Quick when nothing is missing.
#
# Usage: scripts/install_missing.sh (python|nodejs|go|network|docker|postgres|prometheus)...
#
# As root with apt-get it installs; otherwise it prints the missing packages. Without Python's venv no target works;
# without Node.js or Go the tests of those examples are skipped, without a network of namespaces those of clusters,
# without Docker those of containers, without PostgreSQL those of its journal, and without Prometheus the one in which
# it reads metrics.
set -eu

packages=""
is_needed=""
for part in "$@"; do
    case "$part" in
    python)
        "${PYTHON:-python3}" -c "import ensurepip, venv" 2>/dev/null || { packages="$packages python3-venv"; is_needed=1; }
        ;;
    nodejs)
        command -v node >/dev/null || packages="$packages nodejs"
        command -v npm >/dev/null || packages="$packages npm"
        ;;
    go)
        for tool in go protoc-gen-go protoc-gen-go-grpc; do
            command -v "$tool" >/dev/null || packages="$packages golang-go protoc-gen-go protoc-gen-go-grpc"
        done
        [ -d /usr/share/gocode/src/google.golang.org/grpc ] || packages="$packages golang-google-grpc-dev"
        # grpc is content with an older one, which knows no `optional`.
        [ -e /usr/share/gocode/src/github.com/golang/protobuf/proto/wire.go ] ||
            packages="$packages golang-github-golang-protobuf-1-5-dev"
        ;;
    network)
        command -v ip >/dev/null && command -v ss >/dev/null || packages="$packages iproute2"
        command -v openssl >/dev/null || packages="$packages openssl"
        ;;
    docker)
        command -v dockerd >/dev/null && command -v runc >/dev/null || packages="$packages docker.io runc"
        ;;
    postgres)
        command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 ||
            packages="$packages postgresql"
        ;;
    prometheus)
        command -v prometheus >/dev/null && command -v promtool >/dev/null || packages="$packages prometheus"
        ;;
    esac
done
[ -n "$packages" ] || exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    # Several of these may run at once, and apt-get only waits for some of its locks.
    exec 9<"$0"
    flock 9
    echo "Installing$packages"
    apt-get update -qq
    # shellcheck disable=SC2086 -- a list of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
    exit 0
fi
echo "Missing on this machine:$packages. On Debian or Ubuntu: apt-get install$packages" >&2
[ -z "$is_needed" ]

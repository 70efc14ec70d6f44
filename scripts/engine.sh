#!/bin/sh
# Runs a Docker engine with folders and a socket of its own, until it is ended by a signal. For tests and experiments.
#
# Usage: scripts/engine.sh FOLDER DATA
#
# Its socket is FOLDER/docker.sock; FOLDER has to have a short path, since paths of sockets are limited. Images are kept
# in DATA. It has no network, and changes neither interfaces nor firewall rules of the machine. Needs root.
set -eu

exec dockerd --bridge=none --iptables=false --ip-forward=false --ip-masq=false \
    --host "unix://$1/docker.sock" --data-root "$2" --exec-root "$1/exec" --pidfile "$1/docker.pid" --log-level warn

#!/usr/bin/env bash
# Everything about the deployment that can be proved without a container engine, with one command:
#
#   deploy/verify.sh                  the checks: lint, schemas, merges, rules, queries, a rolling update
#   deploy/verify.sh --image          and the image's build, replayed in a chroot and run (root, debootstrap, minutes)
#
# What a missing tool keeps from being checked is listed with its reason at the end. Arguments after --image go to
# `python -m deploy.checks.replay`; PYTHON names the interpreter of the development environment.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

echo "== tools"
for tool in hadolint docker-compose kubectl promtool prometheus haproxy debootstrap; do
    path=$(PATH="$(dirname "$python"):$PATH:/usr/sbin" command -v "$tool" || true)
    printf '%-16s%s\n' "$tool" "${path:-missing}"
done

echo "== checks"
"$python" -m pytest -q -rs tests/deploy

if [ "${1:-}" = --image ]; then
    shift
    echo "== the image's build, replayed"
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/drorae-replay.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    "$python" -m deploy.checks.replay --work "$work" "$@"
else
    echo "skipped: the image's build; deploy/verify.sh --image replays it"
fi

echo "not checked here: a build and a start by a container engine, a cluster of Kubernetes, the CUDA image on a GPU,"
echo "Grafana's rendering, the workflows of GitHub"
echo "by hand: python -m deploy.checks.rolling_update, python -m deploy.ray_serve.scale_down, python -m deploy.checks.sizes"

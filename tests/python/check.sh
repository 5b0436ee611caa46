#!/bin/sh
# Checks the program against Python's transformers and PEFT, in both directions, its events in TensorBoard's reader, its server with
# OpenAI's client, and what it exports in llama.cpp; see tests/python/check_interop.py, check_tensorboard.py, check_serve.py,
# check_llama_cpp.py and check_llama_cpp_families.py.
# Prints one line a check and fails if any failed. Needs no model: it makes tiny ones.
# Usage: check_python.sh
#   FOURFOLD_PYTHON   an interpreter that has the packages of tests/python/requirements.txt (other versions may do);
#                     unset, a virtual environment is made once under ${XDG_CACHE_HOME:-$HOME/.cache}/fourfold: some GB
#   FOURFOLD_BINARY   the program; unset, cargo builds it
set -eu

fail() {
    echo "check_python: $*" >&2
    exit 1
}

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
wanted=$root/tests/python/requirements.txt

if [ -n "${FOURFOLD_PYTHON:-}" ]; then
    python=$FOURFOLD_PYTHON
    command -v "$python" >/dev/null 2>&1 || fail "FOURFOLD_PYTHON = $python is no program"
else
    cache=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
    [ -n "$cache" ] || fail "neither XDG_CACHE_HOME nor HOME is set; name an interpreter with FOURFOLD_PYTHON"
    venv=$cache/fourfold/python
    python=$venv/bin/python
    # The list is copied in last: an environment without it, or with another one, is unfinished or old.
    if ! cmp -s "$wanted" "$venv/requirements.txt"; then
        command -v python3 >/dev/null 2>&1 || fail "python3 is missing; install Python 3.10 or newer"
        echo "check_python: making $venv" >&2
        # One that was finished for a former list is kept: pip changes what differs.
        [ -f "$venv/requirements.txt" ] && [ -x "$python" ] || python3 -m venv --clear "$venv" ||
            fail "python3 cannot make $venv (Debian: apt install python3-venv)"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$wanted" >&2 ||
            fail "pip cannot install tests/python/requirements.txt; check the network, then run this again"
        cp "$wanted" "$venv/requirements.txt"
    fi
fi
"$python" -c 'import openai, peft, safetensors, tensorboard, tokenizers, torch, transformers' ||
    fail "$python misses a package of tests/python/requirements.txt"

if [ -n "${FOURFOLD_BINARY:-}" ]; then
    binary=$FOURFOLD_BINARY
else
    cargo build --release --quiet --manifest-path "$root/Cargo.toml" --bin fourfold >&2
    binary=${CARGO_TARGET_DIR:-$root/target}/release/fourfold
fi
[ -x "$binary" ] || fail "$binary is no program"

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONDONTWRITEBYTECODE=1
"$python" "$root/tests/python/check_interop.py" "$binary"
"$python" "$root/tests/python/check_tensorboard.py" "$binary"
"$python" "$root/tests/python/check_gpu_compare.py" "$binary"
"$python" "$root/tests/python/check_serve.py" "$binary"
if "$python" -c 'import xllamacpp' 2>/dev/null; then
    "$python" "$root/tests/python/check_llama_cpp.py" "$binary"
    exec "$python" "$root/tests/python/check_llama_cpp_families.py" "$binary"
fi
[ -n "${FOURFOLD_PYTHON:-}" ] || fail "$python misses xllamacpp, which tests/python/requirements.txt names"
echo "check_python: llama.cpp's side is left out: $python has no xllamacpp" >&2

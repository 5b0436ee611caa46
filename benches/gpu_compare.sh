#!/usr/bin/env bash
# A PPO step by this program and by PyTorch with PEFT on one card, in turn: bases of one shape, the same lengths and rank.
#
#   FOURFOLD_BINARY=target/release/fourfold PYTHON=python3 benches/gpu_compare.sh [MODEL] [DEVICE]     (default 7b cuda)
#
# PYTHON needs torch, transformers and peft, and bitsandbytes for nf4. JSON lines of both go to stdout, and to $OUT/compare.jsonl
# if OUT is set. The time of both depends on the card's clock, so compare the lines of one call only. DEVICE emulated and cpu
# check the script and measure nothing.
set -uo pipefail
binary=${FOURFOLD_BINARY:-target/release/fourfold} python=${PYTHON:-python3} model=${1:-7b} device=${2:-cuda}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
shape=(--model "$model" --batch-size "${BATCH:-8}" --prompt-length "${PROMPT:-256}" --response-length "${RESPONSE:-256}")
shape+=(--micro-batch-size 4 --rank 16)
theirs=$device types=(bf16 nf4)
[ "$device" = cuda ] || { theirs=cpu types=(f32); }
ours() { "$binary" --quiet bench gpu --device "$device" "${shape[@]}" --stored "$1" --no-kernels --sequences 8 --json; }
both() {
    local failed=0
    ours q4_k || failed=1
    for stored in "${types[@]}"; do
        "$python" "$here/peers/gpu_peft.py" --device "$theirs" "${shape[@]}" --stored "$stored" || failed=1
        ours bf16 || failed=1
    done
    return $failed
}
if [ -n "${OUT:-}" ]; then both | tee "$OUT/compare.jsonl"; else both; fi

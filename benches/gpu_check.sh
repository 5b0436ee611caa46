#!/usr/bin/env bash
# One command for a machine with a card: the card, doctor, steps of PPO and GRPO over bases of known sizes with every kernel's
# time and planned beside measured memory, the quickstart on the card and on the CPU. It prints as it goes, ends within 8
# minutes, and each part stands alone, so that it is useful when cut short.
#
#   FOURFOLD_BINARY=target/release/fourfold benches/gpu_check.sh [DEVICE]     (default cuda)
#
# With OUT set, every result is also written there: doctor.json, bench_*.jsonl, quickstart_*.json, log.txt.
set -uo pipefail
binary=${FOURFOLD_BINARY:-target/release/fourfold}
device=${1:-cuda}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
out=${OUT:-$scratch/out}
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
end=$((SECONDS + ${GPU_CHECK_SECONDS:-470}))
failed=0

part() { # name, most seconds, command ...
    local name=$1 most=$2 left=$((end - SECONDS)) start=$SECONDS
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "== $name: no time left"
        return
    fi
    [ "$most" -lt "$left" ] || most=$left
    echo "== $name"
    if timeout "$most" "$@"; then
        echo "== $name: $((SECONDS - start)) s"
    else
        echo "== $name: FAILED with code $? after $((SECONDS - start)) s"
        failed=1
    fi
}
kept() { # file, command ...: stdout goes to the screen and to a file
    local file=$1
    shift
    "$@" | tee "$out/$file"
    return "${PIPESTATUS[0]}"
}
export -f kept
export out

[ -x "$binary" ] || { echo "gpu_check: $binary is missing; build it or set FOURFOLD_BINARY" >&2; exit 1; }
"$binary" --version
nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used,power.limit --format=csv,noheader 2>/dev/null ||
    echo "no nvidia-smi"
part "doctor" 120 "$binary" doctor --device "$device"
part "doctor, JSON" 120 bash -c 'kept doctor.json "$@"' _ "$binary" doctor --device "$device" --json
# The figures of benches/records/gpu.md, the most wanted first; TMPDIR holds metrics of a few kilobytes. The goals there name these
# commands, and benches/gpu_plan.py ends with an error where one of them is no longer here.
bench() { # file, most seconds, arguments of bench gpu ...
    local file=$1 most=$2
    shift 2
    part "bench gpu $*" "$most" bash -c 'file=$1; shift; kept "$file" "$@"' _ "$file" "$binary" bench gpu --device "$device" --json "$@"
}
bench bench_7b_q4_k.jsonl 90 --model 7b --stored q4_k
for order in in_turn ahead kept; do
    bench "bench_7b_q4_k_$order.jsonl" 30 --model 7b --stored q4_k --no-kernels --sequences 8 --dequantise $order
done
bench bench_7b_bf16.jsonl 60 --model 7b --stored bf16 --no-kernels --sequences 8,64
for checkpoint in block offload; do
    bench "bench_7b_long_$checkpoint.jsonl" 40 --model 7b --stored q4_k --batch-size 2 --micro-batch-size 1 --prompt-length 7936 \
        --response-length 256 --checkpoint $checkpoint --steps 1 --sequences 1 --no-kernels
done
# 8,192 rows a pass, resident and streamed.
bench bench_7b_resident.jsonl 40 --model 7b --stored bf16 --offload 0 --batch-size 16 --micro-batch-size 16 --prompt-length 480 \
    --response-length 32 --steps 1 --sequences 64 --no-kernels
bench bench_7b_streamed.jsonl 60 --model 7b --stored bf16 --offload 32 --batch-size 16 --micro-batch-size 16 --prompt-length 480 \
    --response-length 32 --steps 1 --sequences 64 --no-kernels
bench bench_135m.jsonl 40 --model 135m --stored bf16,q8_0 --prompt-length 64 --response-length 64 --rank 8 --sequences 8
bench bench_7b_grpo.jsonl 60 --model 7b --stored q4_k --methods grpo --batch-size 64 --response-length 512 --steps 1 \
    --sequences 64 --no-kernels
part "quickstart on $device" 200 bash -c 'kept quickstart_device.json "$@"' _ \
    "$binary" quickstart --device "$device" --out "$scratch/device" --json
nvidia-smi --query-gpu=memory.used --format=csv,noheader 2>/dev/null
base=$scratch/device/base
if [ -d "$base" ]; then
    for dtype in f32 bf16 f16; do
        cat >"$scratch/$dtype.toml" <<TOML
[base]
path = "$base"
compute_dtype = "$dtype"
[data]
path = "$scratch/text.jsonl"
max_rows = 64
TOML
    done
    for i in $(seq 64); do
        echo "{\"prompt\": \"User: is room $i clean?\", \"completion\": \" The room $i was clean and the food was good.\"}"
    done >"$scratch/text.jsonl"
    for dtype in f32 bf16 f16; do
        part "sft on $device in $dtype" 60 "$binary" sft "$scratch/$dtype.toml" --device "$device" \
            --out "$scratch/sft_$dtype" --json
    done
    part "sft on the CPU in f32" 60 "$binary" sft "$scratch/f32.toml" --device cpu --out "$scratch/sft_cpu" --json
    part "generate on $device" 30 "$binary" generate --base "$base" --device "$device" --temperature 0 \
        --max-new-tokens 32 --prompt "Is the room clean?"
    part "generate on the CPU" 30 "$binary" generate --base "$base" --device cpu --temperature 0 \
        --max-new-tokens 32 --prompt "Is the room clean?"
fi
part "quickstart on the CPU" 200 bash -c 'kept quickstart_cpu.json "$@"' _ \
    "$binary" quickstart --device cpu --out "$scratch/cpu" --json
echo "gpu_check: $SECONDS s$([ "$failed" = 0 ] || echo ', something FAILED')"
exit "$failed"

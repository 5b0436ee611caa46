#!/usr/bin/env bash
# One command for a machine with a card: the card, doctor, the quickstart on the card and on the CPU, what plans say and what
# the card takes. It prints as it goes, ends within 8 minutes, and each part stands alone, so that it is useful when cut short.
#
#   FOURFOLD_BINARY=target/release/fourfold benches/gpu_check.sh [DEVICE]     (default cuda)
#
# With OUT set, every result is also written there: doctor.json, quickstart_*.json, plan_7b.json, log.txt.
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
mkdir -p "$scratch/7b"
cat >"$scratch/7b/config.json" <<'JSON'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
 "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
 "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
JSON
cat >"$scratch/7b.toml" <<TOML
[base]
path = "$scratch/7b"
quantize = "q4_k"
[lora]
r = 16
[data]
max_prompt_length = 256
[ppo]
reward_adapter = "none"
batch_size = 8
micro_batch_size = 4
total_episodes = 8
response_length = 256
TOML
part "plan of a 7B PPO step" 60 bash -c 'kept plan_7b.json "$@"' _ \
    "$binary" plan "$scratch/7b.toml" --phase ppo --device cuda --memory 24GiB --json
echo "gpu_check: $SECONDS s$([ "$failed" = 0 ] || echo ', something FAILED')"
exit "$failed"

#!/usr/bin/env python3
"""Which models fit which cards, by the planner, and what a step would take at least, by the cards' own figures.

    benches/gpu_plan.py target/release/fourfold > benches/records/gpu.md

PPO with four roles on one base, 8 prompts of 256 tokens and responses of 256, LoRA r = 16 on all linear maps, a critic. Memory
is `fourfold plan --device cuda --memory`: the passes themselves on a machine that counts. Times are floors and not
measurements: bytes over bandwidth for decoding, products over the card's rate for the rest.
"""
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

BINARY = sys.argv[1]
PROMPTS, PROMPT, RESPONSE, RANK = 8, 256, 256, 16
# Name: hidden, intermediate, layers, heads, key/value heads, vocabulary, tied.
MODELS = {
    "1B (Llama 3.2)": (2048, 8192, 16, 32, 8, 128256, True),
    "7B (Llama 2)": (4096, 11008, 32, 32, 32, 32000, False),
    "8B (Llama 3.1)": (4096, 14336, 32, 32, 8, 128256, False),
    "14B (Qwen 2.5)": (5120, 13824, 48, 40, 8, 152064, False),
    "32B (Qwen 2.5)": (5120, 27648, 64, 40, 8, 152064, False),
}
# Bytes of a stored number.
TYPES = {"q4_k": 144 / 256, "bf16": 2.0}
SIZES = [8, 12, 16, 24, 48]
# Name: bytes per second, products per second of 16-bit operands with f32 sums. The H100's are measured (the log beside this);
# the others' are multiprocessors times boost clock times 1,024 operations, by NVIDIA's data sheets.
CARDS = {
    "H100": (2.958e12, 683e12),
    "RTX 4090, 24 GB": (1.008e12, 128 * 2.52e9 * 512),
    "RTX 4060, 8 GB": (0.272e12, 24 * 2.46e9 * 512),
    "RTX 3060, 12 GB": (0.360e12, 28 * 1.777e9 * 512),
}


def config(model):
    hidden, wide, layers, heads, kv, vocab, tied = MODELS[model]
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=vocab, hidden_size=hidden,
        intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=128 if hidden > 2048 else 64, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=5e5,
        tie_word_embeddings=tied, hidden_act="silu", torch_dtype="bfloat16",
    )


def plan(folder, model, dtype, gib, more=()):
    path = f"{folder}/{list(MODELS).index(model)}.json"
    settings = {
        "lora.r": RANK, "ppo.batch_size": PROMPTS, "ppo.response_length": RESPONSE, "data.max_prompt_length": PROMPT,
        "ppo.micro_batch_size": 4,
    }
    if dtype != "bf16":
        settings["base.quantize"] = dtype
    settings |= dict(more)
    command = [BINARY, "plan", "--base", path, "--phase", "ppo", "--device", "cuda", "--memory", f"{gib}GiB", "--json"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        sys.exit(f"{model}, {dtype}, {gib} GiB: {done.stderr}")
    found = json.loads(done.stdout)
    change = (found["smallest_change"] or {}).get("set", {})
    if "base.offload" in change and not more:
        # How many layers that is.
        found["layers"] = plan(folder, model, dtype, gib, change.items())["offload"]["layers"]
    return found


def rollouts(folder, phase, prompt, response, checkpoint, cache):
    """A 7B in Q4_K: eight responses in a step, one in a pass; what the card and pinned memory hold."""
    settings = {
        "base.quantize": "q4_k", "base.kv_cache_type": cache, "lora.r": RANK, "data.max_prompt_length": prompt,
        f"{phase}.checkpoint": checkpoint, f"{phase}.local_rollout_forward_batch_size": 1,
    }
    if phase == "ppo":
        settings |= {"ppo.batch_size": 8, "ppo.micro_batch_size": 1, "ppo.response_length": response}
    else:
        settings |= {
            "grpo.num_generations": 8, "grpo.per_device_train_batch_size": 1, "grpo.gradient_accumulation_steps": 8,
            "grpo.max_completion_length": response,
        }
    path = f"{folder}/long.json"
    command = [BINARY, "plan", "--base", path, "--phase", phase, "--device", "cuda", "--memory", "512GiB", "--json"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    device = next(iter(found["devices"].values()))
    beside = device["context"] + device["workspace"]
    phases = [device["phases"][name] + beside for name in ("rollout", "update")]
    return [f"{size / 2**30:.1f} GiB" for size in (device["total"], *phases, found["offload"]["pinned"])]


def cell(found):
    if found["fits"]:
        device = next(iter(found["devices"].values()))
        return f"{device['total'] / 2**30:.1f} GiB"
    change = found["smallest_change"]
    if not change:
        return "no"
    short = {"ppo.micro_batch_size": "micro", "ppo.local_rollout_forward_batch_size": "at once", "ppo.checkpoint": "checkpoint"}
    change["set"] = {k: v if k != "base.offload" else f"{found['layers']} layers" for k, v in change["set"].items()}
    return ", ".join(f"{short.get(key, key.split('.')[-1])} {value}" for key, value in change["set"].items())


def matrices(model):
    hidden, wide, layers, heads, kv, vocab, _ = MODELS[model]
    head = 128 if hidden > 2048 else 64
    attention = hidden * head * (heads + 2 * kv) + heads * head * hidden
    return layers * (attention + 3 * hidden * wide), hidden * vocab


def floors(model, dtype, bandwidth, rate):
    """Seconds of decoding, of scoring and of the update, at least."""
    _, _, layers, _, kv, _, _ = MODELS[model]
    head = 128 if MODELS[model][0] > 2048 else 64
    blocks, lm_head = matrices(model)
    cache = PROMPTS * (PROMPT + RESPONSE / 2) * layers * 2 * kv * head * 2
    decoding = RESPONSE * ((blocks + lm_head) * TYPES[dtype] + cache) / bandwidth
    tokens, responses = PROMPTS * (PROMPT + RESPONSE), PROMPTS * RESPONSE
    forward, of_head = 2 * blocks * tokens, 2 * lm_head * responses
    # Reference, critic and reward model score; actor and critic run forward, again for the blocks' activations, and back.
    scoring = (3 * forward + of_head) / rate
    update = (2 * 3 * forward + 4 * of_head) / rate
    return decoding, scoring, update


with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
    for i, model in enumerate(MODELS):
        with open(f"{folder}/{i}.json", "w") as file:
            json.dump(config(model), file)
    jobs = {(m, t, s): pool.submit(plan, folder, m, t, s) for m in MODELS for t in TYPES for s in SIZES}
    with open(f"{folder}/long.json", "w") as file:
        json.dump(config("7B (Llama 2)") | {"max_position_embeddings": 32768}, file)
    ways = [("block", "auto"), ("offload", "auto"), ("offload", "q8_0")]
    long_jobs = {
        (phase, length, *way): pool.submit(rollouts, folder, phase, length // 2, length // 2, *way)
        for phase in ("ppo", "grpo") for length in (8192, 32768) for way in ways
    }
    plans = {key: job.result() for key, job in jobs.items()}
    long_plans = {key: job.result() for key, job in long_jobs.items()}

print(f"""# What fits a card, and floors of a step

Written by `benches/gpu_plan.py`. Nothing here was measured on a card but the H100's two figures below; what was is in
`gpu_h100.log`, and `benches/gpu_check.sh` measures a card at hand.

PPO, four roles on one base, {PROMPTS} x ({PROMPT} + {RESPONSE}) tokens, LoRA r = {RANK} on all linear maps, micro-batches of 4, products in f16.

## Memory, by `plan --device cuda`

The device's peak with context and cuBLAS, or the smallest change that fits: `micro` is `ppo.micro_batch_size`, `at once`
`ppo.local_rollout_forward_batch_size`, `offload` the layers that stay in the host's pinned memory.

| model | base | {' | '.join(f'{size} GiB' for size in SIZES)} |
|---|---|{'---|' * len(SIZES)}""")
for model in MODELS:
    for dtype in TYPES:
        print(f"| {model} | {dtype} | {' | '.join(cell(plans[model, dtype, size]) for size in SIZES)} |")
print("""
## Long sequences, by the planner

A 7B in Q4_K, r = 16, half of each sequence its response; eight responses in a step, one in a pass (`micro_batch_size`,
`local_rollout_forward_batch_size` 1). GRPO has no critic and the default `beta = 0`. `checkpoint = "offload"` keeps the blocks'
inputs in pinned memory; `q8_0` is `kv_cache_type`, which changes numbers.

| method | tokens | checkpoint | cache | card, all | rollout | update | pinned |
|---|---|---|---|---|---|---|---|""")
for (phase, length, checkpoint, cache), cells in long_plans.items():
    print(f"| {phase} | {length:,} | {checkpoint} | {'f16' if cache == 'auto' else cache} | {' | '.join(cells)} |")
print("""
## Floors of a step, seconds: decoding + scoring + update

Expected, not measured: decoding reads the base and the cache once per token at the card's bandwidth; scoring and update do
their products at the card's rate. Real steps take longer: small kernels, attention, unpacking and the host come on top.

| model, base | """ + " | ".join(CARDS) + " |\n|---|" + "---|" * len(CARDS))
for model, dtype in [("1B (Llama 3.2)", "bf16"), ("7B (Llama 2)", "q4_k"), ("8B (Llama 3.1)", "q4_k"), ("14B (Qwen 2.5)", "q4_k")]:
    cells = []
    for bandwidth, rate in CARDS.values():
        parts = floors(model, dtype, bandwidth, rate)
        cells.append(f"{sum(parts):.1f} ({' + '.join(f'{part:.1f}' for part in parts)})")
    print(f"| {model}, {dtype} | {' | '.join(cells)} |")

bandwidth, rate = CARDS["H100"]
command = [BINARY, "--quiet", "bench", "gpu", "--roofline", f"{bandwidth / 1e9:g},{rate / 1e12:g}", "--model", "7b", "--json"]


def roofline(*more):
    """The kernels of a step, and their sum."""
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [k for k in lines if k["bench"] == "gpu/kernel"], next(line for line in lines if line["bench"] == "gpu/kernels")


kernels, whole = roofline()
q8_kernels, q8_whole = roofline("--kv-cache-type", "q8_0")
decoding = lambda of, name: next(k for k in of if k["name"] == name)
cached, q8_cached = decoding(kernels, "attention_decode_f16"), decoding(q8_kernels, "attention_decode_q8_0_f16")
print(f"""
## Floors by kernel of a step of the 7B in q4_k on the H100

`fourfold bench gpu --roofline {bandwidth / 1e9:g},{rate / 1e12:g}` counts the launches of the very step that runs, the bytes of
their operands and the products' operations. Nothing in the table was measured on a card: a kernel's floor is the longer of its
bytes at the card's bandwidth and its operations at the card's rate, and `bench gpu` on a card prints the measured time beside it.
All {whole["launches"]:,} launches: {whole["floor_seconds"]:.2f} s with `checkpoint = "block"`. Products are named by rows x columns
x terms.

With `--kv-cache-type q8_0` (expected as well) `attention_decode_q8_0_f16` reads {q8_cached["bytes"] / 1e9:.1f} GB in place of {cached["bytes"] / 1e9:.1f}: {q8_cached["floor_ms"]:.1f} ms, and all
launches {q8_whole["floor_seconds"]:.2f} s.

| kernel | launches | GB | TFLOP | floor, ms | share |
|---|---|---|---|---|---|""")
shown = [kernel for kernel in kernels if kernel["share"] >= 0.002]
for k in shown:
    operations = f"{k['operations'] / 1e12:.1f}" if k["operations"] else ""
    print(f"| {k['name']} | {k['calls']:,} | {k['bytes'] / 1e9:.1f} | {operations} | {k['floor_ms']:.1f} | {k['share']:.1%} |")
rest = [kernel for kernel in kernels if kernel["share"] < 0.002]
print(f"| {len(rest)} others | {sum(k['calls'] for k in rest):,} | {sum(k['bytes'] for k in rest) / 1e9:.1f} | "
      f"| {sum(k['floor_ms'] for k in rest):.1f} | {sum(k['share'] for k in rest):.1%} |")

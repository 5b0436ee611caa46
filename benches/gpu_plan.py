#!/usr/bin/env python3
"""Which models fit which cards by the planner, floors of a step by the cards' own figures, goals, and what others publish.

    benches/gpu_plan.py target/release/fourfold > benches/records/gpu.md
    benches/gpu_plan.py target/release/fourfold --readme > benches/records/gpu.md

Nothing is measured here. Memory is `fourfold plan --device cuda --memory`: the passes themselves on a machine that counts. Times
are floors: `fourfold bench gpu --roofline` counts the launches of a step with their bytes and operations, and a kernel takes at
least the longer of its bytes over the card's bandwidth and its operations over the card's rate. What was measured elsewhere stands
below, in the goals and in others' figures, with its source. The README's table is one of the tables: where it is another there,
this program ends with an error, and with --readme it writes the table there. It takes five to ten minutes on two cores.
"""
import json
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BINARY = sys.argv[1]
PROMPTS, PROMPT, RESPONSE, RANK = 8, 256, 256, 16
GIB = 2**30
# Name: hidden, intermediate, layers, heads, key/value heads, vocabulary, tied.
MODELS = {
    "1B (Llama 3.2)": (2048, 8192, 16, 32, 8, 128256, True),
    "7B (Llama 2)": (4096, 11008, 32, 32, 32, 32000, False),
    "8B (Llama 3.1)": (4096, 14336, 32, 32, 8, 128256, False),
    "14B (Qwen 2.5)": (5120, 13824, 48, 40, 8, 152064, False),
    "32B (Qwen 2.5)": (5120, 27648, 64, 40, 8, 152064, False),
}
# Shapes that only others' figures are of.
MORE_MODELS = {
    "8B (Qwen 3)": (4096, 12288, 36, 32, 8, 151936, False),
    "65B (Llama)": (8192, 22016, 80, 64, 64, 32000, False),
}
TYPES = ["q4_k", "bf16"]
SIZES = [8, 12, 16, 24, 48]
# Name: bytes per second of its memory, operations per second of products of 16-bit numbers with f32 sums, bytes per second from
# pinned memory. The H100's are measured. The others' are of NVIDIA's data sheets: multiprocessors times boost clock times 512
# operations (1,024 of a workstation's card), and the link's rate.
CARDS = {
    "H100": (2.958e12, 683e12, 55e9),
    "RTX 4060": (0.272e12, 24 * 2.46e9 * 512, 15.75e9),
    "RTX 3060": (0.360e12, 28 * 1.777e9 * 512, 31.5e9),
    "RTX 4080": (0.717e12, 76 * 2.505e9 * 512, 31.5e9),
    "RTX 4090": (1.008e12, 128 * 2.52e9 * 512, 31.5e9),
    "RTX A6000": (0.768e12, 84 * 1.80e9 * 1024, 31.5e9),
}
# A card of each size.
OF_SIZE = dict(zip(SIZES, ["RTX 4060", "RTX 3060", "RTX 4080", "RTX 4090", "RTX A6000"]))
# Bases of the README's table; its steps have floors.
STEPS = [(m, t) for m in MODELS for t in TYPES if (m[:2], t) not in (("1B", "q4_k"), ("32", "bf16"))]
# Kernels that nothing but decoding launches.
DECODING = ("gemv_", "attention_decode_", "attention_append", "attention_merge", "low_rank_inputs", "sample_")
# What gpu_check.sh measures of the goals: arguments of bench gpu, which have to stand there.
CHECKS = {
    "q4_k": "--model 7b --stored q4_k",
    "bf16": "--model 7b --stored bf16 --no-kernels --sequences 8,64",
    "streamed": "--model 7b --stored bf16 --offload 32 --batch-size 16 --micro-batch-size 16 --prompt-length 480 "
                "--response-length 32 --steps 1 --sequences 64 --no-kernels",
    "135m": "--model 135m --stored bf16,q8_0 --prompt-length 64 --response-length 64 --rank 8 --sequences 8",
    "grpo": "--model 7b --stored q4_k --methods grpo --batch-size 64 --response-length 512 --steps 1 --sequences 64 --no-kernels",
}
BF16_GOAL = 2.2


def prose(text):
    """Paragraphs, filled once the numbers are in them."""
    for paragraph in filter(None, map(str.strip, text.split("\n\n"))):
        print("\n" + textwrap.fill(" ".join(paragraph.split()), 128, break_long_words=False, break_on_hyphens=False))


def measures(check, line):
    return f"`bench gpu {CHECKS[check]}`: `gpu/{line}`"


def config(model, context=8192):
    hidden, wide, layers, heads, kv, vocab, tied = (MODELS | MORE_MODELS)[model]
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=vocab, hidden_size=hidden,
        intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        head_dim=128 if hidden > 2048 else 64, max_position_embeddings=context, rms_norm_eps=1e-5, rope_theta=5e5,
        tie_word_embeddings=tied, hidden_act="silu", torch_dtype="bfloat16",
    )


class Step(list):
    """The kernels of a step, with their launches, bytes and operations; `beside`: bytes of those that a second stream runs while
    products do."""

    beside = 0.0


class Shapes:
    """A config.json for each model, in a folder that goes away."""

    def __init__(self, folder):
        self.folder = folder
        for model in MODELS | MORE_MODELS:
            for context in (8192, 131072):
                Path(self.path(model, context)).write_text(json.dumps(config(model, context)))

    def path(self, model, context=8192):
        return f"{self.folder}/{list(MODELS | MORE_MODELS).index(model)}_{context}.json"

    def plan(self, model, dtype, phase, gib, settings, context=8192):
        settings = dict(settings) | ({} if dtype == "bf16" else {"base.quantize": dtype})
        path = self.path(model, context)
        command = [BINARY, "plan", "--base", path, "--phase", phase, "--device", "cuda", "--memory", f"{gib}GiB", "--json"]
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.stdout:
            sys.exit(f"{model}, {dtype}, {gib} GiB: {done.stderr}")
        return json.loads(done.stdout)

    def kernels(self, model, dtype, checkpoint="block", micro=4, more=()):
        """The kernels of a step."""
        bandwidth, rate, _ = CARDS["H100"]
        command = [BINARY, "--quiet", "bench", "gpu", "--roofline", f"{bandwidth / 1e9:g},{rate / 1e12:g}", "--json"]
        command += ["--model", model if model == "135m" else self.path(model), "--stored", dtype, "--checkpoint", checkpoint]
        command += ["--micro-batch-size", str(micro), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr}")
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        step = Step(line for line in lines if line["bench"] == "gpu/kernel")
        step.beside = sum(line.get("floor_beside", 0.0) for line in lines if line["bench"] == "gpu/kernels") * bandwidth
        return step


def ppo(**more):
    settings = {
        "lora.r": RANK, "ppo.batch_size": PROMPTS, "ppo.response_length": RESPONSE, "data.max_prompt_length": PROMPT,
        "ppo.micro_batch_size": 4,
    }
    return settings | {key.replace("__", "."): value for key, value in more.items()}


def grpo(rank, tokens, checkpoint, cache="auto"):
    """Eight answers to a prompt, half of each sequence its answer, one sequence in a pass."""
    return {
        "lora.r": rank, "data.max_prompt_length": tokens // 2, "base.kv_cache_type": cache, "grpo.checkpoint": checkpoint,
        "grpo.local_rollout_forward_batch_size": 1, "grpo.num_generations": 8, "grpo.per_device_train_batch_size": 1,
        "grpo.gradient_accumulation_steps": 8, "grpo.max_completion_length": tokens // 2,
    }


def sft(rank, tokens, checkpoint="block", batch=1):
    """Without evaluation, which reads eight sequences in a pass whatever the batch."""
    return {
        "lora.r": rank, "data.max_length": tokens, "data.eval_rows": 0, "sft.checkpoint": checkpoint,
        "sft.per_device_train_batch_size": batch,
    }


def on_card(found):
    return next(iter(found["devices"].values()))


def total(found):
    return on_card(found)["total"]


def gib(size):
    return f"{size / GIB:.1f} GiB"


def by_size(shapes, model, dtype):
    """A plan for each size of card. One that has room to spare on a smaller card is the same there."""
    found = {}
    for size in reversed(SIZES):
        larger = next(reversed(found.values()), None)
        if larger and larger["fits"] and total(larger) <= 0.9 * size * GIB:
            found[size] = larger
            continue
        found[size] = shapes.plan(model, dtype, "ppo", size, ppo())
        change = (found[size]["smallest_change"] or {}).get("set", {})
        if "base.offload" in change:
            # How many layers that is, and how large they are.
            found[size]["streamed"] = shapes.plan(model, dtype, "ppo", size, ppo() | change)
    return found


def cell(found):
    if found["fits"]:
        return gib(total(found))
    change = (found["smallest_change"] or {}).get("set")
    if not change:
        return "no"
    short = {"ppo.micro_batch_size": "micro", "ppo.local_rollout_forward_batch_size": "at once", "ppo.checkpoint": "checkpoint"}
    if "streamed" in found:
        change = change | {"base.offload": f"{found['streamed']['offload']['layers']} layers"}
    return ", ".join(f"{short.get(key, key.split('.')[-1])} {value}" for key, value in change.items())


def setting(found):
    """The checkpoint and the micro-batch that the base runs with, or None where nothing fits."""
    change = (found["smallest_change"] or {}).get("set", {})
    if found["fits"] or change:
        return change.get("ppo.checkpoint", found["checkpoint"]), int(change.get("ppo.micro_batch_size", found["micro_batch_size"]))
    return None


def floor(kernels, bandwidth, rate):
    """Seconds, at least: what runs beside products takes none of its own."""
    every = sum(max(kernel["bytes"] / bandwidth, kernel["operations"] / rate) for kernel in kernels)
    return every - getattr(kernels, "beside", 0.0) / bandwidth


def decoding(kernels, layers):
    """Decoding's kernels, and the steps that they are launched in: each has its attention once for each layer."""
    of = [kernel for kernel in kernels if kernel["name"].startswith(DECODING)]
    return of, sum(kernel["calls"] for kernel in of if kernel["name"].startswith("attention_decode_")) / layers


def of_step(model, kernels, card, streamed=None):
    """Seconds of decoding and of the rest of a step, at least; every streamed layer is copied at each decoding step."""
    bandwidth, rate, link = CARDS[card]
    of, steps = decoding(kernels, MODELS[model][2])
    first = floor(of, bandwidth, rate)
    rest = floor(kernels, bandwidth, rate) - first
    if streamed:
        first = max(first, steps * streamed["offload"]["pinned"] / link)
    return first, rest


def seconds(value):
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def fits(found, model, kernels, card):
    """A cell of the README's table."""
    if kernels is None:
        return "no"
    floors = f"{seconds(sum(of_step(model, kernels, card, found.get('streamed'))))} s"
    if found["fits"]:
        return f"{gib(total(found))}, {floors}"
    if "streamed" in found:
        return f"{found['streamed']['offload']['layers']} layers streamed, {floors}"
    return f"{gib(found['smallest_change']['device'])} ({cell(found).replace('micro ', 'micro-batch ')}), {floors}"


script = Path(__file__).with_name("gpu_check.sh").read_text().replace("\\\n", " ")
runs = [" ".join(line.split()[3:]) for line in script.splitlines() if line.startswith("bench ")]
missing = [arguments for arguments in CHECKS.values() if arguments not in runs]
if missing:
    sys.exit(f"gpu_check.sh does not run: bench gpu {missing[0]}")
with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
    shapes = Shapes(folder)
    seven, eight = "7B (Llama 2)", "8B (Llama 3.1)"
    jobs = {(m, t): pool.submit(by_size, shapes, m, t) for m in MODELS for t in TYPES}
    # A 7B in Q4_K: eight responses in a step, one in a pass; what the card and pinned memory hold.
    ways = [("block", "auto"), ("offload", "auto"), ("offload", "q8_0")]
    long_jobs = {}
    for phase in ("ppo", "grpo"):
        for tokens in (8192, 32768):
            for checkpoint, cache in ways:
                settings = grpo(RANK, tokens, checkpoint, cache) if phase == "grpo" else ppo(
                    ppo__micro_batch_size=1, ppo__local_rollout_forward_batch_size=1, ppo__response_length=tokens // 2,
                    data__max_prompt_length=tokens // 2, base__kv_cache_type=cache, ppo__checkpoint=checkpoint,
                )
                job = pool.submit(shapes.plan, seven, "q4_k", phase, 512, settings, 131072)
                long_jobs[phase, tokens, checkpoint, cache] = job
    # The goals' plans: as gpu_check.sh runs them, and by default where there is room.
    groups = ppo(
        ppo__checkpoint="block", ppo__advantage_estimator="grpo", ppo__num_generations=8, ppo__batch_size=64,
        ppo__response_length=512,
    )
    goal_jobs = {
        "block": pool.submit(shapes.plan, seven, "q4_k", "ppo", 512, ppo(ppo__checkpoint="block")),
        "default": pool.submit(shapes.plan, seven, "q4_k", "ppo", 512, ppo()),
        "grpo": pool.submit(shapes.plan, seven, "q4_k", "ppo", 512, groups),
        "grpo q8_0": pool.submit(shapes.plan, seven, "q4_k", "ppo", 512, groups | {"base.kv_cache_type": "q8_0"}),
    }
    # The nearest settings to what others publish.
    other_jobs = {
        key: pool.submit(shapes.plan, model, dtype, phase, 512, settings, 131072)
        for key, (model, dtype, phase, settings) in {
            "hydra": (seven, "bf16", "ppo", ppo(lora__r=128)),
            "65B": ("65B (Llama)", "q4_k", "sft", sft(64, 512)),
            "8B": (eight, "q4_k", "sft", sft(16, 512)),
            "14B": ("14B (Qwen 2.5)", "q4_k", "sft", sft(16, 512)),
            "32B": ("32B (Qwen 2.5)", "q4_k", "sft", sft(16, 512)),
            "20K": (eight, "q4_k", "grpo", grpo(32, 20480, "offload")),
            "110K": ("8B (Qwen 3)", "q4_k", "grpo", grpo(32, 110000, "offload")),
            "context 12": (eight, "q4_k", "sft", sft(32, 21848, "offload")),
            "context 24": (eight, "q4_k", "sft", sft(32, 78475, "offload")),
            "wiki 1,024": (seven, "q4_k", "sft", sft(8, 1024)),
            "wiki 32,768": (seven, "q4_k", "sft", sft(8, 32768, "offload")),
            "wiki 100,000": (seven, "q4_k", "sft", sft(8, 100000, "offload")),
            "qerl": ("32B (Qwen 2.5)", "q4_k", "grpo", grpo(32, 4096, "block")),
        }.items()
    }
    decode = ("--response-length", "65")
    small = ("--prompt-length", "64", "--response-length", "64", "--rank", "8")
    kernel_jobs = {
        key: pool.submit(shapes.kernels, model, dtype, *rest)
        for key, (model, dtype, *rest) in {
            "q8_0": (seven, "q4_k", "block", 4, ("--kv-cache-type", "q8_0")),
            "bf16": (seven, "bf16", "block", 4, ("--compute-dtype", "bf16")),
            "bf16 none": (seven, "bf16", "none", 4, ("--compute-dtype", "bf16")),
            "135m": ("135m", "bf16", "block", 4, small),
            "decode 8": (seven, "q4_k", "block", 4, decode),
            "decode 64": (seven, "q4_k", "block", 4, ("--batch-size", "64", *decode)),
            "grpo": (seven, "q4_k", "block", 4, ("--methods", "grpo", "--batch-size", "64", "--response-length", "512")),
        }.items()
    }
    plans = {(*key, size): found for key, job in jobs.items() for size, found in job.result().items()}
    # Steps as gpu_check.sh measures them, and as they run on each card.
    needed = {(*key, "block", 4) for key in STEPS}
    needed |= {(*key, *setting(plans[(*key, size)])) for key in STEPS for size in SIZES if setting(plans[(*key, size)])}
    step_jobs = {key: pool.submit(shapes.kernels, *key) for key in sorted(needed)}
    long_plans, goal_plans, other_plans, steps, counted = (
        {key: job.result() for key, job in some.items()} for some in (long_jobs, goal_jobs, other_jobs, step_jobs, kernel_jobs)
    )


def step_of(model, dtype, card):
    """The plan and the kernels of a step on a card; on the H100 as gpu_check.sh measures it."""
    if card == "H100":
        return {}, steps[model, dtype, "block", 4]
    found = plans[model, dtype, next(size for size, name in OF_SIZE.items() if name == card)]
    return found, setting(found) and steps[(model, dtype, *setting(found))]


table = [
    "| model | base | " + " | ".join(f"{size} GiB ({OF_SIZE[size]})" for size in SIZES) + " |",
    "|---|---|" + "---|" * len(SIZES),
]
for model, dtype in STEPS:
    cells = [fits(found, model, kernels, card) for card in OF_SIZE.values() for found, kernels in [step_of(model, dtype, card)]]
    table.append(f"| {model} | {dtype} | {' | '.join(cells)} |")

bandwidth, rate, link = CARDS["H100"]
print(f"""# What fits a card, floors of a step, goals, and others' figures

Written by `benches/gpu_plan.py`. No figure of the present code was measured on a card: what was measured of an earlier state is in
`gpu_h100.log`, and `benches/gpu_check.sh` measures a card at hand. Memory is planned, times are floors and expected, and the two
columns "measured" of the goals are of other programs.

PPO, four roles on one base, {PROMPTS} x ({PROMPT} + {RESPONSE}) tokens, LoRA r = {RANK} on all linear maps, micro-batches of 4, products
in f16.

## Model, base and card: what fits, and the floor of a step

The planned memory of the card with context and cuBLAS, or the change that fits ("streamed" layers stay in the host's pinned
memory), and the floor of a step on a card of that size, which is expected and not measured. The README has this table.
""")
print("\n".join(table))
print(f"""
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
for (phase, tokens, checkpoint, cache), found in long_plans.items():
    device = on_card(found)
    beside = device["context"] + device["workspace"]
    sizes = [total(found), *(device["phases"][name] + beside for name in ("rollout", "update")), found["offload"]["pinned"]]
    cells = " | ".join(gib(size) for size in sizes)
    print(f"| {phase} | {tokens:,} | {checkpoint} | {'f16' if cache == 'auto' else cache} | {cells} |")

print("""
## Floors of a step, seconds: decoding + the rest

Expected, not measured: each kernel of the step takes at least its bytes at the card's bandwidth or its operations at the card's
rate, the H100's as measured and the others' by their data sheets. The step is the one that the plan for a card of that size
runs (`checkpoint = "none"` where there is room), on the H100 the one with `"block"`. A star marks a base that does not fit: its
decoding copies the streamed layers at each step, at the link's rate. What is dequantised beside products is left out. Real
steps take longer: no kernel reaches its floor, and launches and the host come on top.

| model, base | """ + " | ".join(CARDS) + " |\n|---|" + "---|" * len(CARDS))
for model, dtype in STEPS:
    cells = []
    for card in CARDS:
        found, kernels = step_of(model, dtype, card)
        if kernels is None:
            cells.append("no")
            continue
        parts = of_step(model, kernels, card, found.get("streamed"))
        star = "\\*" if "streamed" in found else ""
        cells.append(f"{seconds(sum(parts))}{star} ({' + '.join(map(seconds, parts))})")
    print(f"| {model}, {dtype} | {' | '.join(cells)} |")

# Goals.
h100 = {key: floor(kernels, bandwidth, rate) for key, kernels in counted.items()}
of_q4_k, of_bf16 = steps[seven, "q4_k", "block", 4], steps[seven, "bf16", "block", 4]
step, step_bf16 = floor(of_q4_k, bandwidth, rate), floor(of_bf16, bandwidth, rate)


def launches(kernels):
    return f"{sum(kernel['calls'] for kernel in kernels):,} launches"


def per_step(kernels):
    of, count = decoding(kernels, MODELS[seven][2])
    return floor(of, bandwidth, rate) / count


planned = on_card(goal_plans["block"])
bare = planned["total"] - planned["context"] - planned["workspace"]
smallest = min(choice["device"] for choice in goal_plans["block"]["choices"])
streamed = plans[seven, "bf16", 8]["streamed"]
pinned_bytes = streamed["offload"]["pinned"]
layers = MODELS[seven][2]
of_decoding, count = decoding(counted["decode 8"], layers)
base_alone = floor([kernel for kernel in of_decoding if kernel["name"].startswith("gemv_")], bandwidth, rate) / count
over_link, rest_streamed = of_step(seven, of_bf16, "H100", streamed)
goals = [
    ("PPO step, 7B in Q4_K", "2.68 s", "36.7 s (NF4); 4.9 s (bf16, tuned)", f"{step:.2f} s, {launches(of_q4_k)}", "1.8 s",
     measures("q4_k", "step")),
    ("its memory on the card: without the context, with it", "7.43, 8.01 GiB",
     "12.4, 13.1 GiB (NF4); with it 16.7 GiB (bf16, tuned)", f"planned: {bare / GIB:.1f}, {gib(planned['total'])}", "6.2, 6.8 GiB",
     "the same line"),
    ("decoding step of 8 sequences, 7B in Q4_K", "5.4 ms", "133 ms (NF4); 9.5 ms (bf16, tuned)",
     f"{per_step(counted['decode 8']) * 1e3:.2f} ms, of it {base_alone * 1e3:.2f} for the base's bytes", "3.0 ms",
     measures("q4_k", "decode")),
    ("decoding 64 sequences at once, 7B in Q4_K", "", "", f"{64 / per_step(counted['decode 64']):,.0f} tokens/s", "6,000 tokens/s",
     measures("q4_k", "decode")),
    ("PPO step, 7B in bf16", "3.13 s", "30.4 s; 4.9 s (tuned)", f"{step_bf16:.2f} s, {launches(of_bf16)}", f"{BF16_GOAL} s",
     measures("bf16", "step")),
    ("PPO step, SmolLM2-135M in bf16, 8 x (64 + 64), r = 8", "0.41 s", "7.8 s; 3.2 s (merged)",
     f"{h100['135m']:.2f} s, {launches(counted['135m'])}", "0.25 s",
     measures("135m", "step")),
    ("GRPO step, 8 prompts x 8 answers of 512, 7B in Q4_K", "", "", f"{h100['grpo']:.1f} s, {launches(counted['grpo'])}", "",
     measures("grpo", "step")),
    ("its memory on the card, with the context", "", "",
     f"planned: {gib(total(goal_plans['grpo']))}; {gib(total(goal_plans['grpo q8_0']))} with the cache in q8_0", "as planned",
     "the same line"),
    ("7B in bf16 on a card of 8 GiB, layers streamed",
     "a pass of 8,192 rows takes 1.03 of the resident time, of 2,048 rows 2.6, of 8 rows 28", "",
     f"planned: {streamed['offload']['layers']} layers in {gib(pinned_bytes)} of pinned memory, "
     f"{gib(total(streamed))} of the card; "
     f"{over_link + rest_streamed:.0f} s, of it {over_link:.0f} for decoding's copies",
     "within 8 GiB; scoring and update of 8,192 rows a pass 1.15 of the resident time, decoding 1.1 of the copies'",
     measures("streamed", "step")),
]
of_small = sum(kernel["calls"] for kernel in counted["135m"])
below = "" if step_bf16 <= BF16_GOAL else f"""
The goal of the base in bf16 is below its floor: the step as `gpu_check.sh` runs it cannot meet it. With `--compute-dtype bf16`,
which converts no matrix, the floor is {h100['bf16']:.2f} s, and with `--checkpoint none` besides {h100['bf16 none']:.2f} s; of each
{floor(decoding(of_bf16, layers)[0], bandwidth, rate):.2f} s are decoding, which reads the whole base for every token.
"""
print(f"""
## Goals on one H100

The column "goal" is what the program aims at, and nothing that it was seen to do. The prototype and PyTorch were measured on one
H100 on 2026-11-27. The prototype is a program of the same design for this one step, products in bf16, that is not a part of the
repository; the row of streamed layers is of another, which streamed all 32 layers of a 7B in Q8_0. PyTorch (2.11, transformers
5.17, PEFT 0.21.2, bitsandbytes 0.50.2) has one base and four adapters; "tuned" samples from merged weights with a static cache in a
CUDA graph, "merged" from merged weights alone, and its memory is its pool's peak and what the card shows. `benches/gpu_compare.sh`
runs such a PyTorch side in turn with this program. This program itself took 5.1 s in Q4_K and 5.9 s in bf16 for 8 x (220 + 256)
tokens in the earlier state of `gpu_h100.log`.

| what | the prototype, measured | PyTorch, measured | floor by the roofline, expected | goal | of `gpu_check.sh` |
|---|---|---|---|---|---|""")
for row in goals:
    print(f"| {' | '.join(row)} |")
prose(f"""
Floors are at {bandwidth / 1e12:.3f} TB/s and {rate / 1e12:.0f} TFLOP/s, and count the bytes of every operand, also of one that is still
in the card's cache. They leave out what a launch costs, measured there at 3.4 microseconds, and at 0.9 in a CUDA graph:
{of_small * 0.9e-6:.2f} to {of_small * 3.4e-6:.2f} s of the 135M's step, which is more than its floor. Where a cell is empty, nothing was
measured, or no goal is set.

{below.strip()}

`bench gpu --roofline` has no line for decoding. Its floor is the sum of those kernels that only decoding launches (`gemv_*`,
`attention_decode_*`, `attention_append_*`, `attention_merge_*`, `low_rank_inputs_*`, `sample_*`) in a step of 256 + 65 tokens, the
lengths that `bench gpu` decodes, divided by its {count:.0f} decoding steps. The norms, activations and embeddings of decoding have
the names of those of scoring and are left out: 1 to 3% more.

The planned memory is that of `gpu_check.sh`, `checkpoint = "block"` and eight responses at once. By default, where there is room,
the same step takes {gib(total(goal_plans['default']))}, and the smallest settings without streamed layers {gib(smallest)}.
Of the streamed base, each decoding step copies {gib(pinned_bytes)} at {link / 1e9:.0f} GB/s, for however many responses.
""")


def plain(*keys):
    return ", ".join(gib(total(other_plans[key])) for key in keys)


def pinned(key):
    return f"{plain(key)}, and {gib(other_plans[key]['offload']['pinned'])} pinned,"


docs = "https://unsloth.ai/docs"
others = [
    (
        "Hydra-RLHF, arXiv 2309.00754, table 1 (second hand)",
        "PPO of Llama-7B, LoRA r = 128: LoRA-PPO 68.0 GB and 18.75 s per sample, Hydra-PPO 71.1 GB and 6.47 s, PPO of four full "
        "models 220 GB (estimated)",
        f"{plain('hydra')} for 7B in bf16, r = 128, 8 x (256 + 256)",
        "their batch and lengths are not known to us, and larger batches are where Hydra-PPO spends what it saves; no time of ours",
    ),
    (
        "QLoRA, arXiv 2305.14314, abstract",
        "fine-tuning of a 65B on one card of 48 GB",
        f"{plain('65B')} for SFT of that shape in Q4_K, r = 64, 1 x 512",
        "their batch and lengths are not in the abstract",
    ),
    (
        "QLoRA by PEFT and bitsandbytes, measured (goals above)",
        "PPO of a 7B in NF4, four roles, r = 16, 8 x (256 + 256): 13.1 GiB",
        f"{gib(planned['total'])} for the same step in Q4_K",
        "theirs was measured, with the memory that PyTorch's pool keeps; another 4-bit type",
    ),
    (
        f"unsloth, requirements ({docs}/get-started/fine-tuning-for-beginners/unsloth-requirements)",
        "SFT by QLoRA, at the very least: 8B 6 GB, 14B 8.5 GB, 32B 26 GB",
        f"{plain('8B', '14B', '32B')} for SFT in Q4_K, r = 16, 1 x 512",
        "their batch, lengths and ranks are not on the page; our optimizer is on the host",
    ),
    (
        f"unsloth, benchmarks ({docs}/basics/unsloth-benchmarks)",
        "longest sequence of SFT by QLoRA, Llama 3.1 8B, r = 32, batch 1: 21,848 tokens on 12 GB and 78,475 on 24 GB; transformers "
        "with FlashAttention 2 932 and 5,789",
        f"{pinned('context 12')} for 21,848 tokens; {pinned('context 24')} for 78,475",
        "the same rank, batch and lengths, theirs measured, ours with `checkpoint = \"offload\"`: at 78,475 ours needs more",
    ),
    (
        "unsloth, release 2025-02-v2 and https://unsloth.ai/blog/grpo (2025-02-20)",
        "GRPO of Llama 3.1 8B, 20K tokens, 8 answers: 54.3 GB, TRL with FlashAttention 2 510.8 GB",
        f"{pinned('20K')} for an 8B in Q4_K, r = 32, 10,240 + 10,240 tokens, 8 answers",
        "theirs trains on the 8 answers at once; ours has one in a pass and samples one after another",
    ),
    (
        f"unsloth, long context ({docs}/get-started/reinforcement-learning-rl-guide/grpo-long-context)",
        "GRPO of Qwen3-8B by QLoRA with vLLM: 110K tokens on one H100 of 80 GB",
        f"{pinned('110K')} for that shape in Q4_K, r = 32, 55,000 + 55,000 tokens, 8 answers",
        "theirs is the longest that fits, and vLLM samples many answers at once; ours has one in a pass",
    ),
    (
        "LLaMA-Factory, wiki Performance-comparison (2024-04-15)",
        "SFT of Llama 2 7B, 4-bit, r = 8, batch 1: with FlashAttention 2 6 GB at 1,024 tokens and 32 GB at 32,768; with unsloth 5, "
        "16, and 37 GB at 100,000",
        f"{plain('wiki 1,024')} for 1,024; {pinned('wiki 32,768')} for 32,768; {pinned('wiki 100,000')} for 100,000",
        "the same rank, batch and lengths, theirs measured, ours in Q4_K and from 32,768 on with `checkpoint = \"offload\"`",
    ),
    (
        "QeRL, arXiv 2510.11696, abstract",
        "RL of a 32B in NVFP4 with LoRA on one H100 of 80 GB; rollouts sped up more than 1.5 times",
        f"{plain('qerl')} for GRPO of a 32B in Q4_K, r = 32, 2,048 + 2,048 tokens, 8 answers",
        "their batch and lengths are not in the abstract; no time of ours",
    ),
]
print("""
## Others' figures beside the planner's

None of these rows is like for like: the last column says what differs. Theirs are what their authors publish, in their GB, as read
in November 2026; "second hand" was read where another quotes it, the rest on the page named or in a copy of it. Ours is planned
and was measured on no card: the card's memory with context and cuBLAS, and what is pinned on the host.

| who | their setting and figure | ours, planned | what differs |
|---|---|---|---|""")
for row in others:
    print(f"| {' | '.join(row)} |")

beside = of_q4_k.beside / bandwidth
kernels = sorted(of_q4_k, key=lambda k: -k["floor_ms"])
attention = lambda of, name: next(k for k in of if k["name"] == name)
cached = attention(kernels, "attention_decode_f16")
q8_cached = attention(counted["q8_0"], "attention_decode_q8_0_f16")
print("\n## Floors by kernel of a step of the 7B in q4_k on the H100")
prose(f"""
`fourfold bench gpu --roofline {bandwidth / 1e9:g},{rate / 1e12:g}` counts the launches of the very step that runs, the bytes of
their operands and the products' operations. Nothing in the table was measured on a card: a kernel's floor is the longer of its
bytes at the card's bandwidth and its operations at the card's rate, and `bench gpu` on a card prints the measured time beside it.
All {launches(kernels)}: {step + beside:.2f} s with `checkpoint = "block"`, {beside:.2f} of them beside products, which the
floors above leave out. Products are named by rows x columns x terms.

With `--kv-cache-type q8_0` (expected as well) `attention_decode_q8_0_f16` reads {q8_cached["bytes"] / 1e9:.1f} GB in place of
{cached["bytes"] / 1e9:.1f}: {q8_cached["floor_ms"]:.1f} ms, and all launches {h100["q8_0"]:.2f} s.
""")
print("""
| kernel | launches | GB | TFLOP | floor, ms | share |
|---|---|---|---|---|---|""")
shown = [kernel for kernel in kernels if kernel["share"] >= 0.002]
for k in shown:
    operations = f"{k['operations'] / 1e12:.1f}" if k["operations"] else ""
    print(f"| {k['name']} | {k['calls']:,} | {k['bytes'] / 1e9:.1f} | {operations} | {k['floor_ms']:.1f} | {k['share']:.1%} |")
rest = [kernel for kernel in kernels if kernel["share"] < 0.002]
print(f"| {len(rest)} others | {sum(k['calls'] for k in rest):,} | {sum(k['bytes'] for k in rest) / 1e9:.1f} | "
      f"| {sum(k['floor_ms'] for k in rest):.1f} | {sum(k['share'] for k in rest):.1%} |")

# The README's table.
readme = Path(__file__).resolve().parent.parent / "README.md"
lines = readme.read_text().split("\n")
first = next((at for at, line in enumerate(lines) if line.startswith("| model | base | 8 GiB")), None)
if first is None:
    sys.exit(f"{readme} has no table that begins with: {table[0]}")
last = next(at for at in range(first, len(lines)) if not lines[at].startswith("|"))
if lines[first:last] != table:
    if "--readme" not in sys.argv:
        sys.exit(f"{readme} has another table than this; --readme writes it there:\n" + "\n".join(table))
    readme.write_text("\n".join([*lines[:first], *table, *lines[last:]]))

"""A reward model over SmolLM2-135M from real comparisons, ours and TRL's RewardTrainer: held-out accuracy at the same budget.

usage: smollm2_reward.py --base HF_DIR --data preference_sharegpt_en.json --out DIR [--fourfold BINARY] [--side both]
HF_DIR: SmolLM2-135M-Instruct, as f32 safetensors (transformers opens the GGUF of tests/fetch/fetch-smollm2.sh and saves it).
The records are LLaMA-Factory's `preference_sharegpt_en` (200). They are too long for a busy machine with two cores, so the
prompt is the first 24 words of the last user turn, and each response its first 40 words; both sides read the same texts.
120 pairs are trained on and up to 76 held out, drawn by the seed (flags change these numbers). One epoch, batches of 4
pairs, AdamW 1e-3 linear with 2 warm-up steps, no decay, gradient norm 1; LoRA r 8, alpha 16 on all linear modules of the
upper 10 of 30 blocks, and a fresh score head; f32, one thread. TRL gets token ids, which its own collator pads; they are
the ids that our side makes of the texts (with its chat template and end token).
It prints one JSON line per side and seed, then the paired summary: the interval is Student's t over the seeds' differences.
Made for torch 2.15.0, transformers 5.23.0, peft 0.21.2, trl 1.12.0, datasets 4.8.4, pyarrow 21.0.0, dill 0.4.0.
results.jsonl holds the results of three seeds: both sides are at chance (ours 0.51, 0.49, 0.57; TRL 0.53, 0.54, 0.50),
because neither learns from so few pairs; the difference is 0.005, its interval -0.15 to 0.16.
"""

import argparse
import json
import math
import os
import pathlib
import random
import subprocess
import tempfile

BATCH, RATE, WARMUP, LAYERS = 4, 1e-3, 2, list(range(20, 30))
ROLES = {"human": "user", "gpt": "assistant"}
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # by degrees of freedom


def first_words(text, n):
    return " ".join(text.split()[:n])


def pairs(path, seed, train, held_out, prompt_words, answer_words):
    rows = []
    for record in json.loads(path.read_text()):
        asked = [turn["value"] for turn in record["conversations"] if turn["from"] == "human"]
        chosen, rejected = (first_words(record[k]["value"], answer_words) for k in ("chosen", "rejected"))
        if asked and chosen != rejected:
            message = lambda role, text: [{"role": role, "content": text}]
            rows.append({
                "prompt": message("user", first_words(asked[-1], prompt_words)),
                "chosen": message("assistant", chosen), "rejected": message("assistant", rejected),
            })
    random.Random(seed).shuffle(rows)
    return rows[:train], rows[train : train + held_out]


def ours(binary, base, folder, seed):
    config = folder / "reward.toml"
    config.write_text(f"""
seed = {seed}
[base]
path = "{base}"
[lora]
r = 8
lora_alpha = 16
layers_to_transform = {LAYERS}
[data]
path = "{folder / 'train.jsonl'}"
max_length = 512
eval_rows = 0
[reward]
learning_rate = {RATE}
warmup_steps = {WARMUP}
per_device_train_batch_size = {BATCH}
""")
    out = folder / "fourfold"
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    run = lambda *words: subprocess.run([binary, *map(str, words)], check=True, capture_output=True, text=True, env=environment)
    run("reward", config, "--out", out, "--overwrite")
    judged = run("score", "--base", base, "--adapter", out / "adapter", "--data", folder / "held_out.jsonl", "--json")
    return json.loads(judged.stdout)["accuracy"]


def trl(base, folder, seed):
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def ids(row, answer):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        return encode(prompt) + encode(row[answer][0]["content"]) + [tokenizer.eos_token_id]

    def read(name):
        rows = map(json.loads, (folder / name).read_text().splitlines())
        return [{f"{answer}_ids": ids(row, answer) for answer in ("chosen", "rejected")} for row in rows]

    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch, seed=seed, report_to="none", save_strategy="no", logging_strategy="no", use_cpu=True,
            bf16=False, learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=WARMUP, max_length=512,
            per_device_train_batch_size=BATCH, num_train_epochs=1, gradient_checkpointing=False, disable_tqdm=True,
        )
        lora = LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            layers_to_transform=LAYERS, modules_to_save=["score"], task_type="SEQ_CLS",
        )
        trainer = RewardTrainer(
            model=str(base), args=config, train_dataset=Dataset.from_list(read("train.jsonl")), processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
        model = trainer.model.eval()
        with torch.no_grad():
            score = lambda row: model(torch.tensor([row])).logits[0, 0].item()
            right = [score(row["chosen_ids"]) > score(row["rejected_ids"]) for row in read("held_out.jsonl")]
    return sum(right) / len(right)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--base", type=pathlib.Path, required=True)
    arguments.add_argument("--data", type=pathlib.Path, required=True)
    arguments.add_argument("--out", type=pathlib.Path, required=True)
    arguments.add_argument("--fourfold", default="target/release/fourfold")
    arguments.add_argument("--seeds", default="0,1,2")
    for name, default in (("train", 120), ("held-out", 76), ("prompt-words", 24), ("answer-words", 40)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--side", choices=["both", "fourfold", "trl"], default="both")
    arguments = arguments.parse_args()
    gaps = []
    for seed in map(int, arguments.seeds.split(",")):
        folder = (arguments.out / str(seed)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = {}
        split = pairs(
            arguments.data, seed, arguments.train, arguments.held_out, arguments.prompt_words, arguments.answer_words)
        for name, rows in zip(("train.jsonl", "held_out.jsonl"), split):
            (folder / name).write_text("\n".join(map(json.dumps, rows)))
        for side in ("fourfold", "trl"):
            if arguments.side in ("both", side):
                found[side] = ours(arguments.fourfold, arguments.base, folder, seed) if side == "fourfold" else trl(
                    arguments.base, folder, seed)
                print(json.dumps(dict(
                    study="smollm2_reward", side=side, seed=seed, train_pairs=len(split[0]), held_out_pairs=len(split[1]),
                    accuracy=found[side],
                )), flush=True)
        if len(found) == 2:
            gaps.append(found["fourfold"] - found["trl"])
    if len(gaps) > 1:
        mean = sum(gaps) / len(gaps)
        spread = math.sqrt(sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1) / len(gaps))
        half = T_95.get(len(gaps) - 1, 1.96) * spread
        print(json.dumps(dict(study="smollm2_reward", gap=mean, interval=[mean - half, mean + half], seeds=len(gaps))))


if __name__ == "__main__":
    main()

"""Sums of two two-digit numbers on SmolLM2-135M-Instruct, learnt with GRPO by a rule alone (`kind = "math"`): greedy accuracy
on held-out sums before and after, with Wilson's 95% interval.

usage: arithmetic.py --base GGUF --out DIR [--fourfold BINARY] [--learning BINARY] [--steps 200] [--seed 0]
GGUF: the file of tests/fetch/fetch-smollm2.sh. BINARY: `target/release/fourfold`, and the bench `learning` as cargo built it
(`cargo bench --bench learning --no-run` prints its path), which answers the held-out sums (`greedy.rs`).
The 8100 sums of 10 to 99 are shuffled by the seed; 300 are held out, and no sum of the same two numbers in the other order is
trained on. It prints one JSON line, which arithmetic.jsonl keeps. The settings are arithmetic.toml's.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import time

HELD_OUT = 300
# SmolLM2's chat template without its system turn, which would be half of every prompt; the answer is begun, so that the
# response is the number alone.
PROMPT = "<|im_start|>user\nCalculate {0} + {1}.<|im_end|>\n<|im_start|>assistant\n{0} + {1} ="


def sums(seed):
    """Held-out sums and the others, as records."""
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(every)
    held = every[:HELD_OUT]
    known = {frozenset(pair) for pair in held}
    record = lambda pair: {"prompt": PROMPT.format(*pair), "answer": str(sum(pair))}
    return list(map(record, held)), [record(pair) for pair in every[HELD_OUT:] if frozenset(pair) not in known]


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--base", type=pathlib.Path, required=True)
    arguments.add_argument("--out", type=pathlib.Path, required=True)
    arguments.add_argument("--fourfold", type=pathlib.Path, default="target/release/fourfold")
    arguments.add_argument("--learning", type=pathlib.Path, required=True)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = arguments.parse_args()
    out, base = arguments.out.absolute(), arguments.base.expanduser().absolute()
    fourfold, learning = arguments.fourfold.absolute(), arguments.learning.absolute()
    out.mkdir(parents=True, exist_ok=True)
    held_out, train = sums(arguments.seed)
    for name, rows in (("held_out.jsonl", held_out), ("train.jsonl", train)):
        (out / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = out / "arithmetic.toml"
    shutil.copy(pathlib.Path(__file__).with_name("arithmetic.toml"), config)

    def accuracy(*adapter):
        paths = ",".join(map(str, (base, out / "held_out.jsonl", *adapter)))
        judged = subprocess.run([learning, "--greedy", paths], check=True, capture_output=True, text=True)
        return json.loads(judged.stdout)

    before = accuracy()
    print(json.dumps({"before": before}), flush=True)
    environment = {**os.environ, "FOURFOLD_BASE": str(base)}
    settings = [f"grpo.max_steps={arguments.steps}", f"seed={arguments.seed}", f"grpo.learning_rate={arguments.learning_rate}"]
    flags = [word for setting in settings for word in ("--set", setting)]
    began = time.time()
    subprocess.run([fourfold, "grpo", config, "--overwrite", *flags], check=True, cwd=out, env=environment)
    seconds = time.time() - began
    print(json.dumps({
        "study": "arithmetic", "side": "fourfold", "seed": arguments.seed, "steps": arguments.steps,
        "learning_rate": arguments.learning_rate, "before": before, "after": accuracy(out / "grpo/actor"),
        "seconds": round(seconds),
    }), flush=True)


if __name__ == "__main__":
    main()

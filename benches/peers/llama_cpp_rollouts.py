"""PPO whose rollouts the real llama.cpp samples, beside the same runs with the built-in sampler: the program starts llama-server
itself, anew for each version of the actor's adapter. All on the CPU, over the embedded base as a GGUF file in f32.

usage: llama_cpp_rollouts.py path/to/fourfold path/to/llama-server --out DIR [--parts rollouts,means,ahead,killed]
Prints one JSON line a finding, on stdout; runs log into DIR, which must not exist.

  rollouts  ten iterations by each side, five seeds of the built-in sampler and three of llama.cpp: scores, KL, mismatch, seconds;
            llama.cpp's scores against the 95% prediction interval of one more run of the built-in sampler
  means     eight further seeds of each side: differences of the means of scores and KL, with Welch's 95% intervals
  ahead     the same with async_rollouts = 1
  killed    llama-server is killed amid the run, and the run resumed: the actor's bytes against those of the whole run
"""
import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

from vllm_rollouts import ADAPTERS, BASE, BATCH, ITERATIONS, OWN_SEEDS, VLLM_SEEDS as SEEDS, Bench, tell

# f32 throughout, as there; 16 texts at once, each of the base's whole context. A model this small spends a second thread's time on
# spinning.
OPTIONS = [
    "--parallel", "16", "--ctx-size", str(16 * 256), "--threads", "1", "--threads-batch", "1", "--n-gpu-layers", "0", "--no-warmup",
    "--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off",
]


def quantile(freedom):
    """Student's t, two-sided 95%, to 1e-3 between 6 and 14 degrees of freedom (Cornish-Fisher)."""
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2) + (
        3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z
    ) / (384 * freedom**3)


class LlamaBench(Bench):
    def __init__(self, args):
        args.vllm_python = sys.executable
        super().__init__(args)
        self.server = args.server.resolve()
        # An adapter of weight 0 leaves the base.
        command = [self.binary, "merge", "--base", BASE, "--adapter", f"{ADAPTERS}/sft=0", "--format", "gguf", "--dtype", "f32"]
        subprocess.run([*command, "--out", self.out / "base.gguf"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def engine(self, *_):
        command = [str(self.server), "-m", str(self.out / "base.gguf"), *OPTIONS]
        return "ppo.rollout.engine=llama.cpp", f"ppo.rollout.server={json.dumps(command)}", f"ppo.rollout.concurrency={BATCH}"

    def rollouts(self):
        for seed in range(OWN_SEEDS):
            self.run(f"self-{seed}", f"seed={seed}")
            tell(part="rollouts", engine="self", seed=seed, **self.curve(f"self-{seed}"))
        for seed in range(SEEDS):
            self.run(f"llama.cpp-{seed}", f"seed={seed}", *self.engine())
            tell(part="rollouts", engine="llama.cpp", seed=seed, **self.curve(f"llama.cpp-{seed}"))
        self.interval("llama.cpp", SEEDS)

    def means(self):
        seeds = range(5, 13)
        for seed in seeds:
            for engine, sets in [("self", ()), ("llama.cpp", self.engine())]:
                self.run(f"{engine}-{seed}", f"seed={seed}", *sets)
        for of, begin in [("scores", 0), ("kl", 3)]:
            rows = []
            for i in range(begin, ITERATIONS):
                ours, theirs = ([self.curve(f"{engine}-{seed}")[of][i] for seed in seeds] for engine in ("self", "llama.cpp"))
                a, b = (statistics.variance(one) / len(seeds) for one in (ours, theirs))
                freedom = (a + b) ** 2 / ((a * a + b * b) / (len(seeds) - 1))
                half = quantile(freedom) * (a + b) ** 0.5
                difference = statistics.mean(theirs) - statistics.mean(ours)
                rows.append([round(x, 3) for x in (statistics.mean(ours), statistics.mean(theirs), difference - half, difference + half)])
            tell(part="means", of=of, first_iteration=begin + 1, seeds=[*seeds], own_llama_cpp_low_high=rows)

    def ahead(self):
        correction = "ppo.importance_sampling_correction=token_truncate"
        self.run("ahead", *self.engine(), "ppo.rollout.async_rollouts=1", correction)
        tell(part="ahead", engine="llama.cpp", seed=0, **self.curve("ahead"))

    def killed(self):
        if not (self.out / "llama.cpp-0").exists():
            self.run("llama.cpp-0", *self.engine())
        process = self.run("killed", *self.engine(), check=False)
        file = self.out / "killed/metrics.jsonl"
        while process.poll() is None and not (file.exists() and file.read_text().count("\n") >= 4):
            time.sleep(0.02)
        # Amid the next rollout: the child that takes the place of this one. Only this run's is killed.
        before = child = self.child(process.pid)
        while process.poll() is None and child in (None, before):
            child = self.child(process.pid)
        os.kill(child, signal.SIGKILL)
        code, said = process.wait(), (self.out / "killed.log").read_text()
        said = re.findall("The reason: .*", said.replace(str(self.server), "llama-server"))
        kept = len(self.metrics("killed"))
        self.run("killed", *self.engine(), resume=True)
        tell(
            part="killed", exit_code=code, said=said, iterations_before=kept, iterations_after=len(self.metrics("killed")),
            same_actor_bytes=self.actor("killed") == self.actor("llama.cpp-0"), **self.curve("killed"),
        )

    def child(self, parent):
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout.split()
        return int(found[0]) if found else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("server", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--parts", default="rollouts,means,ahead,killed")
    args = parser.parse_args()
    parts, bench = args.parts.split(","), LlamaBench(args)
    ours = subprocess.run([bench.binary, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    theirs = subprocess.run([bench.server, "--version"], capture_output=True, text=True, check=True)
    theirs = re.findall("version: .*|built with .*", theirs.stdout + theirs.stderr)
    tell(part="versions", fourfold=ours, date=time.strftime("%Y-%m-%d"), llama_server=theirs, options=OPTIONS)
    for part in parts:
        getattr(bench, part)()


if __name__ == "__main__":
    main()

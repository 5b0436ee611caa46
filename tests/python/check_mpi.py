"""Training among two and three processes under mpirun, started by check_mpi.sh with the program and a base.

Ranks with their shares of a batch follow one process in metrics and weights to 1e-5; one rank gives the bytes of no MPI; a rank that
is killed ends the other within 30 s, and the run is resumed to the bytes of one that was not stopped; errors are said once.
"""

import json, os, pathlib, shutil, signal, struct, subprocess, sys, tempfile, time

BINARY, BASE, ADAPTERS = sys.argv[1:4]
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
CLOCKS = ("time", "seconds", "tokens_per_second")
failures = 0


def check(name, fault):
    global failures
    failures += bool(fault)
    print(f"{'FAIL' if fault else 'ok  '} {name}{': ' + str(fault) if fault else ''}", flush=True)


def command(stage, ranks, out, *more):
    words = [BINARY, stage, f"{stage}.toml", "--out", out, *more]
    return [*MPIRUN, "-n", str(ranks), *words] if ranks else words


def run(stage, ranks, out, *more, within=300):
    ran = subprocess.run(command(stage, ranks, out, *more), cwd=place, capture_output=True, text=True, timeout=within)
    return ran.returncode, ran.stdout, ran.stderr


def metrics(out):
    lines = [json.loads(line) for line in (place / out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.split("/")[0] not in CLOCKS} for line in lines]


def weights(out):
    folder = "adapter" if (place / out / "adapter").exists() else "actor"
    data = (place / out / folder / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return data, data[8 + length :]


def numbers(value, path=""):
    if isinstance(value, dict):
        for key, inner in value.items():
            # The second is rounding alone, and another one in batches of other sizes.
            if not key.startswith(("histogram/", "sampling/sampling_logp_difference")):
                yield from numbers(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from numbers(inner, f"{path}/{at}")
    elif isinstance(value, (int, float)):
        yield path, float(value)


def far(one, other):
    a, b = list(numbers(metrics(one))), list(numbers(metrics(other)))
    if [k for k, _ in a] != [k for k, _ in b]:
        return "other metrics"
    # Adam's step has the size of the learning rate where a gradient is rounding alone, too: gradients after it may be ten times as
    # far apart (RLOO's: 1e-9 before the first step, 2e-5 after it).
    bound = lambda key: 1e-4 if "grad_norm" in key else 1e-5
    apart_by = [(abs(x - y) / max(1, abs(x)), k) for (k, x), (_, y) in zip(a, b)]
    worst = max(apart_by, key=lambda found: found[0] / bound(found[1]))
    p, q = weights(one)[1], weights(other)[1]
    if len(p) != len(q):
        return "weights of another size"
    apart = max(abs(x - y) for (x,), (y,) in zip(struct.iter_unpack("<f", p), struct.iter_unpack("<f", q)))
    print(f"     the metric nearest its bound, {worst[1]}, is {worst[0]:.1e} apart, weights {apart:.1e}")
    return f"{worst}, weights {apart}" if worst[0] > bound(worst[1]) or apart > 1e-5 else None


def same(one, other):
    if metrics(one) != metrics(other):
        return "metrics differ"
    return None if weights(one)[0] == weights(other)[0] else "weights differ"


place = pathlib.Path(tempfile.mkdtemp())
prompt = lambda i: f"\n\nHuman: How was the soup at place {i}?\n\nAssistant:"
answer = lambda i: [" It is good.", " It is bad and salty.", " Yes, very.", " No."][i % 4]
pair = lambda i: {"prompt": prompt(i), "chosen": answer(i), "rejected": answer(i + 1)}
records = {
    "sft": lambda i: {"prompt": prompt(i), "completion": answer(i)},
    "reward": pair,
    "dpo": pair,
    "kto": lambda i: {"prompt": prompt(i), "completion": answer(i), "label": i % 2 == 0},
}
for stage, record in records.items():
    (place / f"{stage}.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(16)))
    (place / f"{stage}.toml").write_text(
        f"seed = 5\n[base]\npath = {BASE!r}\ndevice = 'cpu'\n[lora]\nr = 2\n[checkpoint]\nsave_steps = 2\nsave_total_limit = 99\n"
        f"[data]\npath = '{stage}.jsonl'\neval_rows = 3\n"
        f"[{stage}]\nper_device_train_batch_size = 6\nnum_train_epochs = 2\nlearning_rate = 1e-3\neval_steps = 2\n"
    )

rollouts = {
    "ppo": "batch_size = 6\ntotal_episodes = 12\nnum_mini_batches = 2\nmicro_batch_size = 1\nresponse_length = 6\n"
    f"reward_adapter = '{ADAPTERS}/reward'\n",
    **{
        stage: "per_device_train_batch_size = 2\ngradient_accumulation_steps = 6\nmax_steps = 2\nnum_generations = 2\n"
        f"max_completion_length = 6\nbeta = 0.04\nreward_adapter = '{ADAPTERS}/reward'\n"
        for stage in ["grpo", "rloo"]
    },
}
for stage, section in rollouts.items():
    (place / f"{stage}.toml").write_text(
        f"seed = 5\n[base]\npath = {BASE!r}\ndevice = 'cpu'\n[data]\npath = 'sft.jsonl'\neval_rows = 3\n"
        f"[{stage}]\nadapter = '{ADAPTERS}/sft'\nlearning_rate = 1e-4\neval_prompts = 3\neval_every = 1\n{section}"
    )


def share(stage, ranks):
    """What makes a rank's share of a batch of 6, or of 6 steps to accumulate; `batch_size` of PPO is that of all ranks."""
    if stage == "ppo":
        return []
    key = "per_device_train_batch_size" if stage in records else "gradient_accumulation_steps"
    return ["--set", f"{stage}.{key}={6 // ranks}"]


for stage in [*records, *rollouts]:
    for ranks, out in [(0, "alone"), (1, "one"), (2, "two"), (2, "again"), (3, "three")]:
        code, _, said = run(stage, ranks, f"{stage}-{out}", *share(stage, max(ranks, 1)))
        check(f"{stage}: {ranks or 'no'} rank{'s' * (ranks != 1)} under mpirun", code and said[-2000:])
    check(f"{stage}: one rank gives the bytes of no MPI", same(f"{stage}-alone", f"{stage}-one"))
    check(f"{stage}: two ranks give one set of bytes", same(f"{stage}-two", f"{stage}-again"))
    check(f"{stage}: two ranks follow one process", far(f"{stage}-alone", f"{stage}-two"))
    check(f"{stage}: three ranks follow one process", far(f"{stage}-alone", f"{stage}-three"))

long = ["--set", "sft.per_device_train_batch_size=2", "--set", "sft.num_train_epochs=60", "--set", "checkpoint.save_steps=10"]
code, _, said = run("sft", 2, "whole", *long)
check("a longer run", code and said[-2000:])
child = subprocess.Popen(command("sft", 2, "killed", *long), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
while child.poll() is None and not any((place / "killed" / "checkpoints").glob("checkpoint-[2-9]0")):
    time.sleep(0.01)
victim = None
for entry in pathlib.Path("/proc").glob("[0-9]*/environ"):
    try:
        if b"OMPI_COMM_WORLD_RANK=1\0" in entry.read_bytes() and os.readlink(f"{entry.parent}/cwd") == str(place):
            victim = int(entry.parent.name)
    except OSError:
        pass
check("rank 1 is found", "no process" if victim is None else None)
if victim is not None:
    os.kill(victim, signal.SIGKILL)
began = time.monotonic()
try:
    code = child.wait(30)
    check(f"a killed rank ends the other, {time.monotonic() - began:.1f} s", None if code else "exit code 0")
except subprocess.TimeoutExpired:
    child.terminate()
    check("a killed rank ends the other", "not within 30 s")
time.sleep(1)
code, _, said = run("sft", 2, "killed", *long, "--resume")
check("the killed run is resumed", code and said[-2000:] or ("going on from" not in said and said[-2000:]) or None)
check("to the bytes of one that was not stopped", same("whole", "killed"))
code, _, said = run("sft", 0, "sft-two", "--resume", str(place / "sft-two/checkpoints/checkpoint-2"))
check("another number of ranks is refused", None if code == 2 and "number of ranks" in said else said[-2000:])

code, _, said = run("sft", 2, "bad", "--set", "data.path=missing.jsonl")
check("an error of all ranks is said once", None if code == 2 and said.count("error:") == 1 else f"{code}: {said[-2000:]}")
(place / "distill.toml").write_text("")
code, _, said = run("distill", 2, "distill")
check("distillation is refused", None if code == 2 and "start it without mpirun" in said else f"{code}: {said[-2000:]}")
code, out, said = run("sft", 2, "json", "--json", "--set", "sft.per_device_train_batch_size=2")
check("--json is one object", None if code == 0 and json.loads(out)["stage"] == "sft" else f"{code}: {out}{said[-2000:]}")
shutil.rmtree(place)
sys.exit(1 if failures else 0)

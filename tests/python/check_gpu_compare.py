#!/usr/bin/env python3
"""benches/gpu_compare.sh measures the same work on both sides: run on the emulated machine and PyTorch's CPU, where times say
nothing, it gives the lines that its readers expect, and PyTorch's first ratio is 1, so its four passes fit each other.

    check_gpu_compare.py FOURFOLD
"""
import json
import os
import pathlib
import subprocess
import sys

root = pathlib.Path(__file__).resolve().parents[2]
env = dict(os.environ, FOURFOLD_BINARY=sys.argv[1], PYTHON=sys.executable, BATCH="4", PROMPT="6", RESPONSE="4", OUT="")
done = subprocess.run(
    [root / "benches/gpu_compare.sh", "tiny", "emulated"], capture_output=True, text=True, env=env, timeout=900
)
if done.returncode:
    sys.exit(f"gpu_compare.sh ended with {done.returncode}: {done.stderr[-3000:]}")
lines = [json.loads(line) for line in done.stdout.splitlines()]
ours = [line for line in lines if line["bench"] == "gpu/step"]
theirs = [line for line in lines if line["bench"] == "gpu_peft/step"]
assert [line["stored"] for line in ours] == ["q4_k", "bf16"], ours
assert [line["rollout"] for line in theirs] == ["adapter", "merged", "static"], theirs
for line in ours + theirs:
    work = {key: line[key] for key in ("model", "responses", "prompt", "response", "micro_batch_size", "r")}
    assert work == {"model": "tiny", "responses": 4, "prompt": 6, "response": 4, "micro_batch_size": 4, "r": 16}, line
    assert {"rollout", "scoring", "update"} <= set(line["phases"]) and line["seconds"] > 0, line
for line in theirs:
    assert line["first_ratio_error"] < 1e-4, line
for line in ours:
    assert line["planned_bytes"] == line["device_bytes"], line
print("gpu_compare: ok, both sides did the same work")

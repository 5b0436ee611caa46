"""Whether TensorBoard's own reader finds in RUN/tb/ what metrics.jsonl and samples.jsonl hold.

usage: check_tensorboard.py path/to/fourfold
Runs SFT, a reward model and PPO on a tiny model that `fourfold quickstart` leaves, reads every event back with TensorBoard's
EventAccumulator, and compares scalars, histograms, texts and hyperparameters. A PPO run that was stopped in its middle and
resumed must have the events of a run never stopped, wall times aside. One line a check; exit code 1 if any failed.
"""

import json
import math
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from tensorboard.backend.event_processing import event_file_loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

CLOCKS = ("time", "seconds", "tokens_per_second")
failures = []


def report(what, good, note=""):
    print(f"{'ok  ' if good else 'FAIL'} {what}{': ' + note if note else ''}", flush=True)
    if not good:
        failures.append(what)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(binary, place, words, **more):
    done = subprocess.run([binary, *words], cwd=place, capture_output=True, text=True, **more)
    assert done.returncode == 0, f"{words}: {done.stderr}"


def near(a, b):
    """Equal as TensorBoard's float32."""
    return math.isnan(a) if b is None else abs(a - b) <= 1e-6 * max(1.0, abs(b))


def check_run(folder, stage):
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    metrics = lines(folder / "metrics.jsonl")
    compared = 0
    for key in metrics[0]:
        if key in ("stage", "step") or key.split("/")[0] in CLOCKS or not isinstance(metrics[0][key], (int, float)):
            continue
        want = [(line["step"], line[key]) for line in metrics if key in line]
        got = [(event.step, event.value) for event in events.Scalars(f"{stage}/{key}")]
        good = [step for step, _ in want] == [step for step, _ in got]
        if not good or not all(near(a, b) for (_, a), (_, b) in zip(got, want)):
            report(f"{stage}: scalar {key}", False, f"{got} {want}")
        compared += len(want)
    report(f"{stage}: scalars", compared > 0, f"{compared} values")
    for key in (key for key in metrics[-1] if key.startswith("histogram/")):
        tag = f"{stage}/{key.removeprefix('histogram/')}"
        want, at = metrics[-1][key], metrics[-1]["step"]
        # A reward model's scores are centred after its last step, and then evaluated once more.
        found = next(event.histogram_value for event in events.Histograms(tag) if event.step == at)
        same = (found.num, found.min, found.max, list(found.bucket)) == (
            want["num"], want["min"], want["max"], want["counts"])
        report(f"{stage}: histogram {key}", same and found.bucket_limit[-1] == want["max"])
    info = events.summary_metadata.get("_hparams_/session_start_info")
    data = plugin_data_pb2.HParamsPluginData.FromString(info.plugin_data.content)
    hparams = data.session_start_info.hparams
    rate = hparams[f"{stage}.learning_rate"].number_value
    report(f"{stage}: hyperparameters", len(hparams) > 20 and rate > 0, f"{len(hparams)} keys")
    return events


def check_texts(folder, events):
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")]
    samples = [s for s in lines(folder / "samples.jsonl") if "iteration" in s]
    found = {(e.step, e.tensor_proto.string_val[0].decode()) for tag in tags for e in events.Tensors(tag)}
    good = all(
        any(step == s["iteration"] and all(part in text for part in s["response"].splitlines()) for step, text in found)
        for s in samples
    )
    report("ppo: texts", good and len(samples) > 0, f"{len(samples)} samples, tags {tags}")


def without_times(folder):
    """The events of a run, wall times and the start's time aside."""
    (path,) = (folder / "tb").glob("events.out.tfevents.*")
    events = []
    for event in event_file_loader.EventFileLoader(str(path)).Load():
        event.wall_time = 0
        for value in event.summary.value:
            if value.tag == "_hparams_/session_start_info":
                data = plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
                data.session_start_info.start_time_secs = 0
                value.metadata.plugin_data.content = data.SerializeToString(deterministic=True)
        events.append(event.SerializeToString(deterministic=True))
    return events


def main():
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        run(binary, place, ["quickstart", "--out", "quick"])
        prompts = [f"How is the soup at number {i}?" for i in range(12)]
        chosen, rejected = " It is good.", " It is bad and salty."
        rows = {
            "sft": [{"prompt": p, "completion": chosen} for p in prompts],
            "reward": [{"prompt": p, "chosen": chosen, "rejected": rejected} for p in prompts],
            "ppo": [{"prompt": p} for p in prompts],
        }
        for stage, records in rows.items():
            (place / f"{stage}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (place / "run.toml").write_text(
            '[base]\npath = "quick/base"\n[lora]\nr = 2\n[data]\npath = "sft.jsonl"\neval_rows = 3\n[checkpoint]\nsave_steps = 1\n'
            "[sft]\nper_device_train_batch_size = 2\nnum_train_epochs = 2\nlearning_rate = 1e-3\n"
            '[reward]\nadapter = "sft/adapter"\nper_device_train_batch_size = 2\neval_steps = 1\nlearning_rate = 1e-3\n'
            '[ppo]\nadapter = "sft/adapter"\nreward_adapter = "reward/adapter"\nlearning_rate = 1e-3\ntotal_episodes = 40\n'
            "batch_size = 4\nresponse_length = 12\neval_prompts = 2\neval_every = 2\nsave_samples = 2\n"
        )
        for stage in rows:
            command = [stage, "run.toml", "--set", f"data.path={stage}.jsonl", "--out"]
            run(binary, place, [*command, stage])
            events = check_run(place / stage, stage)
            if stage == "ppo":
                check_texts(place / stage, events)
                for signals in (signal.SIGTERM, signal.SIGKILL):
                    out = f"stopped{int(signals)}"
                    child = subprocess.Popen([binary, *command, out], cwd=place, stderr=subprocess.DEVNULL)
                    metrics = place / out / "metrics.jsonl"
                    while child.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 3):
                        time.sleep(0.005)
                    child.send_signal(signals)
                    child.wait()
                    was = len(metrics.read_text().splitlines())
                    run(binary, place, [*command, out, "--resume"])
                    same = without_times(place / stage) == without_times(place / out)
                    report(f"ppo: {signals.name} after {was} steps, resumed: the same events", same)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

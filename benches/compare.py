"""Two commands in turn, A B A B ..., and the ratios of what they print: for ours beside a peer, and for two builds of ours.

    python benches/compare.py --rounds 5 \\
        --a "cargo bench --bench steps -- --reps 1 ppo_step" \\
        --b "python benches/peers/peft_steps.py --model DIR --reps 1 ppo_step"
    python benches/compare.py --rounds 5 --fail-above 1.10 --a "NEW/steps --reps 1" --b "OLD/steps --reps 1"

Both print JSON lines with `bench`, `seconds` and `peak_rss_mib`; a case is what stands before the first "/" of `bench`, so
that names of device and type may differ. One JSON line a case: medians of both sides, the ratio A / B of the medians, the
smallest and largest ratio of a round, and the ratio of the peaks. Speeds drift on a shared machine; both sides of a round
saw the same of it. With --fail-above R it exits with 1 where a ratio of medians exceeds R.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys


def run(command):
    """{case: (seconds, peak MiB)} of one run."""
    done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"compare: exit code {done.returncode} of: {command}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {x["bench"].split("/")[0]: (x["seconds"], x.get("peak_rss_mib")) for x in lines if "seconds" in x}
    if not found:
        sys.exit(f"compare: no JSON line with `seconds` from: {command}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", required=True, help="a command; no shell reads it")
    parser.add_argument("--b", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fail-above", type=float)
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        rounds.append((run(options.a), run(options.b)))
        print(f"compare: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    cases = [case for case in rounds[0][0] if case in rounds[0][1]]
    if not cases:
        sys.exit("compare: the two sides share no case")
    slower = []
    for case in cases:
        a, b = ([r[side][case][0] for r in rounds] for side in (0, 1))
        ratio = statistics.median(a) / statistics.median(b)
        each = [x / y for x, y in zip(a, b)]
        peaks = [max((r[side][case][1] or 0) for r in rounds) for side in (0, 1)]
        line = {
            "case": case, "a_seconds": statistics.median(a), "b_seconds": statistics.median(b), "ratio": round(ratio, 3),
            "ratio_min": round(min(each), 3), "ratio_max": round(max(each), 3),
            "a_peak_rss_mib": peaks[0], "b_peak_rss_mib": peaks[1],
            "memory_ratio": round(peaks[0] / peaks[1], 3) if peaks[1] else None,
        }
        print(json.dumps(line), flush=True)
        if options.fail_above and ratio > options.fail_above:
            slower.append(f"{case}: {ratio:.3f}")
    if slower:
        sys.exit(f"compare: slower than {options.fail_above} times B: {', '.join(slower)}")


if __name__ == "__main__":
    main()

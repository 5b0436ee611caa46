"""The table of the study `sections` from results.jsonl: for each method and side the mean over seeds of gold score, KL and win
rate with Student's 95% interval, and our gold less TRL's, paired by seed.

usage: summary.py [RESULTS]
"""

import collections
import json
import math
import pathlib
import sys

# Student's t at 97.5%, by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def interval(values):
    """The mean, and half of its 95% interval; None for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, T_95.get(len(values) - 1, 1.96) * deviation / math.sqrt(len(values))


def shown(values):
    mean, half = interval(values)
    return f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"


def table(lines):
    """Markdown's rows."""
    last = collections.defaultdict(dict)
    for line in lines:
        row = json.loads(line)
        if row.get("study") == "sections" and row.get("last"):
            last[row["method"], row["side"]][row["seed"]] = row
    yield "| method | seeds | gold | KL | win rate | TRL: seeds | gold | KL | gold, ours less TRL's |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for method in dict.fromkeys(method for method, _ in last):
        ours, theirs = last.get((method, "fourfold"), {}), last.get((method, "trl"), {})
        column = lambda side, key: shown([row[key] for row in side.values()]) if side else ""
        both = sorted(ours.keys() & theirs.keys())
        gap = shown([ours[seed]["gold"] - theirs[seed]["gold"] for seed in both]) if both else ""
        win = column(ours, "win_rate") if method != "sft" else ""
        yield (
            f"| {method} | {len(ours)} | {column(ours, 'gold')} | {column(ours, 'kl')} | {win} "
            f"| {len(theirs) or ''} | {column(theirs, 'gold')} | {column(theirs, 'kl')} | {gap} |"
        )


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("results.jsonl")
    print("\n".join(table(path.read_text().splitlines())))

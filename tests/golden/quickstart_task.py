"""Prints what src/quickstart must reproduce: rows of each kind with their gold parts, and a hash over thousands.

    python tests/golden/quickstart_task.py > tests/golden/quickstart_task.json

Needs Python only (3.9 or later); the seeds stand below, the tables in src/quickstart/assets/grammar.json.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src/quickstart/python"))
import task  # noqa: E402

SEEDS = [3, (1 << 63) + 11]  # the second one needs all 64 bits
SHOWN, HASHED, FLIP_PERCENT = 5, 3000, 15

# Texts a policy may write and the generator does not: what ends, repeats, drifts or says nothing.
ODD_TEXTS = [
    ("", True),
    (".", True),
    (" The tea", True),
    (" The tea at the Copper Kettle was fresh and tasty. I would happily order there again.", True),
    (" The tea at the Copper Kettle was fresh and tasty. I would happily order there again.", False),
    (" The tea at the Copper Kettle was fresh and tasty. I would happily order there again. We regret", True),
    (" The tea at the Copper Kettle was fresh and tasty. The Blue Anchor always delights.", True),
    (" Fresh tea, fresh tea, fresh tea. Fresh tea, fresh tea, fresh tea.\n", True),
    (" We regret the tea. We regret the tea. We regret the tea. We regret the tea. We regret the tea.", True),
    (" The Copper Kettle always delights.\n\nHuman: tea? It was caf\u00e9-fresh \u2026 stale. teapot", True),
]


def fnv1a(lines):
    """FNV-1a, 64 bits, over the lines' UTF-8 bytes, each line closed by a line feed."""
    h = 0xCBF29CE484222325
    for line in lines:
        for byte in line.encode() + b"\n":
            h = ((h ^ byte) * 0x100000001B3) & task.MASK
    return f"{h:016x}"


def row_line(row):
    return "|".join(row[k] for k in ("prompt", "kind", "name", "aspect"))


def gold_line(g):
    return f"{g['total']:.6f} {g['polarity']:.6f} {g['aspect']} {g['place']} {g['form']} {g['repeats']}"


def sft_line(row):
    return row_line(row) + "|" + row["response"] + "|" + gold_line(task.gold(row, row["response"]))


def pair_line(row):
    return row_line(row) + "|" + row["chosen"] + "|" + row["rejected"] + "|" + ("clean" if row["clean"] else "flipped")


def of_seed(seed):
    sft = task.sft_rows(seed, HASHED)
    entry = {
        "seed": str(seed),
        "documents": task.documents(seed, SHOWN),
        "documents_hash": fnv1a(task.documents(seed, HASHED)),
        "sft": [{**row, "gold": task.gold(row, row["response"])} for row in sft[:SHOWN]],
        "sft_hash": fnv1a(map(sft_line, sft)),
    }
    for split, label in ((task.TRAIN, "train"), (task.HELD_OUT, "held_out")):
        pairs = task.pairs(seed, HASHED, FLIP_PERCENT, split)
        prompts = task.prompts(seed, HASHED, split)
        entry[label] = {
            "pairs": pairs[:SHOWN],
            "pairs_hash": fnv1a(map(pair_line, pairs)),
            "prompts": prompts[:SHOWN],
            "prompts_hash": fnv1a(map(row_line, prompts)),
        }
    return entry


if __name__ == "__main__":
    asked = task.wrap("How was the tea at the Copper Kettle?")
    row = {"prompt": asked, "kind": "cafe", "name": "Copper Kettle", "aspect": "tea"}
    odd = [{"text": text, "ended": ended, "gold": task.gold(row, text, ended)} for text, ended in ODD_TEXTS]
    golden = {
        "shown": SHOWN,
        "hashed": HASHED,
        "flip_percent": FLIP_PERCENT,
        "odd_row": row,
        "odd_texts": odd,
        "seeds": [of_seed(seed) for seed in SEEDS],
    }
    print(json.dumps(golden, indent=1, ensure_ascii=False))

#!/usr/bin/env python3
"""Writes a JSON-lines file of preference pairs, to try data of any size: make_pairs.py OUT.jsonl [ROWS] [SEED]

Default 1,000,000 rows, some 1.2 GB: {"prompt", "chosen", "rejected"} of pseudo-words whose lengths and frequencies are
like English text's (Zipf), with numbers, punctuation, line breaks and a share of other scripts. One row in ten asks what an
earlier one asked. Python's standard library alone; the same seed gives the same bytes.
"""

import json
import random
import sys


def main():
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    rng = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    syllables = [c + v + e for c in "b c d f g h l m n p r s t w st tr sh".split() for v in "aeiou" for e in ("", "n", "r", "st", "ng")]
    vocabulary = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(20_000)]
    vocabulary[50:80] = ["don't", "it's", "東京", "être", "größer", "1969", "3.50", "(see", "below)", "–", "e.g.", "OK!", "и", "нет", "U.S."] * 2
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    # Drawing once and slicing is a hundred times as fast as drawing for every row.
    stream = rng.choices(vocabulary, weights, k=2_000_000)

    def text(low, high):
        n = rng.randint(low, high)
        at = rng.randrange(len(stream) - n)
        words = stream[at:at + n]
        for i in range(rng.randint(8, 14), n, 13):
            words[i] += rng.choice((".", ".", ",", ".\n\n", "?"))
        return " ".join(words).capitalize() + "."

    prompts = []
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        for row in range(rows):
            if prompts and row % 10 == 0:
                prompt = rng.choice(prompts)
            else:
                prompt = text(8, 60)
                if len(prompts) < 10_000:
                    prompts.append(prompt)
            pair = {"prompt": prompt, "chosen": text(20, 120), "rejected": text(20, 120)}
            out.write(json.dumps(pair, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

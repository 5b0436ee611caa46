"""Which records DeepSpeed-Chat gives to which phase: numpy's shuffle of a data set's row numbers, cut by `data_split`.

Written from the formulas: fractions are normalised, each end is the last one plus round(fraction * size), and the
difference of the last end to the size is taken from every end but the first 0; then rows[start:end] of the shuffled rows.
Writes dschat_split.json. Printed with numpy (version in the file).
"""
import json
import pathlib

import numpy as np


def rows(seed, size):
    order = np.arange(size, dtype=np.uint32)
    np.random.RandomState(seed).shuffle(order)
    return order


def phase(seed, size, split, index):
    parts = [float(part) for part in split.split(",")]
    parts = [part / sum(parts) for part in parts]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + int(round(part * float(size))))
    over = ends[-1] - size
    ends = [ends[0]] + [end - over for end in ends[1:]]
    return rows(seed, size)[ends[index]:ends[index + 1]]


numbers = lambda array: [int(number) for number in array]
shuffles = [dict(seed=seed, size=size, rows=numbers(rows(seed, size)))
            for seed, size in [(1234, 0), (1234, 1), (1234, 2), (1234, 100), (0, 33), (4294967295, 17), (42, 64), (42, 65)]]
# A long one: three rows of it and a sum that weighs each place.
long = rows(1234, 200_000).astype(np.uint64)
weighed = int(np.sum(long * np.arange(1, len(long) + 1, dtype=np.uint64)) % np.uint64(2**61 - 1))
big = dict(seed=1234, size=len(long), first=numbers(long[:3]), weighed=weighed)
cases = [(1234, 10, "2,4,4"), (1234, 13, "2,4,4"), (7, 25, "2,4,4"), (1234, 9, "6,2,2"), (1234, 11, "10,0,0"),
         (1234, 5, "0,1,1"), (1234, 7, "0,1,1"), (3, 19, "9,1"), (3, 5, "1,1"), (1234, 3, "1,1,1"), (5, 8, "1"),
         (1234, 1, "2,4,4"), (1234, 0, "2,4,4")]
splits = [dict(seed=seed, size=size, split=split,
               phases=[numbers(phase(seed, size, split, index)) for index in range(split.count(",") + 1)])
          for seed, size, split in cases]
out = pathlib.Path(__file__).with_suffix(".json")
out.write_text(json.dumps(dict(numpy=np.__version__, shuffles=shuffles, big=big, splits=splits)) + "\n")

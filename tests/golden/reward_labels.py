"""Prints reward_labels.json: the loss of pairs with a soft label or a margin, from the formula in 50 digits.

loss = -p log sigmoid(x) - (1 - p) log sigmoid(-x), x = s0 - s1 - margin; with p = 1 it is the loss of TRL's RewardTrainer with a
margin. The gradient is a central difference of the loss in 50 digits, not a formula. Scores, p and margin are f32 numbers.
Python 3, standard library.   Run: python tests/golden/reward_labels.py > tests/golden/reward_labels.json
"""

import json
import random
import struct
from decimal import Decimal, getcontext

getcontext().prec = 50


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def loss(s0, s1, p, margin):
    x = s0 - s1 - margin
    return p * (1 + (-x).exp()).ln() + (1 - p) * (1 + x.exp()).ln()


def case(s0, s1, p, margin):
    s0, s1, p, margin = map(f32, (s0, s1, p, margin))
    exact = [Decimal(v) for v in (s0, s1, p, margin)]
    step = Decimal(10) ** -12
    slope = (loss(exact[0] + step, *exact[1:]) - loss(exact[0] - step, *exact[1:])) / (2 * step)
    better, worse = (s0, s1) if p > 0.5 else (s1, s0)
    return {
        "scores": [s0, s1], "chosen_probability": p, "margin": margin, "loss": float(loss(*exact)),
        "grad": [float(slope), float(-slope)], "right": int(p != 0.5 and better > worse), "pairs": int(p != 0.5),
    }


random.seed(43)
draw = lambda: random.gauss(0, 2)
cases = [case(draw(), draw(), p, m) for p in (1.0, 0.75, 0.5, 0.3, 0.0) for m in (0.0, 0.7, -1.5)]
cases += [case(1.0, 1.0, 0.5, 0.0), case(1.0, 1.0, 1.0, 0.0), case(30.0, -30.0, 0.9, 2.0), case(-30.0, 30.0, 0.9, 2.0)]
print(json.dumps(cases, indent=1))

"""Prints reward_loss.json: pairwise losses over last-token scores and over the window from the divergence on.

Written from the published formulas in float64; gradients by torch autograd. "padded" follows DeepSpeed-Chat's rules
(first PAD after num_padding_at_beginning of them ends an answer; window up to the later end; PAD positions of the
shorter answer count; identical rows compare their last position). "ragged" holds the last score past an answer's end.
torch 2.15.0, seed 41.   Run: python tests/golden/reward_loss.py > tests/golden/reward_loss.json
"""

import itertools
import json

import torch
from torch.nn.functional import logsigmoid

PAD = 1


def draw(n):
    return (2 * torch.randn(n)).float().double()


def ranked(k, scale=1.0):
    scores = (draw(k) * scale).float().double().requires_grad_()
    pairs = list(itertools.combinations(range(k), 2))
    loss = torch.stack([-logsigmoid(scores[i] - scores[j]) for i, j in pairs]).mean()
    loss.backward()
    right = sum((scores[i] > scores[j]).item() for i, j in pairs)
    return {"scores": scores.tolist(), "loss": loss.item(), "grad": scores.grad.tolist(), "right": right}


def ragged(chosen, rejected):
    c, r = draw(len(chosen)).requires_grad_(), draw(len(rejected)).requires_grad_()
    longest = max(len(chosen), len(rejected))
    start = longest - 1
    for t in range(longest):
        if t >= min(len(chosen), len(rejected)) or chosen[t] != rejected[t]:
            start = t
            break
    held = lambda x, t: x[t] if t < len(x) else x[-1]
    loss = torch.stack([-logsigmoid(held(c, t) - held(r, t)) for t in range(start, longest)]).mean()
    loss.backward()
    return {
        "chosen": chosen, "rejected": rejected, "chosen_scores": c.tolist(), "rejected_scores": r.tolist(),
        "start": start, "end": longest, "loss": loss.item(), "chosen_grad": c.grad.tolist(), "rejected_grad": r.grad.tolist(),
    }


def padded(chosen, rejected, leading):
    length = len(chosen)
    c, r = draw(length).requires_grad_(), draw(length).requires_grad_()

    def end_of(row):
        pads = [t for t, token in enumerate(row) if token == PAD]
        return pads[leading] if len(pads) > leading else length

    different = [t for t in range(length) if chosen[t] != rejected[t]]
    c_end = end_of(chosen)
    if different:
        r_end = end_of(rejected)
        start, end = different[0], max(c_end, r_end)
    else:
        r_end, start, end = c_end, length - 1, length
    assert start > 0
    loss = (-logsigmoid(c[start:end] - r[start:end])).mean()
    loss.backward()
    return {
        "chosen": chosen, "rejected": rejected, "leading": leading, "chosen_scores": c.tolist(),
        "rejected_scores": r.tolist(), "start": start, "end": end, "chosen_end": c[c_end - 1].item(),
        "rejected_end": r[r_end - 1].item(), "loss": loss.item(), "chosen_grad": c.grad.tolist(),
        "rejected_grad": r.grad.tolist(),
    }


if __name__ == "__main__":
    torch.manual_seed(41)
    print(json.dumps({
        "pad": PAD,
        "ranked": [ranked(2), ranked(4), ranked(9), ranked(3, 400.0)],
        "ragged": [
            ragged([5, 6, 7, 8, 2], [5, 6, 9, 2]),  # chosen longer
            ragged([5, 6, 2], [5, 6, 9, 9, 9, 2]),  # rejected longer
            ragged([5, 6, 7], [5, 6, 7, 8, 2]),  # one continues the other
            ragged([5, 6, 7, 2], [5, 6, 7, 2]),  # identical
            ragged([5, 3], [5, 4]),  # one token each
        ],
        "padded": [
            padded([5, 6, 7, 8, 2, 1, 1, 1], [5, 6, 9, 2, 1, 1, 1, 1], 0),
            padded([1, 5, 6, 2, 1, 1, 1, 1], [1, 5, 6, 9, 9, 9, 2, 1], 1),  # OPT: a leading token that equals PAD
            padded([1, 5, 6, 7, 7, 7, 7, 2], [1, 5, 9, 2, 1, 1, 1, 1], 1),  # chosen fills the row
            padded([5, 6, 7, 2, 1, 1], [5, 6, 7, 2, 1, 1], 0),  # identical
            padded([5, 1, 1, 1], [5, 4, 1, 1], 0),  # an empty answer
        ],
    }))

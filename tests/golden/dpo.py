"""Prints dpo.json: losses and gradients of DPO's pair losses and of KTO, from the papers' formulas in float64.

pairs: sigmoid with and without label smoothing (arXiv:2305.18290), robust (arXiv:2403.00409), ipo over per-token
log-ratios (arXiv:2310.12036), hinge (arXiv:2305.10425). kto: arXiv:2402.01306 with the KL term detached and held at 0.
Gradients are torch autograd's by the summed log-probabilities. torch 2.15.0, seed 51.
Run: python tests/golden/dpo.py > tests/golden/dpo.json
"""

import json

import torch
from torch.nn.functional import logsigmoid

SETTINGS = [("sigmoid", 0.0, 0.1), ("sigmoid", 0.15, 0.3), ("robust", 0.1, 0.1), ("robust", 0.3, 0.5), ("ipo", 0.0, 0.2), ("hinge", 0.0, 0.1)]


def answer(spread):
    tokens = int(torch.randint(1, 40, ()))
    reference = -float(torch.rand((), dtype=torch.float64)) * 3 * tokens
    logp = reference + spread * float(torch.randn((), dtype=torch.float64))
    return {"logp": logp, "reference": reference, "tokens": tokens}


def pair_loss(kind, s, beta, c, r, chosen, rejected):
    h = (c - chosen["reference"]) - (r - rejected["reference"])
    if kind == "sigmoid":
        return -(1 - s) * logsigmoid(beta * h) - s * logsigmoid(-beta * h)
    if kind == "robust":
        return (-(1 - s) * logsigmoid(beta * h) + s * logsigmoid(-beta * h)) / (1 - 2 * s)
    if kind == "hinge":
        return torch.relu(1 - beta * h)
    per_token = (c - chosen["reference"]) / chosen["tokens"] - (r - rejected["reference"]) / rejected["tokens"]
    return (per_token - 1 / (2 * beta)) ** 2


def leaf(x):
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def pairs():
    drawn = [(answer(spread), answer(spread)) for spread in (0.0, 0.5, 4.0, 30.0, 300.0)]
    out = []
    for kind, s, beta in SETTINGS:
        for chosen, rejected in drawn:
            c, r = leaf(chosen["logp"]), leaf(rejected["logp"])
            loss = pair_loss(kind, s, beta, c, r, chosen, rejected)
            loss.backward()
            out.append({
                "loss_type": kind, "label_smoothing": s, "beta": beta, "chosen": chosen, "rejected": rejected,
                "loss": loss.item(), "chosen_grad": c.grad.item(), "rejected_grad": r.grad.item(),
            })
    return out


def kto(beta, desirable, undesirable, shift):
    answers = [{**answer(5.0), "label": i % 3 != 1} for i in range(6)]
    mismatched = [shift + float(torch.randn((), dtype=torch.float64)) for _ in answers]
    kl = max(sum(mismatched) / len(mismatched), 0.0)
    leaves = [leaf(a["logp"]) for a in answers]
    losses = []
    for a, x in zip(answers, leaves):
        ratio = x - a["reference"]
        good = desirable * (1 - torch.sigmoid(beta * (ratio - kl)))
        bad = undesirable * (1 - torch.sigmoid(beta * (kl - ratio)))
        losses.append(good if a["label"] else bad)
    loss = torch.stack(losses).mean()
    loss.backward()
    rows = [{**a, "grad": x.grad.item()} for a, x in zip(answers, leaves)]
    return {
        "beta": beta, "desirable_weight": desirable, "undesirable_weight": undesirable, "mismatched": mismatched,
        "kl": kl, "answers": rows, "loss": loss.item(),
    }


if __name__ == "__main__":
    torch.manual_seed(51)
    print(json.dumps({"pairs": pairs(), "kto": [kto(0.1, 1.0, 1.0, 2.0), kto(0.4, 1.0, 1.3, -3.0), kto(0.1, 0.5, 2.0, 0.5)]}))

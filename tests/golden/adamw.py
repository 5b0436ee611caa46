"""Prints adamw.json: torch.optim.AdamW steps, torch's gradient clipping, and transformers' schedules.

torch 2.15.0, transformers 5.23.0, seed 11.   Run: python tests/golden/adamw.py > tests/golden/adamw.json
"""

import json

import torch
import transformers

STEPS = 5


def run(weight_decay, lr, betas, eps):
    torch.manual_seed(11)
    shapes = [(2, 3), (4,), (3, 1)]
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    start = [p.detach().flatten().tolist() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)
    grads, after = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + step)  # the rate may change between steps
        for p in params:
            p.grad = torch.randn(p.shape) * 10.0 ** (step - 3)  # tiny gradients make eps matter
        grads.append([p.grad.flatten().tolist() for p in params])
        optimizer.step()
        after.append([p.detach().flatten().tolist() for p in params])
    state = [optimizer.state[p] for p in params]
    return {
        "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "shapes": shapes, "start": start,
        "grads": grads, "after": after,
        "m": [s["exp_avg"].flatten().tolist() for s in state], "v": [s["exp_avg_sq"].flatten().tolist() for s in state],
    }


def clip(max_norm):
    """The adapter test's gradients: layer-wise factors filled with these numbers."""
    torch.manual_seed(12)
    grads = [torch.randn(2, 4), torch.randn(4, 2), torch.randn(1, 4)]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm).item()
    return {
        "max_norm": max_norm, "norm": norm, "grads": [g.flatten().tolist() for g in grads],
        "clipped": [p.grad.flatten().tolist() for p in params],
    }


def schedule(name, warmup, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total + 3):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return {"name": name, "warmup": warmup, "total": total, "lr": 3e-4, "rates": rates}


if __name__ == "__main__":
    print(json.dumps({
        "runs": [run(0.1, 1e-2, (0.9, 0.999), 1e-8), run(0.0, 3e-3, (0.8, 0.95), 1e-3)],
        "clips": [clip(0.5), clip(100.0)],
        "schedules": [
            schedule(name, warmup, total)
            for name in ["linear", "cosine", "constant_with_warmup"]
            for warmup, total in [(0, 7), (4, 20), (30, 20)]
        ],
    }))

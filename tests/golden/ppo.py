"""Prints ppo.json: KL estimates, shaped rewards, GAE, whitening and both clipped losses with their gradients.

Everything in float64 from the formulas; gradients by torch autograd. GAE is computed as the weighted sum of its
definition, not by the recursion that the Rust code uses. Inputs are exact f32 numbers. Ragged: 1 to 9 tokens.
torch 2.15.0, seed 31.   Run: python tests/golden/ppo.py > tests/golden/ppo.json
"""

import json

import torch

LENGTHS = [1, 5, 2, 9, 1]
KL_COEF, SCORE_CLIP, NO_EOS_PENALTY = 0.1, 1.5, 0.75


def draw(*shape, scale=1.0, shift=0.0):
    """f32 numbers, widened."""
    return (torch.randn(*shape) * scale + shift).float().double()


def per_sequence(flat):
    return [part.tolist() for part in flat.split(LENGTHS)]


def gae(rewards, values, gamma, lam):
    n = len(rewards)
    following = torch.cat([values[1:], torch.zeros(1, dtype=torch.float64)])
    deltas = rewards + gamma * following - values
    return torch.stack([sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)])


def policy(logprobs, old, advantages, clip, normaliser):
    logprobs = logprobs.clone().requires_grad_()
    ratio = (logprobs - old).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(plain, clipped).sum() / normaliser
    loss.backward()
    ratio = ratio.detach()
    return {
        "clip": clip, "normaliser": normaliser, "loss": loss.item(), "grad": logprobs.grad.tolist(),
        "clipfrac": (clipped > plain).double().mean().item(),
        "approx_kl": (0.5 * (logprobs.detach() - old) ** 2).mean().item(),
        "mean_ratio": ratio.mean().item(), "ratio_variance": ratio.var().item(),
    }


def value(values, old, returns, clip, normaliser):
    values = values.clone().requires_grad_()
    held = torch.maximum(torch.minimum(values, old + clip), old - clip)
    plain, clipped = (values - returns) ** 2, (held - returns) ** 2
    loss = 0.5 * torch.maximum(plain, clipped).sum() / normaliser
    loss.backward()
    error = returns - values.detach()
    return {
        "clip": clip, "normaliser": normaliser, "loss": loss.item(), "grad": values.grad.tolist(),
        "clipfrac": (clipped > plain).double().mean().item(),
        "mean_value": values.mean().item(), "mean_return": returns.mean().item(),
        "explained_variance": (1 - error.var() / returns.var()).item(),
    }


if __name__ == "__main__":
    torch.manual_seed(31)
    total = sum(LENGTHS)
    old = draw(total, scale=1.0, shift=-2.0)
    logprobs = (old + 0.4 * torch.randn(total).double()).float().double()
    reference = draw(total, scale=1.0, shift=-2.0)
    logprobs[3], reference[3] = -30.0, -2.0  # a difference of 28: k3's clamp at 20 acts
    values, returns = draw(total), draw(total)
    old_values = (values + 0.4 * torch.randn(total).double()).float().double()
    advantages = draw(total)
    advantages[2] = 0.0
    scores = draw(len(LENGTHS), scale=2.0)
    ended = [True, False, True, True, False]

    difference = logprobs - reference
    gap = (-difference).clamp(-20, 20)
    kl = {"k1": difference, "k2": 0.5 * difference**2, "k3": gap.exp() - gap - 1}

    shaped = []
    for part, score, eos in zip(difference.split(LENGTHS), scores, ended):
        rewards = -KL_COEF * part
        rewards[-1] += score.clamp(-SCORE_CLIP, SCORE_CLIP) - (0.0 if eos else NO_EOS_PENALTY)
        shaped.append(rewards)

    gaes = []
    for gamma, lam in [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)]:
        rewards32 = [r.float().double() for r in shaped]
        parts = [gae(r, v, gamma, lam) for r, v in zip(rewards32, values.split(LENGTHS))]
        gaes.append({
            "gamma": gamma, "lam": lam, "rewards": [r.tolist() for r in rewards32],
            "advantages": [p.tolist() for p in parts],
            "returns": [(p + v).tolist() for p, v in zip(parts, values.split(LENGTHS))],
        })

    mean, var = advantages.mean(), advantages.var()  # torch's variance divides by n - 1, as TRL's does
    unit = (advantages - mean) / (var + 1e-8).sqrt()
    print(json.dumps({
        "lengths": LENGTHS, "logprobs": logprobs.tolist(), "old": old.tolist(), "reference": reference.tolist(),
        "values": values.tolist(), "old_values": old_values.tolist(), "returns": returns.tolist(),
        "advantages": advantages.tolist(), "scores": scores.tolist(), "ended": ended,
        "kl_coef": KL_COEF, "score_clip": SCORE_CLIP, "missing_eos_penalty": NO_EOS_PENALTY,
        "kl": {k: v.tolist() for k, v in kl.items()}, "shaped": [s.tolist() for s in shaped], "gae": gaes,
        "whitened": unit.tolist(), "scaled": (unit + mean).tolist(),
        # Index 3 is the far-off token of the KL test: a ratio of e^-28 is fine for the loss, too.
        "policy": [policy(logprobs, old, advantages, 0.2, total), policy(logprobs, old, advantages, 0.05, 7.0)],
        "value": [value(values, old_values, returns, 0.2, total), value(values, old_values, returns, 1e9, 5.0)],
    }))

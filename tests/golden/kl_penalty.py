"""Two PPO updates under the KL penalty (arXiv:1707.06347 eq. 8) by PEFT and torch: numbers for
tests/training/kl_penalty.rs.

Over the quickstart's base with the adapter lm of peft_logits as actor and the bare base as reference. One rollout of given
answers and advantages, two passes over it, one step each: loss = mean(-A r + beta (r - 1 - log r)), torch's AdamW at a
constant rate, gradients clipped. Prints kl_penalty.json: the rollout, and mean(r - 1 - log r) over its tokens before the
first step, before the second, and after the second. Section 4 of the paper adapts beta by the last of them.
torch 2.15.0, transformers 5.23.0, peft 0.21.2, seed 59.   Run: python tests/golden/kl_penalty.py > tests/golden/kl_penalty.json
"""

import json

import torch
import transformers

from ppo_update import END, adapted, rows

BETA, LR, MAX_NORM, STEPS = 0.5, 5e-4, 0.5, 2

if __name__ == "__main__":
    torch.manual_seed(59)
    draw = lambda n: torch.randint(2, 1024, (n,)).tolist()
    rollout = [(draw(p), draw(a) + [END]) for p, a in [(3, 9), (14, 2), (8, 21), (2, 6)]]
    actor = adapted(transformers.AutoModelForCausalLM, "lm").eval()
    with torch.no_grad():
        old = torch.cat([rows(actor, *x)[0] for x in rollout])
    advantages = torch.randn(len(old))
    parameters = [p for p in actor.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def log_ratio():
        return torch.cat([rows(actor, *x)[0] for x in rollout]) - old

    def kl(gap):
        gap = gap.double()
        return (gap.exp() - 1 - gap).mean().item()

    kls = []
    for _ in range(STEPS):
        gap = log_ratio()
        kls.append(kl(gap.detach()))
        ratio = gap.exp()
        loss = (-advantages * ratio + BETA * (ratio - 1 - gap)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
    with torch.no_grad():
        kls.append(kl(log_ratio()))
    print(json.dumps(dict(
        prompts=[p for p, _ in rollout], answers=[a for _, a in rollout], advantages=advantages.tolist(), kls=kls)))

"""Four PPO updates of actor and critic by PEFT and torch, in f32: numbers for tests/training/ppo_update.rs.

Over the quickstart's base with the adapters of peft_logits: the actor starts as lm, the reference is the bare base, the
critic starts as rm with a bias of its own. One rollout of given answers and scores, four passes over it, one step each:
KL in the reward, GAE, whitened advantages, clipped losses, clipped gradients, torch's AdamW under transformers' linear
schedule. Prints ppo_update.json: what was read, each step's losses and gradient norms before clipping, what comes out.
torch 2.15.0, transformers 5.23.0, peft 0.21.2, seed 53.   Run: python tests/golden/ppo_update.py > tests/golden/ppo_update.json
"""

import json
import pathlib

import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[1] / "src/quickstart/assets/base"
STEPS, ACTOR_LR, CRITIC_LR, DECAY, MAX_NORM = 4, 5e-4, 1e-3, 0.01, 0.5
KL_COEF, SCORE_CLIP, GAMMA, LAM, CLIP, CLIP_VALUE, ENTROPY = 0.1, 2.0, 0.99, 0.9, 0.1, 0.1, 0.01
END = 0


def base(kind):
    more = dict(num_labels=1) if kind is transformers.AutoModelForSequenceClassification else {}
    return kind.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager", **more)


def adapted(kind, name):
    return peft.PeftModel.from_pretrained(base(kind), HERE / "peft_logits" / name, is_trainable=True)


def rows(model, prompt, answer):
    """(log-probability, entropy) of each answer token."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
    every = torch.log_softmax(logits, -1)
    return every.gather(1, torch.tensor(answer)[:, None])[:, 0], -(every.exp() * every).sum(-1)


def values(model, bias, prompt, answer):
    inner = model.base_model.model
    hidden = inner.model(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1:-1]
    return inner.score(hidden)[:, 0] + bias


def gae(rewards, old_values):
    advantages, following, last = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(old_values.tolist())):
        last = reward + GAMMA * following - value + GAMMA * LAM * last
        following = value
        advantages.append(last)
    return torch.tensor(advantages[::-1])


if __name__ == "__main__":
    torch.manual_seed(53)
    draw = lambda n: torch.randint(2, 1024, (n,)).tolist()
    rollout = [(draw(p), draw(a) + [END]) for p, a in [(3, 11), (17, 1), (8, 25), (2, 6)]]
    scores = [1.5, -0.75, 3.0, 0.25]
    actor, critic = adapted(transformers.AutoModelForCausalLM, "lm"), adapted(
        transformers.AutoModelForSequenceClassification, "rm")
    for model in (actor, critic):
        model.eval()  # dropout is 0 anyway
    bias = torch.nn.Parameter(torch.zeros(()))
    with torch.no_grad():
        reference = base(transformers.AutoModelForCausalLM)
        old = [rows(actor, *x)[0] for x in rollout]
        theirs = [rows(reference, *x)[0] for x in rollout]
        old_values = [values(critic, bias, *x) for x in rollout]
    advantages, returns = [], []
    for o, r, v, score in zip(old, theirs, old_values, scores):
        rewards = -KL_COEF * (o - r)
        rewards[-1] += max(-SCORE_CLIP, min(SCORE_CLIP, score))
        advantages.append(gae(rewards, v))
        returns.append(advantages[-1] + v)
    advantages, returns, old, old_values = map(torch.cat, (advantages, returns, old, old_values))
    advantages = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()

    trained = [[p for p in model.parameters() if p.requires_grad] for model in (actor, critic)]
    trained[1].append(bias)
    optimizers = [
        torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
        for p, lr in zip(trained, (ACTOR_LR, CRITIC_LR))
    ]
    schedules = [transformers.get_linear_schedule_with_warmup(o, 0, STEPS) for o in optimizers]
    course = []
    for _ in range(STEPS):
        logprobs, entropy = (torch.cat(x) for x in zip(*(rows(actor, *x) for x in rollout)))
        ratio = (logprobs - old).exp()
        policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        new = torch.cat([values(critic, bias, *x) for x in rollout])
        held = torch.max(torch.min(new, old_values + CLIP_VALUE), old_values - CLIP_VALUE)
        value = 0.5 * torch.max((new - returns) ** 2, (held - returns) ** 2).mean()
        step = dict(clipfrac=((ratio - 1).abs() > CLIP).float().mean().item())
        for name, loss, parameters, optimizer, schedule in zip(
            ("policy", "value"), (policy - ENTROPY * entropy.mean(), value), trained, optimizers, schedules
        ):
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            schedule.step()
            step[f"{name}_loss"], step[f"{name}_norm"] = loss.item(), norm.item()
        course.append(step)
    with torch.no_grad():
        out = dict(
            prompts=[p for p, _ in rollout], answers=[a for _, a in rollout], scores=scores,
            advantages=advantages.tolist(), returns=returns.tolist(), course=course,
            logprobs_after=torch.cat([rows(actor, *x)[0] for x in rollout]).tolist(),
            values_after=torch.cat([values(critic, bias, *x) for x in rollout]).tolist(),
        )
    print(json.dumps(out))

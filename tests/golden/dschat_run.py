"""A rollout, its updates and a batch of comparisons as DeepSpeed-Chat computes them on padded rows, in float64.

usage: dschat_run.py > dschat_run.json
Written from a description of microsoft/DeepSpeedExamples, applications/DeepSpeed-Chat, commit 83757d9: rows [left-padded
prompt | answer, padded], masks `row != pad`, for actor (peft_logits/lm), reference (the bare base), critic and reward model
(peft_logits/rm; as the reward model with a head SHARPER times as large, so that scores are clipped) over the quickstart's base; its Llama is written out below, since transformers' own rounds norms and
softmax to float32. Recorded token ids, everything else is computed: log-probabilities, values, scores, rewards,
advantages, returns, then two updates of actor, critic and ptx (each an AdamW step of its own) with the EMA after each.
`rollouts`: pad == end token, a prompt with the pad in front; a pad of its own; answers that end, fill the window, have one
token, have none; a rollout whose longest answer ended. `rewards`: pairs of unequal, full and equal rows. `sft`: a batch.
torch 2.15.0, safetensors 0.8.0, seed 87.
"""
import json
import math
import pathlib

import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid, silu

HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[1] / "src/quickstart/assets/base"
CONFIG = json.loads((BASE / "config.json").read_text())
WEIGHTS = {name: w.double() for name, w in load_file(BASE / "model.safetensors").items()}
END = 0
KL, CLIP_REWARD, CLIP, CLIP_VALUE, GAMMA, LAM = 0.1, 5.0, 0.2, 0.2, 1.0, 0.95
SHARPER = 12.0
ACTOR_LR, CRITIC_LR, MAX_NORM, COEF, DECAY, EPOCHS = 1e-3, 2e-3, 1.0, 27.8, 0.992, 2


class Adapter(dict):
    """LoRA factors and the score head by name, trainable."""

    def __init__(self, name):
        folder = HERE / "peft_logits" / name
        config = json.loads((folder / "adapter_config.json").read_text())
        self.scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        for key, value in load_file(folder / "adapter_model.safetensors").items():
            self[key.removeprefix("base_model.model.")] = value.double().requires_grad_()


def linear(x, name, adapter):
    y = x @ WEIGHTS[f"{name}.weight"].T
    if adapter is not None and f"{name}.lora_A.weight" in adapter:
        y = y + adapter.scale * (x @ adapter[f"{name}.lora_A.weight"].T @ adapter[f"{name}.lora_B.weight"].T)
    return y


def norm(x, name):
    return x / (x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt() * WEIGHTS[f"{name}.weight"]


def hidden(rows, mask, adapter):
    """(B, T, D) of token ids (B, T), of which only those of `mask` are attended to."""
    rows, mask = torch.tensor(rows), torch.tensor(mask, dtype=torch.bool)
    (b, t), dim = rows.shape, CONFIG["head_dim"]
    heads, kv = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    angles = torch.arange(t).double()[:, None] / CONFIG["rope_theta"] ** (torch.arange(0, dim, 2).double() / dim)
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
    turn = lambda x: x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin
    seen = torch.tril(torch.ones(t, t, dtype=torch.bool)) & mask[:, None, :]
    seen = seen | (torch.eye(t, dtype=torch.bool) & ~seen.any(-1, keepdim=True))  # a row that sees nothing is never used
    x = WEIGHTS["model.embed_tokens.weight"][rows]
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            linear(h, f"{at}.self_attn.{name}_proj", adapter).view(b, t, n, dim).transpose(1, 2)
            for name, n in (("q", heads), ("k", kv), ("v", kv))
        )
        k, v = (z.repeat_interleave(heads // kv, 1) for z in (turn(k), v))
        scores = turn(q) @ k.transpose(-1, -2) / math.sqrt(dim)
        p = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        x = x + linear((p @ v).transpose(1, 2).reshape(b, t, -1), f"{at}.self_attn.o_proj", adapter)
        h = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (linear(h, f"{at}.mlp.{name}_proj", adapter) for name in ("gate", "up"))
        x = x + linear(silu(gate) * up, f"{at}.mlp.down_proj", adapter)
    return norm(x, "model.norm")


def logprobs(rows, mask, adapter):
    """(B, T - 1) of the rows' tokens but the first."""
    logits = hidden(rows, mask, adapter)[:, :-1] @ WEIGHTS["model.embed_tokens.weight"].T
    return logits.log_softmax(-1).gather(-1, torch.tensor(rows)[:, 1:, None])[..., 0]


def values(rows, mask, adapter):
    return hidden(rows, mask, adapter) @ adapter["score.weight"][0]


class Optimizer:
    """AdamW with DeepSpeed-Chat's betas behind a clipped gradient."""

    def __init__(self, adapter, lr):
        self.parameters = list(adapter.values())
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def step(self, loss):
        self.adamw.zero_grad()
        loss.backward()
        found = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM).item()
        self.adamw.step()
        return found


def draw(n):
    return torch.randint(2, CONFIG["vocab_size"], (n,)).tolist()


def rollout(pad, prompts, answers):
    length, window = max(map(len, prompts)), max(map(len, answers))
    rows = [[pad] * (length - len(p)) + p + a + [pad] * (window - len(a)) for p, a in zip(prompts, answers)]
    kept = [i for i, row in enumerate(rows) if sum(token != pad for token in row[length:]) > 1]
    seq = [rows[i] for i in kept]
    mask = [[token != pad for token in row] for row in seq]
    actor, critic, reward = Adapter("lm"), Adapter("rm"), Adapter("rm")
    actions = torch.tensor(mask, dtype=torch.float64)[:, 1:]
    start, steps = length - 1, len(seq[0]) - 1
    with torch.no_grad():
        old, reference = logprobs(seq, mask, actor), logprobs(seq, mask, None)
        old_values = values(seq, mask, critic)[:, :-1]
        ends_at = [length + sum(token != pad for token in row[length:]) - 1 for row in seq]
        scores = SHARPER * values(seq, mask, reward)[range(len(seq)), ends_at]
        rewards = -KL * (old - reference)
        ends = [start + int(actions[j, start:].sum()) + 1 for j in range(len(seq))]
        for j, end in enumerate(ends):
            rewards[j, start:end][-1] += scores[j].clamp(-CLIP_REWARD, CLIP_REWARD)
            rewards[j, end:] = 0
            old_values[j, end:] = 0
        last, backwards = torch.zeros(len(seq), dtype=torch.float64), []
        for t in reversed(range(start, steps)):
            following = old_values[:, t + 1] if t < steps - 1 else 0.0
            last = rewards[:, t] + GAMMA * following - old_values[:, t] + GAMMA * LAM * last
            backwards.append(last)
        advantages = torch.stack(backwards[::-1], 1)
        returns = advantages + old_values[:, start:]
    used = actions[:, start:]
    texts = [draw(7) for _ in kept]
    everything = [[True] * 7 for _ in kept]
    of_actor, of_critic = Optimizer(actor, ACTOR_LR), Optimizer(critic, CRITIC_LR)
    ema = Adapter("lm")
    course = []
    for _ in range(EPOCHS):
        ratio = ((logprobs(seq, mask, actor) - old)[:, start:] * used).exp()
        actor_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
        actor_loss = (actor_loss * used).sum() / used.sum()
        new, before = values(seq, mask, critic)[:, start:-1], old_values[:, start:]
        held = torch.clamp(new, before - CLIP_VALUE, before + CLIP_VALUE)
        critic_loss = 0.5 * (torch.max((new - returns) ** 2, (held - returns) ** 2) * used).sum() / used.sum()
        step = dict(actor_norm=of_actor.step(actor_loss), critic_norm=of_critic.step(critic_loss))
        ptx_loss = -logprobs(texts, everything, actor).mean()
        of_actor.step(COEF * ptx_loss)
        with torch.no_grad():
            for name, average in ema.items():
                average.copy_(torch.lerp(actor[name], average, DECAY))
        course.append(dict(
            **step, actor_loss=actor_loss.item(), critic_loss=critic_loss.item(), ptx_loss=COEF * ptx_loss.item(),
            clipped=((held - returns) ** 2 > (new - returns) ** 2).double().mean().item(),
        ))

    def answers_of(table):
        """The trained actions of each kept answer, end to end."""
        return [x for row, n in zip(table, used.sum(1).int().tolist()) for x in row[:n].tolist()]

    with torch.no_grad():
        after = [answers_of(f[:, start:]) for f in (logprobs(seq, mask, actor), logprobs(seq, mask, ema))]
        values_after = answers_of(values(seq, mask, critic)[:, start:-1])
    width = [end - start for end in ends]  # rewarded actions, the window's end apart
    cut = lambda table: [row[:n].tolist() for row, n in zip(table, width)]
    return dict(
        pad=pad, prompts=prompts, answers=answers, texts=texts, kept=kept, logprobs=cut(old[:, start:]),
        reference=cut(reference[:, start:]), values=cut(old_values[:, start:]), scores=scores.tolist(),
        rewards=cut(rewards[:, start:]), advantages=answers_of(advantages), returns=answers_of(returns), course=course,
        logprobs_after=after[0], ema_after=after[1], values_after=values_after,
    )


def comparisons(pad, leading, length, pairs):
    reward = Adapter("rm")
    rows = [[row + [pad] * (length - len(row)) for row in pair] for pair in zip(*pairs)]
    masks = [[[t < len(row) for t in range(length)] for row in pair] for pair in zip(*pairs)]
    chosen, rejected = (values(r, m, reward) for r, m in zip(rows, masks))
    end = lambda row: ([t for t, token in enumerate(row) if token == pad] + [length] * (leading + 1))[leading]
    losses, right = [], 0
    for c_row, r_row, c, r in zip(*rows, chosen, rejected):
        c_end, r_end = end(c_row), end(r_row)
        different = [t for t in range(length) if c_row[t] != r_row[t]]
        start, stop = (different[0], max(c_end, r_end)) if different else (length - 1, length)
        losses.append(-logsigmoid(c[start:stop] - r[start:stop]).mean())
        right += int(c[c_end - 1] > r[r_end - 1])
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.stack([p.grad.pow(2).sum() for p in reward.values()]).sum().sqrt()
    return dict(
        pad=pad, leading=leading, length=length, pairs=pairs, loss=loss.item(), grad_norm=norm.item(),
        accuracy=right / len(pairs),
    )


def sft(rows):
    length, pad = max(map(len, rows)), 1
    mask = [[t < len(row) for t in range(length)] for row in rows]
    found = logprobs([row + [pad] * (length - len(row)) for row in rows], mask, Adapter("lm"))
    targets = torch.tensor(mask, dtype=torch.float64)[:, 1:]
    return dict(rows=rows, loss=(-(found * targets).sum() / targets.sum()).item())


torch.manual_seed(87)
prompts = [draw(4), [END] + draw(5), draw(2), draw(3), draw(6)]
answers = [draw(4) + [END], draw(6), draw(1) + [END], [END], draw(5) + [END]]
ended = [draw(3) + [END], draw(1) + [END], draw(2) + [END]]
shared = [END] + draw(4)
plain = draw(3)
out = dict(
    sharper=SHARPER, kl_coef=KL, actor_lr=ACTOR_LR, critic_lr=CRITIC_LR, ptx_coef=COEF, ema_decay=DECAY,
    rollouts=[
        rollout(END, prompts, answers), rollout(1, prompts, answers), rollout(1, prompts[:3], ended),
        rollout(END, prompts[:3], ended),
    ],
    rewards=[
        comparisons(END, 1, 14, [
            (shared + draw(5) + [END], shared + draw(2) + [END]), (shared + draw(1) + [END], shared + draw(9)),
            (shared + plain + [END], shared + plain + [END]),
        ]),
        comparisons(1, 0, 12, [
            (plain + draw(4) + [END], plain + draw(1) + [END]), (plain + [END], plain + draw(9)),
            (plain + draw(2) + [END], plain + draw(2) + [END]), (plain + [END], plain + [END]),
        ]),
        # One pad too many is looked for, as where the number is left at its default for a tokenizer without pads in front.
        comparisons(1, 1, 12, [(plain + draw(4) + [END], plain + draw(1) + [END])]),
    ],
    sft=sft([draw(9) + [END], draw(4) + [END], draw(6)]),
)
print("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in out.items()) + "\n}")

"""Prints dschat.json: DeepSpeed-Chat's PPO and reward-model arithmetic on padded rows, in float64, from its formulas.

Written from a description of microsoft/DeepSpeedExamples, applications/DeepSpeed-Chat, commit 83757d9: index for index on
rows padded to one length, as it computes, where the Rust code has ragged answers. Gradients by torch autograd.
`ppo`: rows [prompt of L | answer window]; pad == eos as with OPT, and a [PAD] of its own; answers that end, that fill the
window, of one token, of none. `reward`: a batch of pairs, identical ones too. `ptx`, `ema`: one number each.
torch 2.15.0, seed 77.   Run: python tests/golden/dschat.py > tests/golden/dschat.json
"""

import json

import torch

KL_CTL, CLIP_REWARD, CLIP, CLIP_VALUE, GAMMA, LAM = 0.1, 5.0, 0.2, 0.2, 1.0, 0.95
EOS = 2


def draw(*shape, scale=1.0, shift=0.0):
    """f32 numbers, widened."""
    return (torch.randn(*shape) * scale + shift).float().double()


def ppo(pad, answers, window, prompt=3):
    """answers: token lists that end with EOS where the model ended them."""
    rows = torch.tensor([[9] * prompt + a + [pad] * (window - len(a)) for a in answers])
    kept = [i for i, row in enumerate(rows) if (row[prompt:] != pad).sum() > 1]  # the others are dropped
    seq = rows[kept]
    mask = (seq != pad).double()
    steps, start = seq.shape[1] - 1, prompt - 1
    action_mask = mask[:, 1:]
    logprobs = draw(len(kept), steps, scale=1.0, shift=-2.0)
    reference = (logprobs + draw(len(kept), steps, scale=0.5)).float().double()
    values = draw(len(kept), steps)
    scores = draw(len(kept), scale=4.0)

    rewards = -KL_CTL * (logprobs - reference)
    ends = [start + int(action_mask[j, start:].sum()) + 1 for j in range(len(kept))]
    for j, end in enumerate(ends):
        rewards[j, start:end][-1] += scores[j].clamp(-CLIP_REWARD, CLIP_REWARD)
        rewards[j, end:] = 0
    old_values = values.clone()
    for j, end in enumerate(ends):
        old_values[j, end:] = 0
    last, reversed_ = torch.zeros(len(kept), dtype=torch.float64), []
    for t in reversed(range(start, steps)):
        following = old_values[:, t + 1] if t < steps - 1 else 0.0
        last = rewards[:, t] + GAMMA * following - old_values[:, t] + GAMMA * LAM * last
        reversed_.append(last)
    advantages = torch.stack(reversed_[::-1], dim=1)
    returns = advantages + old_values[:, start:]

    # The Rust side holds advantages and returns as f32.
    advantages32, returns32 = advantages.float().double(), returns.float().double()
    used = action_mask[:, start:]
    now = (logprobs[:, start:] + draw(len(kept), steps - start, scale=0.3)).float().double().requires_grad_()
    ratio = ((now - logprobs[:, start:]) * used).exp()
    worst = torch.max(-advantages32 * ratio, -advantages32 * ratio.clamp(1 - CLIP, 1 + CLIP))
    actor_loss = (worst * used).sum() / used.sum()
    actor_loss.backward()
    new = (values[:, start:] + draw(len(kept), steps - start, scale=0.3)).float().double().requires_grad_()
    old = old_values[:, start:]
    clipped = torch.clamp(new, old - CLIP_VALUE, old + CLIP_VALUE)
    critic_loss = 0.5 * (torch.max((new - returns32) ** 2, (clipped - returns32) ** 2) * used).sum() / used.sum()
    critic_loss.backward()
    return {
        "pad": pad, "window": window, "prompt": prompt, "answers": answers, "kept": kept, "rows": rows.tolist(),
        "scored_at": [prompt + int((row[prompt:] != pad).sum()) - 1 for row in seq],
        "logprobs": logprobs[:, start:].tolist(), "reference": reference[:, start:].tolist(),
        "values": values[:, start:].tolist(), "scores": scores.tolist(),
        "rewards": rewards[:, start:].tolist(), "advantages": advantages.tolist(), "returns": returns.tolist(),
        "new_logprobs": now.tolist(), "new_values": new.tolist(), "actor_loss": actor_loss.item(),
        "critic_loss": critic_loss.item(), "actor_grad": now.grad.tolist(), "critic_grad": new.grad.tolist(),
    }


def reward(pad, leading, pairs):
    """One batch: mean of the pairs' losses, accuracy and mean end scores."""
    total, right, out = 0.0, 0, []
    for chosen, rejected in pairs:
        n = len(chosen)
        c, r = draw(n), draw(n)
        if chosen == rejected:
            r = c.clone()  # one text, one model: one list of scores
        end = lambda row: ([t for t, token in enumerate(row) if token == pad] + [n] * (leading + 1))[leading]
        c_end, r_end = end(chosen), end(rejected)
        different = [t for t in range(n) if chosen[t] != rejected[t]]
        if different:
            start, stop = different[0], max(c_end, r_end)
        else:
            start, stop, r_end = n - 1, n, c_end
        loss = -torch.nn.functional.logsigmoid(c[start:stop] - r[start:stop]).mean()
        total += loss.item() / len(pairs)
        right += int(c[c_end - 1] > r[r_end - 1])
        out.append({
            "chosen": chosen, "rejected": rejected, "chosen_scores": c.tolist(), "rejected_scores": r.tolist(),
            "chosen_end": c[c_end - 1].item(), "rejected_end": r[r_end - 1].item(),
        })
    return {"pad": pad, "leading": leading, "pairs": out, "loss": total, "accuracy": right / len(pairs)}


if __name__ == "__main__":
    torch.manual_seed(77)
    answers = [
        [5, 6, 7, EOS],  # ends
        [5, 6, 7, 8, 5, 6],  # fills the window
        [5, EOS],  # one token
        [EOS],  # nothing
        [5, 6, 7, 8, 5, EOS],  # ends on the window's last place
        [6, 7, EOS],
    ]
    labels, logits = torch.tensor([3, 1, 4, 1, 5]), draw(5, 7)
    coefficient = 27.8
    ptx = logits.log_softmax(-1)[torch.arange(5), labels]
    average, parameter = draw(6), draw(6)
    print(json.dumps({
        "ppo": [ppo(EOS, answers, 6), ppo(1, answers, 6)],
        "reward": [
            reward(EOS, 1, [
                ([2, 5, 6, 7, 2, 2], [2, 5, 9, 2, 2, 2]), ([2, 5, 6, 2, 2, 2], [2, 5, 9, 9, 9, 9]),
                ([2, 5, 6, 7, 2, 2], [2, 5, 6, 7, 2, 2]),
            ]),
            reward(1, 0, [([5, 6, 7, 2, 1, 1], [5, 6, 8, 9, 9, 2]), ([5, 2, 1, 1, 1, 1], [5, 2, 1, 1, 1, 1])]),
        ],
        "ptx": {"logprobs": ptx.tolist(), "coefficient": coefficient, "loss": (-coefficient * ptx.mean()).item()},
        "ema": {
            "beta": 0.992, "average": average.tolist(), "parameter": parameter.tolist(),
            "next": torch.lerp(parameter, average, 0.992).tolist(),
        },
    }))

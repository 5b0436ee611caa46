"""What masks and several rewards change in the group methods, by TRL's own code in float64: numbers for src/ppo/loss/tests.rs
and src/ppo/experience.rs.

Prints group_loss.json. `cases`: `GRPOTrainer._compute_loss` as in grpo_loss.py, on its recorded tensors, with recorded
entropies and `top_entropy_quantile`, and with responses that `mask_truncated_completions` masks (their rows of the completion
mask are 0, as in `_generate_and_score_completions`). `rloo`: `RLOOTrainer._compute_loss`, whose ratio is the response's.
`corrected`: the same
with weights for another sampler (`importance_sampling_ratio`). `correction` and `advantages`: the lines of `_generate_and_score_completions` between two of its comments, run as they stand in the installed
files, for two rewards of six responses.
trl 1.16.0, torch 2.15.0.   Run: python tests/golden/group_loss.py > tests/golden/group_loss.json
"""

import collections
import inspect
import json
import math
import textwrap
import types

import torch
from grpo_loss import LENGTHS, MOST, trainer
from trl.trainer.grpo_trainer import GRPOTrainer, nanstd
from trl.trainer.rloo_trainer import RLOOTrainer

CASES = [
    dict(loss_type="dapo", top_entropy_quantile=0.2),
    dict(loss_type="grpo", top_entropy_quantile=0.5, beta=0.1),
    dict(loss_type="dr_grpo", top_entropy_quantile=0.35),
    dict(loss_type="grpo", top_entropy_quantile=0.5, importance_sampling_level="sequence", epsilon=0.05),
    dict(loss_type="dapo", truncated=[1, 4]),
    dict(loss_type="grpo", truncated=[0], beta=0.1),
    dict(loss_type="dr_grpo", truncated=[2, 5]),
    dict(loss_type="sapo", truncated=[3]),
    dict(loss_type="dapo", truncated=[2], top_entropy_quantile=0.4, beta=0.1),
]


def between(function, first, last):
    """The lines of a method from the one that begins with `first` to the one before `last`."""
    lines = inspect.getsource(function).splitlines()
    at = [line.strip() for line in lines]
    start = next(i for i, line in enumerate(at) if line.startswith(first))
    end = next(i for i, line in enumerate(at) if i > start and line.startswith(last))
    return textwrap.dedent("\n".join(lines[start:end]))


def grpo_advantages(rewards, weights, group, aggregation, scale):
    me = types.SimpleNamespace(
        multi_objective_aggregation=aggregation, scale_rewards=scale, reward_weights=weights, reward_funcs=[None] * len(weights))
    scope = dict(self=me, rewards_per_func=rewards, num_generations=group, device="cpu", torch=torch, nanstd=nanstd)
    exec(between(GRPOTrainer._generate_and_score_completions, "unscorable_mask =", "# Unscorable completions"), scope)
    return scope["advantages"].tolist(), scope["is_std_zero"].float().mean().item()


def rloo_advantages(rewards, group, normalize):
    me = types.SimpleNamespace(num_generations=group, normalize_advantages=normalize)
    scope = dict(self=me, rewards=rewards, num_generations=group, torch=torch, nanstd=nanstd, unscorable_mask=torch.zeros(len(rewards)) > 0)
    exec(between(RLOOTrainer._generate_and_score_completions, "grouped_rewards =", "# Slice to keep"), scope)
    return scope["advantages"].tolist()


def correction(old, sampler, mask, mode, low, high):
    """TRL's weights (B, T) or (B, 1), by its own lines."""
    me = types.SimpleNamespace(
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high)
    scope = dict(self=me, per_token_logps_diff=(old - sampler) * mask, torch=torch, math=math)
    exec(between(GRPOTrainer._generate_and_score_completions, "sequence_level_is =", "# Compute the per-token log prob"), scope)
    return scope["vllm_importance_sampling_ratio"]


def of_trainer(case, logprobs, entropies):
    me = trainer({key: case[key] for key in case if key not in ["top_entropy_quantile", "truncated"]}, logprobs)
    me.top_entropy_quantile = case.get("top_entropy_quantile", 1.0)
    me.accelerator.pad_across_processes = lambda x, dim, pad_index: x
    me.get_high_entropy_mask = types.MethodType(GRPOTrainer.get_high_entropy_mask, me)
    me._get_per_token_logps_and_entropies = lambda *a, **k: (logprobs, entropies, None)
    return me


if __name__ == "__main__":
    recorded = json.load(open(__file__.replace("group_loss.py", "grpo_loss.json")))
    torch.manual_seed(11)
    torch.set_default_dtype(torch.float64)
    rows = len(LENGTHS)
    whole = (torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]).long()

    def padded(name):
        out = torch.zeros(rows, max(LENGTHS))
        out[whole.bool()] = torch.tensor(recorded[name])
        return out

    now, old, reference = padded("logprobs"), padded("old"), padded("reference")
    weights = torch.tensor(recorded["weights"])
    entropies = (2 * torch.rand(rows, max(LENGTHS))).float().double()
    cases = []
    for case in CASES:
        logprobs = now.clone().requires_grad_()
        mask = whole.clone()
        mask[case.get("truncated", [])] = 0
        inputs = dict(
            prompt_ids=torch.zeros(rows, 1), prompt_mask=torch.ones(rows, 1), completion_ids=torch.zeros_like(mask),
            completion_mask=mask, advantages=weights, old_per_token_logps=old, ref_per_token_logps=reference,
            num_items_in_batch=mask.sum())
        loss = GRPOTrainer._compute_loss(of_trainer(case, logprobs, entropies), None, inputs)
        loss.backward()
        cases.append(dict(case, loss=loss.item(), grad=logprobs.grad[whole.bool()].tolist()))
    rloo = []
    for epsilon, high in [(0.2, 0.2), (0.05, 0.3), (0.6, 0.9)]:
        logprobs = now.clone().requires_grad_()
        me = types.SimpleNamespace(
            accelerator=types.SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x), aux_loss_enabled=False,
            epsilon_low=epsilon, epsilon_high=high, model=types.SimpleNamespace(training=True),
            _metrics=dict(train=collections.defaultdict(list)),
            _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, entropies, None))
        inputs = dict(
            prompt_ids=torch.zeros(rows, 1), prompt_mask=torch.ones(rows, 1), completion_ids=torch.zeros_like(whole),
            completion_mask=whole, advantages=weights, old_logps=(old * whole).sum(1))
        loss = RLOOTrainer._compute_loss(me, None, inputs)
        loss.backward()
        rloo.append(dict(epsilon=epsilon, epsilon_high=high, loss=loss.item(), grad=logprobs.grad[whole.bool()].tolist()))
    # A sampler whose log-probabilities are not the trainer's, with bounds that some of the ratios exceed.
    sampler = (old + 0.3 * torch.randn(rows, max(LENGTHS))).float().double()
    clip = (0.8, 1.25)
    ratios = {mode: correction(old, sampler, whole, mode, *clip)
              for mode in ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]}
    corrected = []
    for case in [dict(loss_type="dapo", mode="token_truncate"), dict(loss_type="grpo", mode="sequence_mask", beta=0.1),
                 dict(loss_type="dr_grpo", mode="token_mask"), dict(loss_type="grpo", mode="sequence_truncate",
                                                                    importance_sampling_level="sequence", epsilon=0.05)]:
        logprobs = now.clone().requires_grad_()
        me = of_trainer({key: case[key] for key in case if key != "mode"}, logprobs, entropies)
        me.use_vllm, me.vllm_importance_sampling_correction = True, True
        inputs = dict(
            prompt_ids=torch.zeros(rows, 1), prompt_mask=torch.ones(rows, 1), completion_ids=torch.zeros_like(whole),
            completion_mask=whole, advantages=weights, old_per_token_logps=old, ref_per_token_logps=reference,
            num_items_in_batch=whole.sum(), importance_sampling_ratio=ratios[case["mode"]].float().double())
        loss = GRPOTrainer._compute_loss(me, None, inputs)
        loss.backward()
        corrected.append(dict(case, loss=loss.item(), grad=logprobs.grad[whole.bool()].tolist()))
    # Two rewards; the second has no variance in the first group.
    both = torch.tensor([[1.0, 0.5], [-0.5, 0.5], [2.0, 0.5], [0.25, 0.0], [0.25, 1.0], [-1.5, 0.25]])
    by = torch.tensor([1.0, 4.0])
    settings = [("sum_then_normalize", "group"), ("sum_then_normalize", "batch"), ("sum_then_normalize", "none"),
                ("normalize_then_sum", "group")]
    advantages = [
        dict(aggregation=aggregation, scale_rewards=scale, advantages=grpo_advantages(both, by, 3, aggregation, scale)[0])
        for aggregation, scale in settings]
    flat = torch.tensor([[1.0], [1.0], [1.0], [0.0], [1.0], [0.0]])
    share = grpo_advantages(flat, torch.ones(1), 3, "sum_then_normalize", "group")[1]
    print(json.dumps(dict(
        entropies=entropies[whole.bool()].tolist(), sampler=sampler[whole.bool()].tolist(), clip=clip, corrected=corrected,
        correction={mode: ratio.expand(whole.shape)[whole.bool()].tolist() for mode, ratio in ratios.items()}, cases=cases, rloo=rloo, group=3, rewards=both.tolist(), weights=by.tolist(),
        advantages=advantages, flat=flat.flatten().tolist(), frac_reward_zero_std=share,
        rloo_advantages=dict(plain=rloo_advantages(both[:, 0], 3, False), normalized=rloo_advantages(both[:, 0], 3, True)))))

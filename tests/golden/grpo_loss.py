"""The group methods' losses and advantages, by TRL's own code in float64: numbers for src/ppo/group_golden.rs.

Prints grpo_loss.json: recorded log-probabilities, advantages and lengths of six responses, and for each case of loss_type,
importance_sampling_level, delta, beta and use_bias_correction_kl the loss of `GRPOTrainer._compute_loss` and its gradient with
respect to the log-probabilities. The trainer is a stand-in that has the attributes which that method reads; its policy returns
the recorded log-probabilities. With `steps_per_generation` 1 TRL's normaliser of dapo is the number of tokens. Advantages:
TRL computes them inside its sampling loop (lines "sum_then_normalize"), so that formula is written out here.
trl 1.16.0, torch 2.15.0.   Run: python tests/golden/grpo_loss.py > tests/golden/grpo_loss.json
"""

import collections
import json
import types

import torch
from trl.trainer.grpo_trainer import GRPOTrainer

LENGTHS, MOST = [5, 2, 7, 3, 1, 6], 8
CASES = [
    dict(loss_type="dapo"),
    dict(loss_type="bnpo"),
    dict(loss_type="grpo"),
    dict(loss_type="dr_grpo"),
    dict(loss_type="dapo", delta=1.3),
    dict(loss_type="dapo", epsilon_high=0.28),
    dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.04),
    dict(loss_type="dapo", importance_sampling_level="sequence", epsilon=0.05, epsilon_high=0.04, beta=0.1),
    dict(loss_type="dapo", beta=0.1),
    dict(loss_type="grpo", beta=0.1, use_bias_correction_kl=True),
    dict(loss_type="grpo", beta=0.1, use_bias_correction_kl=True, importance_sampling_level="sequence", epsilon=0.05),
    dict(loss_type="cispo", epsilon_high=1.1),
    dict(loss_type="sapo"),
    dict(loss_type="sapo", importance_sampling_level="sequence"),
]


def trainer(case, logprobs):
    """What `_compute_loss` reads of its trainer."""
    case = dict(dict(importance_sampling_level="token", epsilon=0.2, delta=None, beta=0.0, use_bias_correction_kl=False), **case)
    args = types.SimpleNamespace(
        delta=case["delta"], use_bias_correction_kl=case["use_bias_correction_kl"], sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05, steps_per_generation=1)
    accelerator = types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    entropies = torch.ones_like(logprobs)
    return types.SimpleNamespace(
        args=args, accelerator=accelerator, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=case["importance_sampling_level"], beta=case["beta"], loss_type=case["loss_type"],
        epsilon_low=case["epsilon"], epsilon_high=case.get("epsilon_high", case["epsilon"]), use_vllm=False,
        vllm_importance_sampling_correction=False, max_completion_length=MOST, current_gradient_accumulation_steps=1,
        model=types.SimpleNamespace(training=True), _entropy_bonus_enabled=False,
        _metrics=dict(train=collections.defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, entropies, None))


if __name__ == "__main__":
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)  # TRL's temperatures, too
    rows = len(LENGTHS)
    mask = (torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]).long()
    draw = lambda scale: (scale * torch.randn(rows, max(LENGTHS))).float().double()
    old = (-draw(1.0).abs() - 0.1).float().double()
    now, reference = (old + draw(0.25)).float().double(), (old + draw(0.3)).float().double()
    rewards = torch.tensor([1.0, -0.5, 2.0, 0.25, 0.25, -1.5], dtype=torch.float64)
    groups = rewards.view(-1, 3)
    centred = (groups - groups.mean(1, keepdim=True)).view(-1)
    advantages = dict(
        group=(centred.view(-1, 3) / (groups.std(1, keepdim=True) + 1e-4)).view(-1).tolist(),
        batch=(centred / (rewards.std() + 1e-4)).tolist(), none=centred.tolist())
    weights = torch.tensor(advantages["group"]).float().double()
    cases = []
    for case in CASES:
        logprobs = now.clone().requires_grad_()
        inputs = dict(
            prompt_ids=torch.zeros(rows, 1), prompt_mask=torch.ones(rows, 1), completion_ids=torch.zeros_like(mask),
            completion_mask=mask, advantages=weights, old_per_token_logps=old, ref_per_token_logps=reference,
            num_items_in_batch=mask.sum())
        loss = GRPOTrainer._compute_loss(trainer(case, logprobs), None, inputs)
        loss.backward()
        cases.append(dict(case, loss=loss.item(), grad=logprobs.grad[mask.bool()].tolist()))
    flat = lambda x: x[mask.bool()].tolist()
    print(json.dumps(dict(
        lengths=LENGTHS, most=MOST, logprobs=flat(now), old=flat(old), reference=flat(reference),
        rewards=rewards.tolist(), group=3, advantages=advantages, weights=weights.tolist(), cases=cases)))

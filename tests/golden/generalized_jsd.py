"""The generalized Jensen-Shannon divergence of distillation by TRL's own code in float64: numbers for
src/ops/divergence/tests.rs.

Prints generalized_jsd.json: hidden states and lm_heads of a student and of a wider teacher (recorded with three decimals), and
per case `GKDTrainer.generalized_jsd_loss` of each position and the gradient of their weighted sum by the student's hidden
states.
trl 1.16.0, torch 2.15.0.   Run: python tests/golden/generalized_jsd.py > tests/golden/generalized_jsd.json
"""

import json

import torch
from trl.experimental.gkd import GKDTrainer

ROWS, VOCAB, STUDENT, TEACHER = 5, 150, 4, 6
CASES = [(0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.1, 0.9), (0.9, 0.9), (0.0, 0.7), (1.0, 1.5)]

if __name__ == "__main__":
    torch.manual_seed(22)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).mul(1000).round().div(1000)
    hidden, teacher_hidden = draw(ROWS, STUDENT), draw(ROWS, TEACHER)
    head, teacher_head = draw(VOCAB, STUDENT), draw(VOCAB, TEACHER)
    weights = draw(ROWS)
    cases = []
    for beta, temperature in CASES:
        h = hidden.clone().requires_grad_()
        values = torch.stack([
            GKDTrainer.generalized_jsd_loss(
                (h[i : i + 1] @ head.T)[None], (teacher_hidden[i : i + 1] @ teacher_head.T)[None],
                beta=beta, temperature=temperature, reduction="sum")
            for i in range(ROWS)
        ])
        (gradient,) = torch.autograd.grad((values * weights).sum(), h)
        cases.append(dict(beta=beta, temperature=temperature, values=values.tolist(), gradient=gradient.flatten().tolist()))
    names = dict(hidden=hidden, teacher_hidden=teacher_hidden, head=head, teacher_head=teacher_head, weights=weights)
    print(json.dumps({name: tensor.flatten().tolist() for name, tensor in names.items()} | dict(cases=cases)))

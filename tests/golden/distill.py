"""Three steps of distillation by PEFT, torch and TRL's own loss: numbers for tests/training/distill.rs.

Over the quickstart's base: the student starts as the adapter lm of peft_logits, the teacher is the bare base. Given prompts and
answers, all in one step; `GKDTrainer.generalized_jsd_loss` over the answers' tokens, clipped gradients, torch's AdamW at a
constant rate. Prints distill.json: what was read, and for each beta the loss and the gradient norm before every step, and the
loss after the last.
trl 1.16.0, torch 2.15.0, peft 0.21.2, seed 23.   Run: python tests/golden/distill.py > tests/golden/distill.json
"""

import json

import torch
import transformers
from trl.experimental.gkd import GKDTrainer

from ppo_update import END, adapted, base

LR, MAX_NORM, STEPS, BETAS = 5e-4, 0.5, 3, (0.0, 0.5, 1.0)

if __name__ == "__main__":
    torch.manual_seed(23)
    draw = lambda n: torch.randint(2, 1024, (n,)).tolist()
    pairs = [(draw(p), draw(a) + [END]) for p, a in [(3, 9), (14, 2), (8, 21), (2, 6)]]
    teacher = base(transformers.AutoModelForCausalLM).eval()

    def logits(model):
        rows = [model(torch.tensor([p + a])).logits[0, len(p) - 1:-1] for p, a in pairs]
        return torch.cat(rows)[None]

    with torch.no_grad():
        theirs = logits(teacher)
    courses = []
    for beta in BETAS:
        student = adapted(transformers.AutoModelForCausalLM, "lm").eval()
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

        def loss():
            labels = torch.zeros(theirs.shape[:2], dtype=torch.long)
            return GKDTrainer.generalized_jsd_loss(logits(student), theirs, labels=labels, beta=beta)

        losses, norms = [], []
        for _ in range(STEPS):
            now = loss()
            optimizer.zero_grad()
            now.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).item())
            losses.append(now.item())
            optimizer.step()
        with torch.no_grad():
            losses.append(loss().item())
        courses.append(dict(beta=beta, losses=losses, norms=norms))
    print(json.dumps(dict(
        lr=LR, max_grad_norm=MAX_NORM, prompts=[p for p, _ in pairs], answers=[a for _, a in pairs], courses=courses)))

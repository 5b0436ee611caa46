"""The course of a short DPO and KTO training over the quickstart's base, by torch and PEFT: for tests/training/dpo.rs.

usage: dpo_course.py > dpo_course.json
Training starts from peft_logits/lm and the reference stays it. Five full-batch AdamW steps in f32 of each: DPO (sigmoid,
label smoothing 0.1; and ipo) on three comparisons, one of three ranked answers; KTO on two answers, whose mismatched
pairs are each other's whatever the shuffle, and once more where max_length cuts one of them. Loss, gradient norm before clipping, rewards, KTO's KL term; then the
log-probabilities of every answer. Printed with torch 2.15.0, transformers 5.23.0, peft 0.21.2, seed 61.
"""
import itertools
import json
import pathlib

import peft
import torch
import transformers
from torch.nn.functional import logsigmoid

HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[1] / "src/quickstart/assets/base"
STEPS, LR, DECAY, MAX_NORM, BETA = 5, 2e-3, 0.01, 2.0, 0.3
END = 0


def policy():
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, HERE / "peft_logits/lm", is_trainable=True).train()


def summed(model, prompt, answer):
    ids = torch.tensor([prompt + answer])
    rows = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
    return rows.gather(1, torch.tensor(answer)[:, None]).sum()


def train(loss_of):
    model = policy()
    for module in model.modules():  # the saved config has dropout 0; be sure
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    course = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, figures = loss_of(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        course.append(dict(loss=loss.item(), grad_norm=norm.item(), **figures))
        optimizer.step()
        schedule.step()
    return course, model.eval()


torch.manual_seed(61)
draw = lambda n: torch.randint(2, 1024, (n,)).tolist()
compared = [
    dict(prompt=draw(p), answers=[draw(a) + [END] for a in n]) for p, n in [(5, (9, 3)), (12, (1, 7)), (3, (6, 14, 2))]
]
judge = lambda sizes: [dict(prompt=draw(p), answer=draw(a) + [END], label=label) for p, a, label in sizes]
judged = judge([(7, 12, True), (4, 5, False)])
# Of at most 17 tokens each; the first prompt with the second answer has 26, of which TRL keeps the first max_length.
judged_long, MAX_LENGTH = judge([(12, 3, True), (3, 13, False)]), 17
with torch.no_grad():
    frozen = policy().eval()
    reference = [[summed(frozen, x["prompt"], a) for a in x["answers"]] for x in compared]


def mismatched(records, max_length):
    """TRL 1.16's DataCollatorForUnpairedPreference: (prompt_ids + KL_completion_ids)[:max_length]."""
    pairs = [(records[0]["prompt"], records[1]["answer"]), (records[1]["prompt"], records[0]["answer"])]
    return [(prompt, (prompt + answer)[:max_length][len(prompt) :]) for prompt, answer in pairs]


def dpo(kind, smoothing):
    def loss_of(model):
        losses, chosen, rejected, right = [], [], [], []
        for x, refs in zip(compared, reference):
            ratios = [summed(model, x["prompt"], a) - r for a, r in zip(x["answers"], refs)]
            of_pairs = []
            for i, j in itertools.combinations(range(len(ratios)), 2):
                h = ratios[i] - ratios[j]
                if kind == "sigmoid":
                    of_pairs.append(-(1 - smoothing) * logsigmoid(BETA * h) - smoothing * logsigmoid(-BETA * h))
                else:
                    per_token = ratios[i] / len(x["answers"][i]) - ratios[j] / len(x["answers"][j])
                    of_pairs.append((per_token - 1 / (2 * BETA)) ** 2)
                chosen.append(BETA * ratios[i].item())
                rejected.append(BETA * ratios[j].item())
                right.append(h.item() > 0)
            losses.append(torch.stack(of_pairs).mean())
        mean = lambda x: sum(x) / len(x)
        figures = {"rewards/chosen": mean(chosen), "rewards/rejected": mean(rejected), "rewards/accuracies": mean(right)}
        return torch.stack(losses).mean(), figures

    return loss_of


def kto(records, max_length):
    mixed = mismatched(records, max_length)
    with torch.no_grad():
        references = [summed(frozen, x["prompt"], x["answer"]) for x in records]
        mixed_references = [summed(frozen, *pair) for pair in mixed]

    def loss_of(model):
        with torch.no_grad():
            off = [summed(model, *pair) - r for pair, r in zip(mixed, mixed_references)]
            kl = torch.stack(off).mean().clamp(min=0)
        losses, rewards = [], {}
        for x, r in zip(records, references):
            ratio = summed(model, x["prompt"], x["answer"]) - r
            if x["label"]:
                losses.append(1.0 * (1 - torch.sigmoid(BETA * (ratio - kl))))
            else:
                losses.append(0.3 * (1 - torch.sigmoid(BETA * (kl - ratio))))
            rewards["rewards/chosen" if x["label"] else "rewards/rejected"] = BETA * ratio.item()
        return torch.stack(losses).mean(), dict(kl=kl.item(), **rewards)

    return loss_of


out = dict(
    lr=LR, weight_decay=DECAY, max_grad_norm=MAX_NORM, beta=BETA, compared=compared, judged=judged,
    judged_long=judged_long, max_length=MAX_LENGTH, reference=[[r.item() for r in refs] for refs in reference],
)
courses = [
    ("sigmoid", dpo("sigmoid", 0.1)), ("ipo", dpo("ipo", 0.0)), ("kto", kto(judged, 512)),
    ("kto_cut", kto(judged_long, MAX_LENGTH)),
]
for name, loss_of in courses:
    course, model = train(loss_of)
    with torch.no_grad():
        after = [[summed(model, x["prompt"], a).item() for a in x["answers"]] for x in compared]
    out[name] = dict(course=course, after=after)
print("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in out.items()) + "\n}")

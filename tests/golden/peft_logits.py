"""What PEFT and torch make of adapters over the quickstart's base, in f32: numbers for tests/exports/peft_logits.rs.

usage: peft_logits.py
Writes peft_logits/{lm,rm} (adapters that PEFT saved, B away from zero, alpha != r) and peft_logits/values.json:
log-probabilities under lm before and after merge_and_unload, scores under rm, and the course of five full-batch
AdamW steps of SFT on lm and of the pairwise loss on rm: loss, gradient norm before clipping, and what comes out.
Printed with torch 2.15.0, transformers 5.23.0, peft 0.21.2, seed 31.
"""
import json
import pathlib
import shutil

import peft
import torch
import transformers

SEED = 31
BASE = pathlib.Path(__file__).parents[2] / "src/quickstart/assets/base"
OUT = pathlib.Path(__file__).parent / "peft_logits"
STEPS, LR, DECAY, MAX_NORM = 5, 2e-3, 0.01, {"sft": 0.5, "reward": 0.2}
END = 0


def base(kind):
    more = dict(num_labels=1) if kind is transformers.AutoModelForSequenceClassification else {}
    return kind.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager", **more)


def adapted(name, model, config):
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.05)
    out = OUT / name
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    (out / "README.md").unlink()
    path = out / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["base_model_name_or_path"] = "src/quickstart/assets/base"
    fields["target_modules"].sort()  # PEFT writes a set; sorted, so that the script repeats itself
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    return model.eval()


def logprobs(model, ids):
    rows = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def train(model, loss_of, max_norm):
    """Five steps of torch's AdamW under transformers' linear schedule; one optimizer step an epoch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    course = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        course.append(dict(loss=loss.item(), grad_norm=norm.item()))
        optimizer.step()
        schedule.step()
    return course


def numbers(tensor):
    return [round(x, 7) for x in tensor.flatten().tolist()]


torch.manual_seed(SEED)
draw = lambda n: torch.randint(2, 1024, (n,)).tolist()
lm = adapted("lm", base(transformers.AutoModelForCausalLM), peft.LoraConfig(
    task_type="CAUSAL_LM", r=3, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"],
    layers_to_transform=[0, 1, 3],
))
rm = adapted("rm", base(transformers.AutoModelForSequenceClassification), peft.LoraConfig(
    task_type="SEQ_CLS", r=1, lora_alpha=2, target_modules="all-linear", modules_to_save=["score"],
))
sequences = [draw(n) for n in (2, 9, 33, 70)]
# Prompts and answers of all lengths; the answers are the targets.
sft = [dict(prompt=draw(p), answer=draw(a) + [END]) for p, a in [(3, 11), (17, 2), (8, 25), (1, 6)]]
ranked = [dict(prompt=draw(p), answers=[draw(a) + [END] for a in n]) for p, n in [(5, (9, 3, 14)), (12, (1, 7, 4))]]


def sft_loss(model):
    picked = [logprobs(model, x["prompt"] + x["answer"])[len(x["prompt"]) - 1:] for x in sft]
    return -torch.cat(picked).mean()


def scores(model, x):
    return torch.stack([model(torch.tensor([x["prompt"] + a])).logits[0, 0] for a in x["answers"]])


def ranked_loss(model):
    pairs = [(0, 1), (0, 2), (1, 2)]
    per_example = []
    for s in (scores(model, x) for x in ranked):
        per_example.append(torch.stack([-torch.nn.functional.logsigmoid(s[i] - s[j]) for i, j in pairs]).mean())
    return torch.stack(per_example).mean()


values = dict(sequences=sequences, sft=sft, ranked=ranked)
with torch.no_grad():
    values["logprobs"] = [numbers(logprobs(lm, ids)) for ids in sequences]
    values["bare_logprobs"] = [numbers(logprobs(base(transformers.AutoModelForCausalLM), ids)) for ids in sequences]
    values["scores"] = [numbers(scores(rm, x)) for x in ranked]
for model in (lm, rm):
    model.train()
values["sft_course"] = train(lm, sft_loss, MAX_NORM["sft"])
values["reward_course"] = train(rm, ranked_loss, MAX_NORM["reward"])
for model in (lm, rm):
    model.eval()
with torch.no_grad():
    values["logprobs_after"] = [numbers(logprobs(lm, ids)) for ids in sequences]
    values["scores_after"] = [numbers(scores(rm, x)) for x in ranked]
    merged = peft.PeftModel.from_pretrained(base(transformers.AutoModelForCausalLM), OUT / "lm").merge_and_unload()
    values["merged_logprobs"] = [numbers(logprobs(merged, ids)) for ids in sequences]
(OUT / "values.json").write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in values.items()) + "\n}\n")
for course in ("sft_course", "reward_course"):
    print(course, values[course])

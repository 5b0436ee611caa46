"""TRL's side of benches/learning: PPO, RLOO, GRPO and DPO on the base, SFT adapter, reward adapter, questions and pairs that
the Rust side wrote to DIR/<seed>/, scored on the same 256 held-out questions by the same gold rule.

usage: trl_side.py --out DIR [--seeds 0,1,2,3,4] [--methods ppo,rloo,grpo,dpo] [--study sections] [--results FILE]
It prints one JSON line per method and seed. `--study sections` has the methods of sections.rs that TRL has, with the same
keys: two optimizer steps of 32 responses a rollout. Lines are added to FILE, and what it holds is not run again.
RLOO, GRPO, DPO and distillation (`DistillationTrainer`, from the actor of our PPO) ran with torch 2.15.0, transformers 5.23.0,
peft 0.21.2, trl 1.16.0, datasets 4.8.4, pyarrow 21.0.0, dill 0.4.0 (datasets cannot hash its tables with pyarrow 26). PPO needs
trl 1.12.0, the last version with a PPO trainer (`trl.experimental.ppo`); it ran on an AVX2 machine, as did our PPO for comparison.

The SFT adapter is merged into the base first, so that TRL's reference (the adapter disabled) is the SFT model; a fresh
adapter of the same shape (r 8, alpha 16, all linear modules) trains on it. Budget and learning rates are the Rust side's:
2560 responses in 40 rollouts of 64, 4 per question, KL coefficient 0.1, AdamW 2e-3 linear with 6 warm-up steps; DPO: one
epoch over the 1280 pairs in batches of 32, AdamW 1e-3, beta 0.1. PPO: the Rust side's two minibatches, KL 0.1 (k1) in the
reward, gamma 1, lambda 0.95, both clip ranges 0.2; its value model is initialised from the reward model, with a LoRA of the
same shape and a trained head, and shares the one optimizer (vf_coef 0.1, TRL's default).
"""

import argparse
import json
import math
import pathlib
import sys
import tempfile

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "src/quickstart/python"))
import task  # noqa: E402  the gold rule, which the Rust side equals on its golden values

NEW_TOKENS, CHUNK = 48, 64
# The keys of GRPOConfig that make the methods of sections.rs; cispo's cap on the ratio is 5 there by default, and here the
# epsilon of a clip.
SECTIONS = dict(
    grpo=dict(loss_type="grpo"), dr_grpo=dict(loss_type="dr_grpo", scale_rewards="none"),
    dapo=dict(loss_type="dapo", epsilon_high=0.28), cispo=dict(loss_type="cispo", epsilon_high=5.0),
    gspo=dict(loss_type="grpo", importance_sampling_level="sequence"),
)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sft_model(folder):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "sft").merge_and_unload()


class Reward:
    """The reward adapter over the base, read at the last token of each response."""

    def __init__(self, folder):
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder / "base", num_labels=1, dtype=torch.float32
        )
        self.model = PeftModel.from_pretrained(base, folder / "reward").eval().base_model.model
        bias = load_file(folder / "reward/adapter_model.safetensors").get("base_model.model.score.bias")
        self.bias = 0.0 if bias is None else bias.item()

    @torch.no_grad()
    def __call__(self, sequences):
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        hidden = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(sequences)), torch.tensor([len(s) - 1 for s in sequences])]
        return (self.model.score(last)[:, 0] + self.bias).tolist()


@torch.no_grad()
def answer_logprobs(model, prompt, answer):
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum().item()


@torch.no_grad()
def judge(model, reference, reward, tokenizer, held, seed):
    """Sampled at temperature 1 from the whole vocabulary; KL is the sum of log-ratios over the sampled tokens."""
    torch.manual_seed(1000 + seed)
    model.eval()
    end = tokenizer.eos_token_id
    gold, kl, scores, lengths = [], [], [], []
    for row in held:
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=end,
        )[0, len(prompt) :].tolist()
        answer = out[: out.index(end) + 1] if end in out else out
        text = tokenizer.decode(answer, skip_special_tokens=True)
        gold.append(task.gold(row, text, ended=answer[-1] == end)["total"])
        kl.append(answer_logprobs(model, prompt, answer) - answer_logprobs(reference, prompt, answer))
        scores.append(reward([prompt + answer])[0])
        lengths.append(len(answer))
    mean = lambda x: sum(x) / len(x)
    spread = math.sqrt(sum((g - mean(gold)) ** 2 for g in gold) / (len(gold) - 1) / len(gold))
    return dict(gold=mean(gold), gold_standard_error=spread, kl=mean(kl), score=mean(scores), length=mean(lengths))


def scorer(folder):
    """The reward model as one module: its adapter merged, its head with the bias."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "base", num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, folder / "reward").merge_and_unload()
    bias = load_file(folder / "reward/adapter_model.safetensors").get("base_model.model.score.bias")
    head = torch.nn.Linear(model.config.hidden_size, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight)
        head.bias.copy_(torch.zeros(1) if bias is None else bias.reshape(1))
    model.score = head
    return model


def ppo(folder, tokenizer, lora, common, questions):
    """The policy that TRL's last PPO trainer trains from the SFT model."""
    import peft
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, judge = sft_model(folder), scorer(folder).requires_grad_(False).eval()
    value = peft.inject_adapter_in_model(
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        scorer(folder),
    )
    value.score.requires_grad_(True)
    tokenizer.padding_side = "left"
    data = Dataset.from_list([dict(tokenizer(q["prompt"], add_special_tokens=False)) for q in questions])
    config = PPOConfig(
        # TRL's schedule counts rollouts, which have two steps each.
        **{**common, "warmup_steps": 3}, learning_rate=2e-3, per_device_train_batch_size=32, num_mini_batches=2,
        num_ppo_epochs=1, total_episodes=2560, response_length=NEW_TOKENS, temperature=1.0, kl_coef=0.1, vf_coef=0.1,
        stop_token="eos", num_sample_generations=0, eval_strategy="no",
        local_rollout_forward_batch_size=CHUNK,
    )
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=judge, value_model=value,
        train_dataset=data, eval_dataset=data.select(range(8)), peft_config=lora,
    )
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model).policy


def train(method, folder, tokenizer, reward, seed, scratch, study):
    common = dict(
        output_dir=scratch, seed=seed, report_to="none", save_strategy="no", logging_strategy="no", use_cpu=True,
        bf16=False, lr_scheduler_type="linear", warmup_steps=6, gradient_checkpointing=False, disable_tqdm=True,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if method == "ppo":
        return ppo(folder, tokenizer, lora, common, rows(folder / "questions.jsonl"))
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    model = sft_model(folder)
    if method == "distill":
        from trl import DistillationConfig, DistillationTrainer

        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        teacher = PeftModel.from_pretrained(base, folder / "actor_ppo").merge_and_unload()
        data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows(folder / "questions.jsonl")])
        config = DistillationConfig(
            **common, learning_rate=2e-3, per_device_train_batch_size=32, num_train_epochs=1, beta=1.0, temperature=1.0,
            max_completion_length=NEW_TOKENS,
        )
        trainer = DistillationTrainer(
            model=model, teacher_model=teacher, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora,
        )
    elif method == "dpo":
        data = Dataset.from_list([{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in rows(folder / "pairs.jsonl")])
        config = DPOConfig(**common, learning_rate=1e-3, per_device_train_batch_size=32, num_train_epochs=1, beta=0.1)
        trainer = DPOTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    else:
        data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows(folder / "questions.jsonl")])
        of_config, of_trainer = (RLOOConfig, RLOOTrainer) if method == "rloo" else (GRPOConfig, GRPOTrainer)
        rollouts = dict(per_device_train_batch_size=64, max_steps=40)
        if study == "sections":
            rollouts = dict(
                per_device_train_batch_size=32, steps_per_generation=2, gradient_accumulation_steps=1, max_steps=80,
                **SECTIONS.get(method, {}),
            )
        config = of_config(
            **common, **rollouts, learning_rate=2e-3, num_generations=4, beta=0.1, max_completion_length=NEW_TOKENS,
            temperature=1.0,
        )

        def scored(prompts, completion_ids, **_):
            asked = [tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
            return reward([p + list(c) for p, c in zip(asked, completion_ids)])

        trainer = of_trainer(
            model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora,
            reward_funcs=scored,
        )
    trainer.train()
    return trainer.model


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", type=pathlib.Path, required=True)
    arguments.add_argument("--seeds", default="0,1,2,3,4")
    arguments.add_argument("--methods")
    arguments.add_argument("--study", choices=["sections"])
    arguments.add_argument("--results", type=pathlib.Path)
    arguments = arguments.parse_args()
    methods = arguments.methods or ("grpo,dr_grpo,rloo,cispo,gspo,dapo,distill" if arguments.study else "ppo,rloo,grpo,dpo")
    marks = dict(side="trl", last=True)
    if arguments.study:
        avx512 = "avx512f" in pathlib.Path("/proc/cpuinfo").read_text()
        marks |= dict(study=arguments.study, learning_rate=2e-3, processor="avx512" if avx512 else "avx2")

    def is_there(seed, method):
        found = rows(arguments.results) if arguments.results and arguments.results.exists() else []
        want = marks | dict(seed=seed, method=method)
        return any(all(row.get(key) == value for key, value in want.items()) for row in found)

    def add(line):
        print(line, flush=True)
        if arguments.results:
            with arguments.results.open("a") as file:
                file.write(line + "\n")

    for seed in map(int, arguments.seeds.split(",")):
        folder = arguments.out / str(seed)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        reward, held, reference = Reward(folder), rows(folder / "held_out.jsonl"), sft_model(folder).eval()
        point = lambda method, samples, model: add(json.dumps(dict(
            marks, seed=seed, method=method, samples=samples, **judge(model, reference, reward, tokenizer, held, seed),
        )))
        if not is_there(seed, "sft"):
            point("sft", 0, reference)
        for method in methods.split(","):
            if is_there(seed, method):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                samples = 2 * len(rows(folder / "pairs.jsonl")) if method == "dpo" else 2560
                point(method, samples, train(method, folder, tokenizer, reward, seed, scratch, arguments.study))


if __name__ == "__main__":
    main()

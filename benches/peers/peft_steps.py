"""The steps of benches/steps.rs in PyTorch: transformers + PEFT, several adapters on one model, the same ids and settings.

Prints one JSON line a step: median seconds of --reps after one warm-up, peak resident memory of the process.
  python peft_steps.py --model DIR [--dtype float32|bfloat16] [--reps 5] [ppo_step generate sft_step reward_step]
DIR is a Hugging Face directory of the same weights (`fourfold merge` of a zero adapter with --dtype f32 makes one of a GGUF).
"""
import argparse
import json
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

STEPS = ["generate", "sft_step", "reward_step", "ppo_step"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ids(rows, columns, salt):
    return torch.tensor([[100 + ((i + salt) * 104729 + j * 7919 + i * j * 31) % 48000 for j in range(columns)] for i in range(rows)])


class Side:
    def __init__(self, path, dtype):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS)
        self.model = get_peft_model(base, config, adapter_name="actor")
        for name in ("reference", "critic", "reward"):
            self.model.add_adapter(name, config)
        self.model.eval()
        self.inner = self.model.get_base_model()
        # PEFT leaves adapters in the base's type; the optimizer's numbers are f32 on both sides.
        for name, p in self.model.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()
        self.heads = {n: torch.nn.Linear(base.config.hidden_size, 1) for n in ("critic", "reward")}
        self.cast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)

    def parameters(self, adapter):
        own = [p for n, p in self.model.named_parameters() if f".{adapter}." in n]
        return own + (list(self.heads[adapter].parameters()) if adapter in self.heads else [])

    def hidden(self, adapter, batch):
        self.model.set_adapter(adapter)
        with self.cast:
            return self.inner.model(input_ids=batch, use_cache=False).last_hidden_state

    def logprobs(self, adapter, batch, start):
        rows = self.hidden(adapter, batch)[:, start - 1 : -1]
        with self.cast:
            logits = self.inner.lm_head(rows).float()
        return logits.gather(-1, batch[:, start:, None]).squeeze(-1) - logits.logsumexp(-1)

    def values(self, adapter, batch):
        return self.heads[adapter](self.hidden(adapter, batch).float()).squeeze(-1)

    def step(self, adapter, micro_losses):
        parameters = self.parameters(adapter)
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        for loss in micro_losses:
            loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def sample(self, prompts):
        self.model.set_adapter("actor")
        with torch.no_grad(), self.cast:
            return self.inner.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0,
                                       top_k=0, top_p=1.0, min_new_tokens=64, max_new_tokens=64, pad_token_id=0)

    def generate(self, rep):
        self.sample(ids(8, 64, 0))

    def sft_step(self, rep):
        batch = ids(4, 256, 4 * rep)
        self.step("actor", [lambda: -self.logprobs("actor", batch, 1).mean()])

    def reward_step(self, rep):
        batch = ids(8, 256, 8 * rep)

        def loss():
            scores = self.values("reward", batch)[:, -1]
            return -F.logsigmoid(scores[:4] - scores[4:]).mean()

        self.step("reward", [loss])

    def ppo_step(self, rep):
        full = self.sample(ids(8, 64, 8 * rep))
        with torch.no_grad():
            old = self.logprobs("actor", full, 64)
            kl = old - self.logprobs("reference", full, 64)
            values = self.values("critic", full)[:, 63:-1]
            rewards = -0.05 * kl
            rewards[:, -1] += self.values("reward", full)[:, -1].clamp(-5, 5)
            advantages, running = torch.zeros_like(values), 0.0
            for t in reversed(range(64)):
                following = values[:, t + 1] if t < 63 else 0.0
                running = rewards[:, t] + following - values[:, t] + 0.95 * running
                advantages[:, t] = running
            returns = advantages + values
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        micro = [slice(0, 4), slice(4, 8)]

        def policy(rows):
            ratio = (self.logprobs("actor", full[rows], 64) - old[rows]).exp()
            a = advantages[rows]
            return torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2)).sum() / old.numel()

        def value(rows):
            v = self.values("critic", full[rows])[:, 63:-1]
            near = values[rows] + (v - values[rows]).clamp(-0.2, 0.2)
            return 0.5 * torch.max((v - returns[rows]) ** 2, (near - returns[rows]) ** 2).sum() / old.numel()

        self.step("actor", [lambda r=r: policy(r) for r in micro])
        self.step("critic", [lambda r=r: value(r) for r in micro])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("steps", nargs="*", default=[])
    a = parser.parse_args()
    side = Side(a.model, getattr(torch, a.dtype))
    for name in [s for s in STEPS if s in a.steps or not a.steps]:
        run, seconds = getattr(side, name), []
        run(0)
        for rep in range(1, a.reps + 1):
            start = time.perf_counter()
            run(rep)
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"bench": f"{name}/peft_{a.dtype}_cpu", "seconds": round(statistics.median(seconds), 3),
                          "min": round(min(seconds), 3), "max": round(max(seconds), 3), "peak_rss_mib": peak,
                          "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()

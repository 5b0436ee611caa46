#!/usr/bin/env python3
"""A PPO step of four roles in PyTorch, with transformers and PEFT: the other side of `fourfold bench gpu`.

    benches/peers/gpu_peft.py --model 7b --stored bf16,nf4 --rollout adapter,merged,static

One base with random weights and four LoRA adapters on all linear layers (actor, reference, critic, reward model), values and
scores by a linear head each. A step samples --batch-size responses of exactly --response-length tokens at temperature 1, reads
them under all four, and does one epoch of PPO's clipped losses in micro-batches with gradient checkpointing, then AdamW for
actor and critic. --rollout is how it samples: `adapter` as PEFT does, `merged` with the actor merged into the base meanwhile, and
`static` merged with transformers' static cache, which it compiles into CUDA graphs on a card. One JSON line each: medians of
--steps after one that is not counted. nf4 needs bitsandbytes and a card. benches/gpu_compare.sh runs both sides in turn.
"""
import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

# Hidden, MLP, layers, heads, key-value heads, width of a head, vocabulary, tied: the shapes of src/run/device_bench/synthetic.rs.
SHAPES = {
    "tiny": (256, 512, 2, 4, 2, 64, 512, True),
    "135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "7b": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROLES = ["actor", "reference", "critic", "reward"]
CLIP, VALUE_CLIP, KL, GAMMA, LAMBDA = 0.2, 0.2, 0.05, 1.0, 0.95


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def quantised(model):
    """All linear layers of the blocks in NF4, as QLoRA has them."""
    import bitsandbytes as bnb

    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                packed.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(parent, name, packed.to("cuda"))
    return model


class Step:
    def __init__(self, args, stored):
        hidden, mlp, layers, heads, kv, head, vocab, tied = SHAPES[args.model]
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, head_dim=head, vocab_size=vocab, tie_word_embeddings=tied, rms_norm_eps=1e-5,
            max_position_embeddings=65536, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
        config._attn_implementation = "sdpa"
        self.args, self.vocab = args, vocab
        torch.set_default_dtype(torch.float32 if args.device == "cpu" else torch.bfloat16)
        with torch.device(args.device):
            base = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        if stored == "nf4":
            base = quantised(base)
        lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEARS, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, lora, adapter_name="actor")
        for role in ROLES[1:]:
            self.model.add_adapter(role, lora)
        self.heads = {
            role: torch.nn.Linear(hidden, 1, bias=False, device=args.device) for role in ("critic", "reward")
        }
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.enable_input_require_grads()
        self.weights = {role: [p for n, p in self.model.named_parameters() if f".{role}." in n] for role in ROLES}
        self.weights["critic"] += self.heads["critic"].parameters()
        for role, weights in self.weights.items():
            for p in weights:
                p.requires_grad_(role in ("actor", "critic"))
        self.optimizers = {role: torch.optim.AdamW(self.weights[role], lr=1e-5) for role in ("actor", "critic")}

    def on(self, role):
        """PEFT lets the active adapter's weights train and no other's; which ones do is decided once."""
        self.model.set_adapter(role)
        for name, weights in self.weights.items():
            for p in weights:
                p.requires_grad_(name in ("actor", "critic"))

    def sample(self, prompts, how):
        merge = how != "adapter"
        self.on("actor")
        self.model.eval()
        if merge:
            self.model.merge_adapter(["actor"])
        more = {"cache_implementation": "static"} if how == "static" else {}
        if how == "static" and self.args.device == "cpu":
            more["disable_compile"] = True
        with torch.no_grad():
            out = self.model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=self.args.response_length, max_new_tokens=self.args.response_length, use_cache=True, **more,
            )
        if merge:
            self.model.unmerge_adapter()
        return out

    def hidden(self, role, ids):
        self.on(role)
        return self.model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state

    def logprobs(self, role, ids):
        rows = self.hidden(role, ids)[:, self.args.prompt_length - 1 : -1]
        logits = self.model.base_model.model.lm_head(rows).float()
        tokens = ids[:, self.args.prompt_length :, None]
        return logits.gather(2, tokens)[..., 0] - logits.logsumexp(2)

    def values(self, role, ids):
        return self.heads[role](self.hidden(role, ids).float())[..., 0]

    def run(self, how, seed):
        args = self.args
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(self.vocab, (args.batch_size, args.prompt_length), generator=generator).to(args.device)
        seconds, began = {}, time.perf_counter()

        def lap(name):
            nonlocal began
            synchronize(args.device)
            seconds[name] = time.perf_counter() - began
            began = time.perf_counter()

        ids = self.sample(prompts, how)
        lap("rollout")
        parts = ids.split(args.micro_batch_size)
        with torch.no_grad():
            old = torch.cat([self.logprobs("actor", part) for part in parts])
            reference = torch.cat([self.logprobs("reference", part) for part in parts])
            at = slice(args.prompt_length - 1, -1)
            values = torch.cat([self.values("critic", part)[:, at] for part in parts])
            rewards = -KL * (old - reference)
            rewards[:, -1] += torch.cat([self.values("reward", part)[:, -1] for part in parts])
            advantages, last = torch.zeros_like(values), torch.zeros(len(ids), device=args.device)
            for t in reversed(range(args.response_length)):
                after = values[:, t + 1] if t + 1 < args.response_length else 0.0
                last = rewards[:, t] + GAMMA * after - values[:, t] + GAMMA * LAMBDA * last
                advantages[:, t] = last
            returns = advantages + values
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        lap("scoring")
        self.model.train()
        for i in range(0, len(ids), args.micro_batch_size):
            rows = slice(i, i + args.micro_batch_size)
            ratio = (self.logprobs("actor", ids[rows]) - old[rows]).exp()
            a = advantages[rows]
            loss = torch.max(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
            (loss * args.micro_batch_size / len(ids)).backward()
            v = self.values("critic", ids[rows])[:, at]
            near = torch.clamp(v, values[rows] - VALUE_CLIP, values[rows] + VALUE_CLIP)
            loss = 0.5 * torch.max((v - returns[rows]) ** 2, (near - returns[rows]) ** 2).mean()
            (0.1 * loss * args.micro_batch_size / len(ids)).backward()
        for role, optimizer in self.optimizers.items():
            torch.nn.utils.clip_grad_norm_(self.weights[role], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        lap("update")
        return seconds, (ratio.detach() - 1).abs().max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="7b", choices=SHAPES)
    parser.add_argument("--stored", default="bf16")
    parser.add_argument("--rollout", default="adapter,merged,static")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--response-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    for stored in args.stored.split(","):
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = Step(args, stored)
        for how in args.rollout.split(","):
            # bitsandbytes merges into rounded weights, which would be another model.
            if stored == "nf4" and how != "adapter":
                continue
            laps, ratios = zip(*(step.run(how, seed) for seed in range(args.steps + 1)))
            found = {
                "bench": "gpu_peft/step", "model": args.model, "stored": stored, "rollout": how, "responses": args.batch_size,
                "prompt": args.prompt_length, "response": args.response_length, "micro_batch_size": args.micro_batch_size,
                "r": args.rank, "seconds": statistics.median(sum(lap.values()) for lap in laps[1:]),
                "phases": {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]},
                "first_ratio_error": max(ratios), "torch": torch.__version__,
            }
            found["ms_per_decoding_step"] = found["phases"]["rollout"] / args.response_length * 1e3
            if args.device == "cuda":
                found["device"] = torch.cuda.get_device_name()
                found["device_bytes"] = torch.cuda.max_memory_allocated()
                found["reserved_bytes"] = torch.cuda.max_memory_reserved()
            print(json.dumps(found), flush=True)
        del step
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""Numbers of tiny random decoders of every family, by transformers and PEFT, for tests/training/families.rs.

Weights are not stored: both sides make them from the tensor's name (`values` below and in the test). Stored are, a
family: config.json, the tensors' names and shapes, logits of two ragged sequences, 8 greedily decoded tokens over a
cache with the logits they were taken from, and the gradients of every LoRA factor of the loss
sum(log-probability of each next token). All in float32.

    python tests/golden/families.py tests/golden/families        # torch 2.15.0, transformers 5.23.0, peft 0.21.2
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file

SEQUENCES = [[5, 9, 31, 2, 44, 17, 8, 60, 23, 11, 3, 38], [7, 1, 50, 12, 29]]
COMMON = dict(vocab_size=64, max_position_embeddings=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MHA = SMALL | dict(num_key_value_heads=4)
WIDE = SMALL | dict(head_dim=8)
FOUR = WIDE | dict(num_hidden_layers=4)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
LONG = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.5], long_factor=[2.0, 4.0])
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
CASES = {
    "llama": t.LlamaConfig(**COMMON, **SMALL),
    "llama_linear_tied": t.LlamaConfig(
        **COMMON, **SMALL, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
    ),
    "llama3": t.LlamaConfig(**COMMON, **SMALL, rope_parameters=LLAMA3),
    "llama_yarn_bias": t.LlamaConfig(**COMMON, **SMALL, rope_parameters=YARN, attention_bias=True, mlp_bias=True),
    "mistral_window": t.MistralConfig(**COMMON, **SMALL, sliding_window=4),
    "qwen2": t.Qwen2Config(**COMMON, **SMALL),
    "qwen2_window": t.Qwen2Config(**COMMON, **SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": t.Qwen3Config(**COMMON, **WIDE, tie_word_embeddings=True),
    "gemma": t.GemmaConfig(**COMMON, **WIDE),
    "gemma2": t.Gemma2Config(
        **COMMON, **WIDE, sliding_window=4, query_pre_attn_scalar=12, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": t.Gemma3TextConfig(
        **COMMON, **FOUR, sliding_window=4, query_pre_attn_scalar=12,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "phi3": t.Phi3Config(**COMMON, **SMALL, sliding_window=6),
    "phi3_longrope": t.Phi3Config(**(COMMON | dict(max_position_embeddings=64)), **SMALL, rope_parameters=LONG,
                                  original_max_position_embeddings=32),
    "olmo2": t.Olmo2Config(**COMMON, **SMALL),
    "granite": t.GraniteConfig(
        **COMMON, **SMALL, embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.3,
        logits_scaling=2.5,
    ),
    "smollm3": t.SmolLM3Config(**COMMON, **(SMALL | dict(num_hidden_layers=4)), no_rope_layer_interval=2),
    "gpt2": t.GPT2Config(
        vocab_size=64, n_positions=40, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt_neo": t.GPTNeoConfig(
        vocab_size=64, max_position_embeddings=40, hidden_size=16, num_layers=4, num_heads=4, window_size=3,
        attention_types=[[["global", "local"], 1], [["local"], 2]], bos_token_id=1, eos_token_id=2,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    ),
    "gpt_neox": t.GPTNeoXConfig(**COMMON, **{k: v for k, v in (MHA | dict(hidden_size=32)).items() if k != "num_key_value_heads"},
                                rotary_pct=0.5),
    "gpt_neox_sequential": t.GPTNeoXConfig(
        **COMMON, **{k: v for k, v in (MHA | dict(hidden_size=32)).items() if k != "num_key_value_heads"},
        rotary_pct=0.25, use_parallel_residual=False,
    ),
    "opt": t.OPTConfig(**COMMON, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, dropout=0.0),
    "opt_350m": t.OPTConfig(**COMMON, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
                            do_layer_norm_before=False, word_embed_proj_dim=12),
}


def values(name, count):
    """Uniform in [-1, 1): SplitMix64's finaliser of FNV-1a(name) + index."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(h) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float64) / 2**23 - 1).astype(np.float32)


def weight(name, shape):
    """Norms' weights are around 1, everything else around 0."""
    u = values(name, int(np.prod(shape))).reshape(shape)
    if len(shape) == 1 and name.endswith(".weight"):
        return np.float32(1) + np.float32(0.25) * u
    return np.float32(0.25) * u


def case(name, config, out):
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    shapes = {}
    tied = bool(config.tie_word_embeddings)
    with torch.no_grad():
        for key, p in model.named_parameters():
            shapes[key] = list(p.shape)
            p.copy_(torch.from_numpy(weight(key, p.shape)))
    tensors, greedy = {}, []
    with torch.no_grad():
        for i, ids in enumerate(SEQUENCES):
            tensors[f"logits.{i}"] = model(torch.tensor([ids])).logits[0].numpy()
            ids, past, steps = torch.tensor([ids]), None, []
            answer, fed = [], ids
            for _ in range(8):
                output = model(fed, past_key_values=past, use_cache=True)
                past, fed = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
                steps.append(torch.log_softmax(output.logits[0, -1], -1).max().item())
                answer.append(fed.item())
            greedy.append(answer)
            tensors[f"greedy.{i}"] = np.array(steps, dtype=np.float32)
    lora = get_peft_model(model, LoraConfig(r=2, lora_alpha=5, target_modules="all-linear", lora_dropout=0.0))
    factors = {k: p for k, p in lora.named_parameters() if "lora_" in k}
    key = lambda k: re.sub(r"\.default\b", "", k)
    with torch.no_grad():
        for k, p in factors.items():
            p.copy_(torch.from_numpy(weight(key(k), p.shape)))
    loss = 0
    for i, ids in enumerate(SEQUENCES):
        ids = torch.tensor([ids])
        logp = torch.log_softmax(lora(ids).logits[0, :-1], -1)
        chosen = logp.gather(1, ids[0, 1:, None])[:, 0]
        tensors[f"lora_logprobs.{i}"] = chosen.detach().numpy()
        loss = loss + chosen.sum()
    loss.backward()
    for k, p in factors.items():
        tensors["grad." + key(k)] = p.grad.numpy()
    config.tie_word_embeddings = tied
    text = {
        "config": json.loads(config.to_json_string(use_diff=False)), "shapes": shapes, "sequences": SEQUENCES,
        "greedy": greedy,
    }
    meta = {"golden": json.dumps(text, separators=(",", ":"))}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, out / f"{name}.safetensors", metadata=meta)
    print(name, sum(v.nbytes for v in tensors.values()), len(meta["golden"]))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in CASES.items():
        if len(sys.argv) < 3 or sys.argv[2] == name:
            case(name, config, folder)

"""DoRA, and LoRA on the two ends of a decoder, by PEFT over tiny random decoders: numbers for tests/training/lora_targets.rs.

Weights and factors are made from their names (families.py). Stored, a case: the adapter as PEFT saves it
(<case>/adapter_config.json, adapter_model.safetensors), and in <case>/golden.safetensors the base's config and shapes,
logits of a sequence by the adapted model and by the merged one, log-probabilities, entropies and exact KL to the bare
base of two sequences, and the gradients of every factor of the loss
sum(log-probability + 0.5 entropy + 0.7 KL(adapted || base)). For DoRA also the magnitudes that PEFT starts from.
A base with one table for both ends is merged after the ends were parted, as PEFT's own warning advises. All in float32.

    python tests/golden/lora_targets.py tests/golden/lora_targets     # torch 2.15.0, transformers 5.23.0, peft 0.21.2
"""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as t
from families import COMMON, MHA, SEQUENCES, SMALL, WIDE, values, weight
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file

OPT = t.OPTConfig(**COMMON, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, dropout=0.0,
                  do_layer_norm_before=False, word_embed_proj_dim=12)
NEOX = t.GPTNeoXConfig(**COMMON, **{k: v for k, v in (MHA | dict(hidden_size=32)).items() if k != "num_key_value_heads"},
                       rotary_pct=0.5)
LLAMA = t.LlamaConfig(**COMMON, **SMALL)
CASES = {
    "dora_llama": (
        t.LlamaConfig(**COMMON, **SMALL, attention_bias=True, mlp_bias=True),
        dict(target_modules="all-linear", use_dora=True, use_rslora=True, rank_pattern={"v_proj": 1}),
    ),
    "dora_gpt2": (
        t.GPT2Config(vocab_size=64, n_positions=40, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True),
    ),
    "ends_llama": (LLAMA, dict(target_modules=["embed_tokens", "lm_head", "q_proj", "down_proj"])),
    "ends_gemma2_tied": (
        t.Gemma2Config(**COMMON, **WIDE, sliding_window=4, query_pre_attn_scalar=12, attn_logit_softcapping=2.0,
                       final_logit_softcapping=3.0),
        dict(target_modules=["embed_tokens", "lm_head", "v_proj"], rank_pattern={"embed_tokens": 3}),
    ),
    "embed_qwen3_tied": (t.Qwen3Config(**COMMON, **WIDE, tie_word_embeddings=True), dict(target_modules=["embed_tokens"])),
    "head_gemma3_tied": (
        t.Gemma3TextConfig(**COMMON, **WIDE, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        dict(target_modules=["lm_head", "o_proj"], use_dora=True),
    ),
    "dora_ends_llama": (LLAMA, dict(target_modules=["embed_tokens", "lm_head", "up_proj"], use_dora=True)),
    "ends_granite": (
        t.GraniteConfig(**COMMON, **SMALL, embedding_multiplier=3.0, attention_multiplier=0.4,
                        residual_multiplier=0.3, logits_scaling=2.5),
        dict(target_modules=r".*(embed_tokens|lm_head|up_proj)", alpha_pattern={"lm_head": 3}),
    ),
    "ends_gpt_neox": (NEOX, dict(target_modules=["embed_in", "lm_head", "query_key_value"])),
    "opt_350m": (OPT, dict(target_modules="all-linear")),
    "opt_350m_dora_ends": (OPT, dict(
        target_modules=["project_in", "project_out", "embed_tokens", "lm_head", "k_proj"], use_dora=True)),
    "layers": (LLAMA, dict(target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[1], use_rslora=True)),
}


def base(config):
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.from_numpy(weight(key, p.shape)))
    return model


def parted(config):
    """The same model, its ends with a table each."""
    model = base(config)
    if not config.tie_word_embeddings:
        return model
    own = copy.deepcopy(config)
    own.tie_word_embeddings = False
    other = base(own)
    with torch.no_grad():
        for key, p in model.named_parameters():
            dict(other.named_parameters())[key].copy_(p)
        other.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    return other


def case(name, config, kwargs, out):
    torch.manual_seed(0)
    model, bare = base(config), base(config)
    shapes = {k: list(p.shape) for k, p in model.named_parameters()}
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **(dict(r=2, lora_alpha=5) | kwargs))).eval()
    key = lambda k: re.sub(r"\.default\b", "", k).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    factors = {k: p for k, p in lora.named_parameters() if "lora_" in k}
    tensors = {}
    with torch.no_grad():
        for k, p in factors.items():
            if "magnitude" in k:
                # B is still what it starts as: zero, or A is.
                tensors["start." + key(k)] = p.numpy().copy()
                p.mul_(torch.from_numpy(1 + np.float32(0.25) * values(key(k), p.numel())))
            else:
                p.copy_(torch.from_numpy(weight(key(k), p.shape)))
    loss = 0
    for i, ids in enumerate(SEQUENCES):
        ids = torch.tensor([ids])
        logits = lora(ids).logits[0]
        if i == 0:
            tensors["logits"] = logits.detach().numpy()
        logp = torch.log_softmax(logits[:-1], -1)
        with torch.no_grad():
            logq = torch.log_softmax(bare(ids).logits[0, :-1], -1)
        chosen = logp.gather(1, ids[0, 1:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        kl = (logp.exp() * (logp - logq)).sum(-1)
        for what, numbers in [("logprobs", chosen), ("entropy", entropy), ("kl", kl)]:
            tensors[f"{what}.{i}"] = numbers.detach().numpy()
        loss = loss + (chosen + 0.5 * entropy + 0.7 * kl).sum()
    loss.backward()
    for k, p in factors.items():
        tensors["grad." + key(k)] = p.grad.numpy()
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    lora.save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    if isinstance(fields["target_modules"], list):
        fields["target_modules"].sort()
    path.write_text(json.dumps(fields, indent=2) + "\n")
    # Loaded, not copied: what is saved is what is merged.
    merged = PeftModel.from_pretrained(parted(config), folder).eval().merge_and_unload()
    with torch.no_grad():
        tensors["merged"] = merged(torch.tensor([SEQUENCES[0]])).logits[0].numpy()
    # Does PEFT's own merge change the function, where one table serves both ends?
    with torch.no_grad():
        shared = PeftModel.from_pretrained(base(config), folder).eval().merge_and_unload()
        drift = np.abs(shared(torch.tensor([SEQUENCES[0]])).logits[0].numpy() - tensors["logits"]).max()
    text = {"config": json.loads(config.to_json_string(use_diff=False)), "shapes": shapes, "sequences": SEQUENCES}
    meta = {"golden": json.dumps(text, separators=(",", ":"))}
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(tensors, folder / "golden.safetensors", metadata=meta)
    parting = np.abs(tensors["merged"] - tensors["logits"]).max()
    print(f"{name}: merged with parted ends within {parting:.1e}, merged as is within {drift:.1e}")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (config, kwargs) in CASES.items():
        if len(sys.argv) < 3 or sys.argv[2] == name:
            case(name, config, kwargs, folder)

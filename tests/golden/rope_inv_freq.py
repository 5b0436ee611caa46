"""Rotary inverse frequencies as transformers computes them, in f32: default, linear, llama3 with factors 8 and 32.

Writes rope_inv_freq.json beside itself. No seed: nothing is random. Printed with torch 2.15.0, transformers 5.23.0.
"""
import json
import pathlib

import torch
import transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BASE = dict(vocab_size=100, hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=131072)
LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
CASES = {
    "default": dict(rope_theta=100000.0, rope_scaling=None),
    "linear": dict(rope_theta=10000.0, rope_scaling=dict(rope_type="linear", factor=2.5)),
    "llama3_8": dict(rope_theta=500000.0, rope_scaling=dict(LLAMA3, factor=8.0)),
    "llama3_32": dict(rope_theta=500000.0, rope_scaling=dict(LLAMA3, factor=32.0)),
}

cases = []
for name, rope in CASES.items():
    raw = dict(BASE, **rope)
    scaling = dict(rope["rope_scaling"] or dict(rope_type="default"), rope_theta=rope["rope_theta"])
    config = LlamaConfig(**BASE, rope_parameters=scaling)
    inv = LlamaRotaryEmbedding(config).inv_freq
    cases.append(dict(name=name, config=dict(raw, model_type="llama"), inv_freq=[float(x) for x in inv]))
versions = dict(torch=torch.__version__, transformers=transformers.__version__)
out = pathlib.Path(__file__).with_suffix(".json")
out.write_text(json.dumps(dict(versions=versions, cases=cases), indent=1) + "\n")

"""Some rows of SmolLM2's GGUF as transformers dequantises and reorders them into its own model.

usage: smollm2_weights.py SmolLM2-135M-Instruct.Q4_1.gguf
Writes smollm2_weights.json. Nothing is random. Printed with transformers 5.23.0, torch 2.15.0, gguf 0.19.0.
"""
import json
import pathlib
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM

path = pathlib.Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
state = model.state_dict()
rows = []
for layer, part in [(0, "self_attn.q_proj"), (29, "self_attn.q_proj"), (0, "self_attn.k_proj"), (7, "self_attn.k_proj"),
                    (3, "self_attn.v_proj"), (3, "self_attn.o_proj"), (11, "mlp.gate_proj"), (12, "mlp.down_proj")]:
    name = f"model.layers.{layer}.{part}.weight"
    for row in (1, 33, 70, 191):
        rows.append(dict(name=name, shape=list(state[name].shape), row=row, first=state[name][row, :6].tolist()))
for row in (0, 49151):
    name = "model.embed_tokens.weight"
    rows.append(dict(name=name, shape=list(state[name].shape), row=row, first=state[name][row, :6].tolist()))
versions = dict(transformers=transformers.__version__, torch=torch.__version__)
out = pathlib.Path(__file__).with_suffix(".json")
out.write_text(json.dumps(dict(versions=versions, rows=rows), indent=1) + "\n")

"""Says whether PEFT loads adapter directories that fourfold wrote, every tensor equal and every tensor used.

usage: python check_peft_loads_ours.py DIR...
Builds a Llama whose sizes are read off the adapter's own tensors where they show, so any adapter of ours will do.
Exit code 1 at the first difference. Checked with torch 2.15.0, transformers 5.23.0, peft 0.21.2.
"""

import json
import pathlib
import re
import sys
import warnings

import peft
import torch
import transformers
from safetensors.torch import load_file


def sizes(tensors):
    """hidden, intermediate, q_out, kv_out, layers: from the factors that are there, small defaults for the rest."""
    found = {"hidden": None, "inter": None, "q": None, "kv": None}
    where = {  # projection: (input size, output size)
        "q_proj": ("hidden", "q"), "k_proj": ("hidden", "kv"), "v_proj": ("hidden", "kv"), "o_proj": ("q", "hidden"),
        "gate_proj": ("hidden", "inter"), "up_proj": ("hidden", "inter"), "down_proj": ("inter", "hidden"),
    }
    layers = 1
    for name, tensor in tensors.items():
        match = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])", name)
        if match:
            layers = max(layers, int(match[1]) + 1)
            side = where[match[2]][match[3] == "B"]
            found[side] = tensor.shape[1 if match[3] == "A" else 0]
        elif name.endswith("score.weight"):
            found["hidden"] = tensor.shape[1]
    found["hidden"] = found["hidden"] or 32
    found["q"] = found["q"] or found["hidden"]
    found["kv"] = found["kv"] or found["q"]
    return {**found, "inter": found["inter"] or 48, "layers": layers}


def check(path):
    path = pathlib.Path(path)
    config = json.loads((path / "adapter_config.json").read_text())
    ours = load_file(path / "adapter_model.safetensors")
    size = sizes(ours)
    head_dim = 8 if size["kv"] % 8 == 0 else size["kv"]
    llama = transformers.LlamaConfig(
        vocab_size=40, hidden_size=size["hidden"], intermediate_size=size["inter"], num_hidden_layers=size["layers"],
        num_attention_heads=size["q"] // head_dim, num_key_value_heads=size["kv"] // head_dim, head_dim=head_dim,
        num_labels=1, pad_token_id=0,
    )
    seq_cls = config["task_type"] == "SEQ_CLS"
    kind = transformers.LlamaForSequenceClassification if seq_cls else transformers.LlamaForCausalLM
    base = kind(llama)
    before = base(torch.arange(1, 9)[None]).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, path)
    complaints = [str(w.message) for w in caught if "key" in str(w.message).lower()]
    assert not complaints, complaints
    theirs = peft.get_peft_model_state_dict(model)
    extra = {"base_model.model.score.bias"}
    assert set(theirs) == set(ours) - extra, set(theirs) ^ set(ours)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            assert abs(module.scaling["default"] - scale) < 1e-12, module.scaling
    moved = (model(torch.arange(1, 9)[None]).logits - before).abs().max().item()
    trained = any(t.any() for n, t in ours.items() if "lora_B" in n)
    assert moved > 0 or not trained, "the adapter has no effect"
    print(f"ok {path}: {len(theirs)} tensors equal, scale {scale}, logits moved by {moved:.3g}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for argument in sys.argv[1:]:
        check(argument)

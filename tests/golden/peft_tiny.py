"""Writes tests/golden/peft_tiny/{lm,rm}: adapters that PEFT itself saved over a tiny Llama, with numbers to check.

lm: CAUSAL_LM, r 4, alpha 6, rslora, q_proj and down_proj of layer 1 only.
rm: SEQ_CLS with a score head, r 2, alpha 3, all-linear.
values.json: the sum and one element of every tensor, from torch.
torch 2.15.0, transformers 5.23.0, peft 0.21.2, seed 20.   Run: python tests/golden/peft_tiny.py
"""

import json
import pathlib
import shutil

import peft
import torch
import transformers
from safetensors.torch import load_file

HERE = pathlib.Path(__file__).parent / "peft_tiny"


def tiny():
    return transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=0,
    )


def save(name, model, config):
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_()
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    (out / "README.md").unlink()
    path = out / "adapter_config.json"
    fields = json.loads(path.read_text())
    if isinstance(fields["target_modules"], list):
        fields["target_modules"].sort()  # PEFT writes a set; sorted, so that the script repeats itself
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    tensors = load_file(out / "adapter_model.safetensors")
    return {
        key: {"shape": list(t.shape), "sum": t.double().sum().item(), "last": t.flatten()[-1].item()}
        for key, t in sorted(tensors.items())
    }


if __name__ == "__main__":
    torch.manual_seed(20)
    values = {
        "lm": save(
            "lm",
            transformers.LlamaForCausalLM(tiny()),
            peft.LoraConfig(
                task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=True, lora_dropout=0.1,
                target_modules=["q_proj", "down_proj"], layers_to_transform=[1],
            ),
        ),
        "rm": save(
            "rm",
            transformers.LlamaForSequenceClassification(tiny()),
            peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=3, target_modules="all-linear"),
        ),
    }
    (HERE / "values.json").write_text(json.dumps(values, indent=1) + "\n")

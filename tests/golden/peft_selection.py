"""What PEFT makes of exclude_modules and layers_pattern over the quickstart's base, in f32: numbers for
tests/exports/peft_variants.rs.

usage: peft_selection.py
Writes peft_selection/excluded (as save_pretrained writes it), peft_selection/state_dict (the same adapter as a state dict of the
whole model has it: `.default.` in the names, f64) and peft_selection/values.json with log-probabilities and the modules that
have a branch.
Printed with torch 2.15.0, transformers 5.23.0, peft 0.21.2, seed 37.
"""
import json
import pathlib
import shutil

import peft
import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[1] / "src/quickstart/assets/base"
OUT = HERE / "peft_selection"

torch.manual_seed(37)
IDS = torch.randint(2, 1024, (24,)).tolist()
base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
model = peft.get_peft_model(base, peft.LoraConfig(
    task_type="CAUSAL_LM", r=1, lora_alpha=3, target_modules=["q_proj", "o_proj", "down_proj"],
    exclude_modules=["3.self_attn.q_proj", "down_proj"], layers_to_transform=[1, 3], layers_pattern=["h", "layers"],
)).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)
    rows = torch.log_softmax(model(torch.tensor([IDS])).logits[0, :-1], -1)
logprobs = rows.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()

shutil.rmtree(OUT, ignore_errors=True)
model.save_pretrained(OUT / "excluded")
(OUT / "excluded/README.md").unlink()
path = OUT / "excluded/adapter_config.json"
fields = json.loads(path.read_text())
fields["base_model_name_or_path"] = "src/quickstart/assets/base"
for key in ["target_modules", "exclude_modules"]:
    fields[key].sort()
path.write_text(json.dumps(fields, indent=2) + "\n")

(OUT / "state_dict").mkdir()
shutil.copy(path, OUT / "state_dict/adapter_config.json")
whole = {name: tensor.double() for name, tensor in model.state_dict().items() if "lora_" in name}
save_file(whole, OUT / "state_dict/adapter_model.safetensors", metadata={"format": "pt"})
modules = sorted(name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
                 for name in whole if "lora_A" in name)
values = {"ids": IDS, "modules": modules, "logprobs": [round(x, 6) for x in logprobs]}
(OUT / "values.json").write_text(json.dumps(values, indent=1) + "\n")

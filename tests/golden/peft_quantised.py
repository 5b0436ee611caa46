"""DoRA, PiSSA and OLoRA by PEFT over a base of four bits: numbers for tests/exports/peft_variants.rs.

usage: peft_quantised.py
Every matrix of the quickstart's base goes through gguf's Q4_0 (its token table Q8_0) and back, so that PEFT works on the very numbers that a
base opened with Q4_0 has. Writes peft_quantised/dora (as PEFT saves it) and peft_quantised/values.json:
log-probabilities of the bare base, under the DoRA adapter, and after merge_and_unload; for PiSSA and OLoRA the product
scale * B0 A0 of every map times a fixed vector.
Printed with torch 2.15.0, transformers 5.23.0, peft 0.21.2, gguf 0.19.0, seed 37.
"""
import json
import pathlib
import shutil

import gguf
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[1] / "src/quickstart/assets/base"
OUT = HERE / "peft_quantised"


def base():
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    types = gguf.GGMLQuantizationType
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # The program keeps tables of the vocabulary in eight bits.
                kind = types.Q8_0 if "embed_tokens" in name else types.Q4_0
                stored = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))
    return model.eval()


def logprobs(model):
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([IDS])).logits[0, :-1], -1)
        return [round(x, 6) for x in rows.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()]


torch.manual_seed(37)
IDS = torch.randint(2, 1024, (24,)).tolist()
values = {"ids": IDS, "bare": logprobs(base())}

dora = peft.get_peft_model(base(), peft.LoraConfig(
    task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], use_dora=True,
)).eval()
with torch.no_grad():
    for name, parameter in dora.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
shutil.rmtree(OUT, ignore_errors=True)
dora.save_pretrained(OUT / "dora")
(OUT / "dora/README.md").unlink()
path = OUT / "dora/adapter_config.json"
fields = json.loads(path.read_text())
fields["base_model_name_or_path"] = "src/quickstart/assets/base"
fields["target_modules"].sort()
path.write_text(json.dumps(fields, indent=2) + "\n")
values["dora"] = logprobs(dora)
values["dora_merged"] = logprobs(dora.merge_and_unload())

for kind in ["pissa", "olora"]:
    model = peft.get_peft_model(base(), peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=kind == "olora", init_lora_weights=kind,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], rank_pattern={"v_proj": 2} if kind == "pissa" else {},
    )).eval()
    probes = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            vector = torch.cos(torch.arange(a.shape[1], dtype=torch.float32))
            product = module.scaling["default"] * (b @ (a @ vector))
            probes[name.removeprefix("base_model.model.")] = [round(x, 6) for x in product[:6].tolist()]
    values[kind] = dict(probes=probes, start=logprobs(model))

(OUT / "values.json").write_text(json.dumps(values, indent=1) + "\n")

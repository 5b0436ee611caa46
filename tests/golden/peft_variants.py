"""What PEFT makes of LoRA's variants over the quickstart's base, in f32: numbers for tests/exports/peft_variants.rs.

usage: peft_variants.py
Writes peft_variants/patterns (rank_pattern and alpha_pattern) and peft_variants/values.json: log-probabilities under it
before and after merge_and_unload; for PiSSA and OLoRA the product scale * B0 A0 of every map times a fixed vector, and
log-probabilities after B has become 1.25 B and A 0.5 A (so that signs of singular vectors do not matter), with the
merged model's and those of PEFT's own conversion into a plain LoRA over the unchanged base; the sum of two adapters by
add_weighted_adapter(combination_type="cat").
Printed with torch 2.15.0, transformers 5.23.0, peft 0.21.2, seed 31.
"""
import json
import pathlib
import shutil
import tempfile

import peft
import torch
import transformers

SEED = 31
HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[1] / "src/quickstart/assets/base"
OUT = HERE / "peft_variants"


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")


def logprobs(model):
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([IDS])).logits[0, :-1], -1)
        return [round(x, 6) for x in rows.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()]


def moved(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


def save(model, name):
    out = OUT / name
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    (out / "README.md").unlink()
    path = out / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["base_model_name_or_path"] = "src/quickstart/assets/base"
    if isinstance(fields["target_modules"], list):
        fields["target_modules"].sort()
    path.write_text(json.dumps(fields, indent=2, sort_keys=False) + "\n")


torch.manual_seed(SEED)
IDS = torch.randint(2, 1024, (24,)).tolist()
values = {"ids": IDS}

patterns = moved(peft.get_peft_model(base(), peft.LoraConfig(
    task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["q_proj", "o_proj", "down_proj"],
    rank_pattern={"layers.2.self_attn.q_proj": 4, "q_proj": 1, "^model.layers.0.mlp.down_proj": 3},
    alpha_pattern={"o_proj": 5, r"layers\.[13]\..*down_proj": 8},
)))
save(patterns, "patterns")
values["patterns"] = logprobs(patterns)
values["patterns_merged"] = logprobs(patterns.merge_and_unload())

for kind, rslora in [("pissa", False), ("olora", True)]:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights=kind,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        rank_pattern={} if rslora else {"v_proj": 2},
    )
    model = peft.get_peft_model(base(), config).eval()
    probes = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            vector = torch.cos(torch.arange(a.shape[1], dtype=torch.float32))
            product = module.scaling["default"] * (b @ (a @ vector))
            probes[name.removeprefix("base_model.model.")] = [round(x, 6) for x in product[:6].tolist()]
    start = logprobs(model)
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder + "/start")
        model.peft_config["default"].init_lora_weights = kind
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter *= 1.25
                if "lora_A" in name:
                    parameter *= 0.5
        trained = logprobs(model)
        model.save_pretrained(folder + "/converted", path_initial_model_for_weight_conversion=folder + "/start")
        converted = peft.PeftModel.from_pretrained(base(), folder + "/converted").eval()
        values[kind] = dict(
            probes=probes, start=start, trained=trained, converted=logprobs(converted),
            merged=logprobs(model.merge_and_unload()),
        )

one = moved(peft.get_peft_model(base(), peft.LoraConfig(
    task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["q_proj", "o_proj", "down_proj"],
)))
save(one, "one")
one.add_adapter("two", peft.LoraConfig(
    task_type="CAUSAL_LM", r=1, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "o_proj", "down_proj"],
))
moved(one)
one.save_pretrained("/tmp/peft-two", selected_adapters=["two"])
one.set_adapter("two")
shutil.rmtree(OUT / "two", ignore_errors=True)
shutil.copytree("/tmp/peft-two/two", OUT / "two")
shutil.rmtree("/tmp/peft-two")
one.save_pretrained(OUT / "one")
(OUT / "one/README.md").unlink(missing_ok=True)
shutil.rmtree(OUT / "one/two", ignore_errors=True)
one.add_weighted_adapter(["default", "two"], [0.7, -0.4], "sum", combination_type="cat")
one.set_adapter("sum")
values["cat"] = logprobs(one)
for name in ["one", "two"]:
    path = OUT / name / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["base_model_name_or_path"] = "src/quickstart/assets/base"
    fields["target_modules"].sort()
    path.write_text(json.dumps(fields, indent=2) + "\n")
    (OUT / name / "README.md").unlink(missing_ok=True)

(OUT / "values.json").write_text(json.dumps(values, indent=1) + "\n")

"""What transformers computes where config.json ties lm_head and embedding and the file holds another lm_head.

usage: tied_head.py
Over the quickstart's base (src/quickstart/assets/base), whose file gets lm_head.weight = 2 x the embedding with its rows rolled by
one: log-probabilities, and whether transformers ties the two; and of the same base with lm_head.weight alone, without the
embedding, to which transformers then ties the embedding. Writes tied_head.json.
Printed with torch 2.15.0, transformers 5.23.0, seed 7.
"""
import json
import pathlib
import shutil
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[1] / "src/quickstart/assets/base"

torch.manual_seed(7)
IDS = torch.randint(2, 1024, (24,)).tolist()


def measured(change):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for file in BASE.iterdir():
            shutil.copy(file, folder / file.name)
        tensors = load_file(BASE / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([IDS])).logits[0, :-1], -1)
        tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        found = rows.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()
        return {"tied": tied, "logprobs": [round(x, 6) for x in found]}


def other_head(tensors):
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"].roll(1, 0)


def same_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_alone(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


found = {"ids": IDS, "other": measured(other_head), "same": measured(same_head), "alone": measured(head_alone)}
(HERE / "tied_head.json").write_text(json.dumps(found, indent=1) + "\n")

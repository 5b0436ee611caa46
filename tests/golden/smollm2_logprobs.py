"""SmolLM2's log-probabilities and greedy continuations by transformers, on the GGUF's weights dequantised to f32.

usage: smollm2_logprobs.py SmolLM2-135M-Instruct.Q4_1.gguf
Writes smollm2_logprobs.json. Nothing is random. Printed with transformers 5.23.0, torch 2.15.0, gguf 0.19.0.
That transformers puts q's and k's rows back into its own order is proven apart: smollm2_weights.py, and here by the
perplexity, which a wrong order would send into the hundreds.
"""
import json
import pathlib
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "The lighthouse had stood on the cliff for two hundred years before anyone thought of counting its steps. "
    "When the keeper's daughter finally did, on a wet afternoon in November, she found one more going up than "
    "coming down, and nobody in the village could tell her why that should be so. She counted them again the next "
    "morning.",
    "def fibonacci(n):\n    \"\"\"Return the first n Fibonacci numbers.\"\"\"\n    numbers = [0, 1]\n"
    "    while len(numbers) < n:\n        numbers.append(numbers[-1] + numbers[-2])\n    return numbers[:n]\n\n\n"
    "print(fibonacci(10))\n",
]
QUESTION = "What is the boiling point of water at sea level, and why does it fall on a mountain?"
ANSWER = ("Water boils at 100 degrees Celsius at sea level. On a mountain the air presses less on the surface, so the "
          "water needs less heat for its vapour to push back, and it boils sooner.<|im_end|>")
PROMPTS = [
    "Name the three primary colours.",
    "Write a haiku about the sea.",
    "Explain in one sentence what a compiler does.",
]
RAW_PROMPTS = ["Once upon a time, in a small village by the river,", "The first ten prime numbers are 2, 3, 5,"]
NEW = 32

path = pathlib.Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def chat(question):
    message = [dict(role="user", content=question)]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return text, tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def logprobs(ids):
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    rows = torch.log_softmax(logits, -1)
    return [round(x, 6) for x in rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]


@torch.no_grad()
def greedy(ids):
    """One full forward a token, so that no cache and no generation setting has a say; with the closest call."""
    ids, new, closest = list(ids), [], float("inf")
    for _ in range(NEW):
        top = model(torch.tensor([ids])).logits[0, -1].topk(2)
        closest = min(closest, (top.values[0] - top.values[1]).item())
        new.append(top.indices[0].item())
        ids.append(new[-1])
        if new[-1] == tokenizer.eos_token_id:
            break
    return new, round(closest, 5)


sequences = []
for text in TEXTS + [chat(QUESTION)[0] + ANSWER]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    values = logprobs(ids)
    sequences.append(dict(input_ids=ids, logprobs=values))
    perplexity = torch.tensor(values).mean().neg().exp().item()
    print(len(ids), "tokens, perplexity", perplexity)
    assert perplexity < 60, "are q's and k's rows in order?"
continuations = []
raw = [(p, tokenizer(p, add_special_tokens=False).input_ids) for p in RAW_PROMPTS]
for text, ids in [chat(p) for p in PROMPTS] + raw:
    new, closest = greedy(ids)
    continuations.append(dict(prompt_ids=ids, token_ids=new, closest_call=closest))
    print(repr(text), "->", repr(tokenizer.decode(new)), "closest call", closest)
versions = dict(transformers=transformers.__version__, torch=torch.__version__)
out = pathlib.Path(__file__).with_suffix(".json")
body = ",\n".join(json.dumps(s) for s in sequences), ",\n".join(json.dumps(c) for c in continuations)
out.write_text('{"versions": %s,\n"sequences": [\n%s\n],\n"greedy": [\n%s\n]}\n' % (json.dumps(versions), *body))

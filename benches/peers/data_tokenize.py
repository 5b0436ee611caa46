"""The other side of benches/data_tokenize.rs: a JSONL of preference pairs through Hugging Face datasets + tokenizers into
an Arrow cache, as TRL's RewardTrainer prepares it (prompt + answer + end token, ids only).

    pip install datasets transformers
    python benches/peers/data_tokenize.py --file pairs.jsonl --tokenizer DIR [--num-proc N]

Prints one JSON line; the time is that of load_dataset and map, without imports and the opening of the tokenizer. The
default is one process whose tokenizer uses all cores.
"""

import argparse
import json
import os
import tempfile
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import tokenizers
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("--file", required=True)
parser.add_argument("--tokenizer", required=True)
parser.add_argument("--num-proc", type=int)
args = parser.parse_args()
datasets.disable_progress_bars()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=os.path.join(args.tokenizer, "tokenizer.json"))
with open(os.path.join(args.tokenizer, "tokenizer_config.json")) as file:
    eos = tokenizer.convert_tokens_to_ids(json.load(file)["eos_token"])


def encode(batch):
    ids = lambda texts: tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    prompt, chosen, rejected = ids(batch["prompt"]), ids(batch["chosen"]), ids(batch["rejected"])
    return {
        "chosen_input_ids": [p + a + [eos] for p, a in zip(prompt, chosen)],
        "rejected_input_ids": [p + a + [eos] for p, a in zip(prompt, rejected)],
    }


with tempfile.TemporaryDirectory() as cache:
    start = time.perf_counter()
    data = datasets.load_dataset("json", data_files=args.file, split="train", cache_dir=cache)
    data = data.map(encode, batched=True, remove_columns=data.column_names, num_proc=args.num_proc)
    seconds = time.perf_counter() - start
    print(json.dumps({
        "bench": "data_tokenize/hugging_face",
        "seconds": round(seconds, 3),
        "rows": len(data),
        "datasets": datasets.__version__,
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
    }))

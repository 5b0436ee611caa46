"""Makes the quickstart's base from nothing: a byte-level BPE tokenizer and a small Llama trained on `task.documents`.

    OMP_NUM_THREADS=1 python src/quickstart/python/make_base.py  # writes src/quickstart/assets/base, minutes on one core

A function of the task's texts, the seed and the library versions that made.json records. The text has no answers to
questions about an aspect and no leaning of tone: those are what fine-tuning and PPO add. Versions: requirements.txt.
"""
import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import task

END, PAD = "<|endoftext|>", "<|pad|>"  # ids 0 and 1
DEFAULT_OUT = Path(__file__).resolve().parents[3] / "src/quickstart/assets/base"

# `\n\nHuman: …` and `\n\nAssistant: …` + end: with the generation prompt this gives exactly `task.wrap(question)`.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


def tokenizer_text(seed):
    """Documents and questions; every word of an answer stands in some document."""
    return task.documents(seed, 8000) + [row["prompt"] for row in task.prompts(seed, 4000, task.TRAIN)]


def train_tokenizer(seed, size):
    """Byte-level BPE; exactly `size` tokens, so the embedding table has no unused rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        tokenizer_text(seed),
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != size:
        raise SystemExit(f"the text yields {tokenizer.get_vocab_size()} tokens only; pass --vocab of at most that")
    return tokenizer


def model_config(args):
    """config.json as every Llama reader knows it (rope_theta and torch_dtype under their first names)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": args.hidden,
        "initializer_range": 0.04,
        "intermediate_size": args.intermediate,
        "max_position_embeddings": 256,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": args.hidden // 32,
        "num_hidden_layers": args.layers,
        "num_key_value_heads": args.hidden // 64,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": args.vocab,
    }


def batches(tokenizer, documents, rows):
    """One document a row, closed by END; rows of like length together, in an order drawn from the documents' count."""
    draws = task.SplitMix64(rows)
    while True:
        encoded = tokenizer.encode_batch([next(documents) for _ in range(16 * rows)])
        ids = sorted(([*e.ids, 0] for e in encoded), key=len)
        groups = [ids[i : i + rows] for i in range(0, len(ids), rows)]
        while groups:
            group = groups.pop(draws.below(len(groups)))
            width = max(map(len, group))
            yield torch.tensor([row + [1] * (width - len(row)) for row in group])


def token_losses(model, x):
    """Summed cross entropy and the number of targets; pads are no targets, the END of each document is one."""
    targets = x[:, 1:].masked_fill(x[:, 1:] == 1, -100)
    logits = model(input_ids=x[:, :-1]).logits.float()
    flat = logits.flatten(0, 1)
    total = torch.nn.functional.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")
    return total, int((targets >= 0).sum())


def pretrain(model, tokenizer, args):
    """AdamW, 50 steps of warm-up, cosine down to a twentieth. Returns the tokens seen and the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream, seen, begun = batches(tokenizer, task.document_stream(args.seed), args.batch), 0, time.time()
    for step in range(args.steps):
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * cosine)
        total, count = token_losses(model, next(stream))
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += count
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step} loss {total.item() / count:.3f} {time.time() - begun:.0f} s", flush=True)
    return seen, total.item() / count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    begun = time.time()
    torch.set_num_threads(1)  # a sum's order, and so the weights, depend on the number of threads
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(args.seed, args.vocab)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = model_config(args)
    own = {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**own))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {args.vocab} tokens", flush=True)
    seen, last = pretrain(model, tokenizer, args)

    model = model.to(torch.bfloat16).eval()  # what is measured below is what is stored
    with torch.no_grad():
        fresh = batches(tokenizer, task.document_stream(args.seed + 1), 64)
        sums = [token_losses(model, next(fresh)) for _ in range(8)]
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    save_file(weights, str(args.out / "model.safetensors"), metadata={"format": "pt"})
    made = {
        "command": f"python src/quickstart/python/make_base.py --seed {args.seed}",
        "seed": args.seed,
        "parameters": parameters,
        "vocabulary": args.vocab,
        "steps": args.steps,
        "documents_a_step": args.batch,
        "learning_rate": args.lr,
        "tokens": seen,
        "last_training_loss": round(last, 4),
        "loss_on_fresh_documents": round(sum(t.item() for t, _ in sums) / sum(c for _, c in sums), 4),
        "seconds_on_one_thread": round(time.time() - begun),
        "text_sha256": hashlib.sha256("\n".join(tokenizer_text(args.seed)).encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": END,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": 256,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": 0, "do_sample": True, "eos_token_id": 0, "pad_token_id": 1, "temperature": 1.0}
    for name, content in {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config,
        "made.json": made,
    }.items():
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(made, indent=2))


if __name__ == "__main__":
    main()

"""Whether llama.cpp runs what `fourfold merge` writes for it: the same greedy tokens for 32 steps on five prompts, and
the log-probabilities it gives of them.

usage: check_llama_cpp.py path/to/fourfold [--base MODEL]...
llama.cpp comes compiled, inside the xllamacpp wheel of requirements.txt. Over two tiny random
Llamas made here (grouped queries with llama3 rope; a SentencePiece-like tokenizer), and over every MODEL given (a GGUF
file or a Hugging Face directory), with an adapter that moves the logits by several nats: the merged model as GGUF in f32,
f16, bf16, q8_0 and q4_k_m, and split over several files; the adapter as GGUF-LoRA over the base's GGUF. One line a check; exit code 1 if any failed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy
import torch
import transformers
import xllamacpp
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

import check_interop as interop
from check_interop import Program, report

SEED = 11
STEPS = 32
PROMPTS = [
    "The river holds the letter and", "Once upon a time", "1, 2, 3 and then", "naïve 東京 🦙 says",
    "def add(a, b):\n    return",
]
# llama.cpp on the CPU rounds activations (q8_0 blocks under quantised weights, f16 or bf16 under those) and accumulates
# in its own order; f32 alone keeps them. So every file is run as it is, and its numbers in f32, where all must agree.
EXACT = 1e-3
WITHIN = {"f32": EXACT, "f16": 0.05, "bf16": 0.15, "q8_0": 0.3, "q4_k_m": 1.0}


class Llama:
    """llama.cpp's server inside of this process."""

    def __init__(self, model, lora=None):
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
        params.n_batch = params.n_ubatch = 128
        # Its threads wait for one another by spinning, which tiny products are not worth.
        params.cpuparams.n_threads = 1
        params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.verbosity = -1
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(params)

    def greedy(self, ids, steps):
        """[(token, its log-probability)], or None where one of them ends in the middle of a character."""
        request = {
            "prompt": ids, "n_predict": steps, "temperature": 0.0, "n_probs": 1, "cache_prompt": False, "seed": 1,
            "ignore_eos": True,
        }
        answer = self.server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        if "choices" not in answer:
            sys.exit(f"llama.cpp answers {answer}")
        content = (answer["choices"][0]["logprobs"] or {"content": []})["content"]
        found = [(step["top_logprobs"][0]["id"], step["top_logprobs"][0]["logprob"]) for step in content]
        return found if len(found) == steps else None

    def next(self, ids):
        """(most likely next token, its log-probability), or None where the server says nothing of a token."""
        request = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": 1, "cache_prompt": True, "seed": 1}
        answer = self.server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        if "choices" not in answer:
            sys.exit(f"llama.cpp answers {answer}")
        found = answer["choices"][0]["logprobs"]
        if found is None:
            return None  # a token that ends in the middle of a character
        best = found["content"][0]["top_logprobs"][0]
        return best["id"], best["logprob"]


def write_adapter(fourfold, base, work):
    """A LoRA over all maps whose factors are random, shaped by what `fourfold sft` makes of this base."""
    data = work / "sft.jsonl"
    data.write_text("".join(json.dumps({"prompt": "a", "completion": " b"}) + "\n" for _ in range(4)))
    config = work / "sft.toml"
    config.write_text(
        f'[base]\npath = "{base}"\n[lora]\nr = 4\nlora_alpha = 6\nuse_rslora = true\n[data]\npath = "{data}"\n'
        "max_rows = 3\neval_rows = 1\n[sft]\n"
    )
    fourfold("sft", config, "--out", work / "sft")
    adapter = work / "sft/adapter"
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(SEED)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            rank = tensor.shape[1]
            tensors[name] = torch.randn(tensor.shape, generator=generator) * (0.3 / rank)
    save_file(tensors, path, metadata={"format": "pt"})
    return adapter


def ours(fourfold, arguments):
    """Greedy tokens and their log-probabilities by fourfold: (prompt ids, tokens, logprobs) for every prompt."""
    found = []
    for prompt in PROMPTS:
        how = ["--prompt", prompt, "--raw", "--temperature", "0", "--max-new-tokens", str(STEPS)]
        got = fourfold("generate", *arguments, *how)
        found.append((got["prompt_token_ids"], got["token_ids"]))
    ids = pathlib.Path(tempfile.mkstemp(suffix=".json")[1])
    ids.write_text(json.dumps({"input_ids": [p + t for p, t in found]}))
    scored = fourfold("logprobs", *arguments, "--tokens", ids)["logprobs"]
    ids.unlink()
    return [(p, t, row[len(p) - 1 :]) for (p, t), row in zip(found, scored)]


def compare(what, llama, want, within, all_tokens=True):
    """Token by token along our greedy text, so that one difference does not hide the rest."""
    same, tokens, unsaid, furthest = 0, 0, 0, 0.0
    for prompt, ids, logprobs in want:
        found = llama.greedy(prompt, len(ids))
        if found is not None and [id for id, _ in found] == ids:
            same, tokens = same + len(ids), tokens + len(ids)
            furthest = max([furthest, *(abs(logprob - a) for (_, logprob), a in zip(found, logprobs))])
            continue
        for step, (id, logprob) in enumerate(zip(ids, logprobs)):
            found = llama.next(prompt + ids[:step])
            if found is None:
                unsaid += 1
                continue
            tokens += 1
            if found[0] == id:
                same += 1
                furthest = max(furthest, abs(found[1] - logprob))
    # Under rounded activations two tokens that are near each other may change places.
    good = furthest <= within and tokens > 9 * unsaid and same >= (tokens if all_tokens else 0.9 * tokens)
    report(what, good, f"{same} of {tokens} greedy tokens the same ({unsaid} not said), logprobs within {furthest:.1e}")


def check(fourfold, name, base, work):
    adapter = write_adapter(fourfold, base, work)
    adapted = ours(fourfold, ["--base", base, "--adapter", adapter])
    moved = furthest_move(fourfold, base, adapted)
    report(f"{name}: the adapter matters", moved > 0.5, f"it moves the greedy log-probabilities by {moved:.1f}")
    zero = work / "zero"
    shut(adapter, zero)
    in_f32 = lambda model, out: fourfold(
        "merge", "--base", model, "--adapter", zero, "--format", "gguf", "--dtype", "f32", "--out", out
    )
    for dtype, within in WITHIN.items():
        merged = work / f"merged-{dtype}.gguf"
        fourfold("merge", "--base", base, "--adapter", adapter, "--format", "gguf", "--dtype", dtype, "--out", merged)
        want = ours(fourfold, ["--base", merged])
        compare(f"{name}: merged {dtype} GGUF in llama.cpp", Llama(merged), want, within, all_tokens=dtype == "f32")
        if dtype == "f32":
            compare(
                f"{name}: merged f32 GGUF in llama.cpp, against base + adapter here", Llama(merged), adapted, within,
            )
        else:
            again = work / f"again-{dtype}.gguf"
            in_f32(merged, again)
            compare(f"{name}: the numbers of that {dtype} file in f32 in llama.cpp", Llama(again), want, EXACT)
    # In several files, of which llama.cpp opens the first.
    parts = fourfold(
        "merge", "--base", base, "--adapter", adapter, "--format", "gguf", "--dtype", "f32", "--out", work / "parts.gguf",
        "--max-shard-size", "40MB" if pathlib.Path(base).is_file() else "60KB",
    )["merged"]
    made = len(list(work.glob("parts-0*.gguf")))
    compare(f"{name}: merged f32 GGUF in {made} files in llama.cpp", Llama(parts), adapted, EXACT)
    report(f"{name}: there are several files", made > 1, f"{made}, the first is {pathlib.Path(parts).name}")
    compare_again = ours(fourfold, ["--base", parts])
    report(f"{name}: the parts open here", compare_again == ours(fourfold, ["--base", work / "merged-f32.gguf"]), "as one file")
    lora = work / "adapter.gguf"
    fourfold("merge", "--base", base, "--adapter", adapter, "--format", "gguf-lora", "--out", lora)
    dense = work / "base-f32.gguf"
    in_f32(base, dense)
    compare(f"{name}: base as f32 GGUF + GGUF-LoRA in llama.cpp", Llama(dense, lora), adapted, EXACT)
    if not pathlib.Path(base).is_dir():
        # The very file. Under quantised weights llama.cpp rounds activations to eight bits (a q8_0 or q8_1 block for
        # every 32), which this program does not: the line above, over the same numbers in f32, is the proof that this
        # is all that differs.
        compare(
            f"{name}: the quantised base itself + GGUF-LoRA in llama.cpp", Llama(base, lora), adapted, 0.5,
            all_tokens=False,
        )


def shut(adapter, out):
    """The adapter with B = 0: merging it gives the base itself."""
    out.mkdir()
    (out / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeros = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    save_file(zeros, out / "adapter_model.safetensors", metadata={"format": "pt"})


def furthest_move(fourfold, base, want):
    """How far the adapter moves the log-probabilities of its own greedy text, which is `want`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"input_ids": [p + t for p, t, _ in want]}, file)
        file.flush()
        bare = fourfold("logprobs", "--base", base, "--tokens", file.name)["logprobs"]
    return max(abs(a - b) for (p, _, l), row in zip(want, bare) for a, b in zip(l, row[len(p) - 1 :]))


def sentence_piece(prefix=True, more=()):
    """A tokenizer that is BPE in SentencePiece's manner: ▁ for spaces, bytes for what is not in the vocabulary; `more`
    are pieces of the user's own."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    first, last = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    special = ["<unk>", "<s>", "</s>", *more] + [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator(interop.sentences(300), trainer)
    # The bytes are part of the vocabulary, not tokens to look for in text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] < 3 + len(more)]
    for token in state["added_tokens"][3:]:
        token["special"] = False
    # As in Gemma's file: such a piece is a token to look for, and merges lead to it as well.
    own = [[piece[:-1], piece[-1]] for piece in more if len(piece) > 1]
    state["model"]["merges"] = own + state["model"]["merges"]
    return Tokenizer.from_str(json.dumps(state))


def sentence_piece_base(path):
    """A tiny Llama with such a tokenizer."""
    tokenizer = sentence_piece()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.12, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def readable(path):
    """The model at `path`, made never to choose a special token or a part of a character: such logits become 0."""
    # Not AutoTokenizer: it goes by the model's family, and some families add tokens of their own.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for id in range(len(tokenizer)):
            if id in tokenizer.all_special_ids or "\ufffd" in tokenizer.decode([id]):
                model.get_output_embeddings().weight[id] = 0.0
    model.save_pretrained(path)
    return path


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("fourfold")
    parser.add_argument("--base", action="append", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    fourfold = Program(str(pathlib.Path(arguments.fourfold).resolve()))
    print(f"xllamacpp {xllamacpp.__version__}, transformers {transformers.__version__}, numpy {numpy.__version__}")
    rope = dict(
        rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    with tempfile.TemporaryDirectory(prefix="fourfold-llama-cpp-") as folder:
        work = pathlib.Path(folder)
        torch.manual_seed(SEED)
        bases = {
            "grouped queries, llama3 rope": readable(interop.make_base(
                work / "grouped", add_bos=True, num_attention_heads=4, num_key_value_heads=2,
                tie_word_embeddings=False, rope_parameters=rope,
            )),
            "sentencepiece, tied": readable(sentence_piece_base(work / "spm")),
        }
        bases.update({pathlib.Path(base).name: pathlib.Path(base) for base in arguments.base})
        for name, base in bases.items():
            inside = work / f"check-{len(list(work.iterdir()))}"
            inside.mkdir()
            check(fourfold, name, base, inside)
    print(f"{len(interop.failures)} failed" if interop.failures else "all checks passed")
    return 1 if interop.failures else 0


if __name__ == "__main__":
    sys.exit(main())

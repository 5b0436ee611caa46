"""Whether llama.cpp runs what `fourfold merge` makes for it of every family that GGUF has an architecture for.

usage: check_llama_cpp_families.py path/to/fourfold [FAMILY]...
A tiny random model of each family, made by transformers here with a tokenizer of the family's kind, and an adapter over
every linear map that moves the log-probabilities by half a nat and more: merged to GGUF in f32 in llama.cpp, and the
adapter as GGUF-LoRA over the base's GGUF in llama.cpp, against base + adapter in fourfold. 32 greedy tokens on five
prompts, and their log-probabilities. One line a check; exit code 1 if any failed.
"""

import pathlib
import sys
import tempfile

import tokenizers
import torch
import transformers as t
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import check_interop as interop
from check_interop import Program, report
from check_llama_cpp import Llama, compare, furthest_move, ours, readable, sentence_piece, shut, write_adapter

SEED = 5
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# llama.cpp's gelu is a table of f16 numbers, and of the tanh approximation for every family.
GELU = 5e-3


def byte_level(path, split=None, normalizer=None, digits=False):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    first += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, whole]) if first else whole
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(interop.sentences(300), trainer)
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(path)
    return len(tokenizer)


def pieces(path):
    """Gemma's kind: no space before a text, and runs of spaces and line ends as tokens of their own."""
    own = ["▁▁", "▁▁▁", "\n", "\n\n"]
    tokenizer = sentence_piece(prefix=False, more=own)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(path)
    return len(tokenizer)


def prefixed(path):
    """Llama 1's kind: a space before a text."""
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=sentence_piece(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(path)
    return len(tokenizer)


SPECIAL = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=256, initializer_range=0.12)
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
WIDE = SMALL | dict(head_dim=32)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LONG = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=[2.0, 4.0, 5.0, 6.0],
    partial_rotary_factor=0.5,
)
HEADS = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
FAMILIES = {
    "mistral": (t.MistralConfig, dict(SPECIAL, **SMALL, sliding_window=200), prefixed, 1e-3),
    "llama with biases, linear rope": (
        t.LlamaConfig,
        dict(SPECIAL, **SMALL, attention_bias=True, mlp_bias=True,
             rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
        lambda p: byte_level(p, split=LLAMA3_SPLIT), 1e-3,
    ),
    "qwen2": (
        t.Qwen2Config, dict(SPECIAL, **SMALL), lambda p: byte_level(p, QWEN2_SPLIT, normalizers.NFC()), 1e-3,
    ),
    "qwen2 with yarn": (t.Qwen2Config, dict(SPECIAL, **SMALL, rope_parameters=YARN), byte_level, 1e-3),
    "qwen3": (
        t.Qwen3Config, dict(SPECIAL, **WIDE, tie_word_embeddings=True),
        lambda p: byte_level(p, QWEN2_SPLIT, normalizers.NFC()), 1e-3,
    ),
    "gemma": (t.GemmaConfig, dict(SPECIAL, **WIDE), pieces, GELU),
    "gemma2": (
        t.Gemma2Config, dict(SPECIAL, **WIDE, sliding_window=8, query_pre_attn_scalar=32), pieces, GELU,
    ),
    "gemma3": (
        t.Gemma3TextConfig,
        dict(SPECIAL, **(WIDE | dict(num_hidden_layers=3)), sliding_window=8, query_pre_attn_scalar=32,
             layer_types=["sliding_attention", "full_attention", "sliding_attention"],
             rope_parameters={
                 "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
                 "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
             }),
        pieces, GELU,
    ),
    "phi3": (t.Phi3Config, dict(SPECIAL, **SMALL), prefixed, 1e-3),
    "phi3 with longrope": (
        # llama.cpp takes the factors for long contexts where its context is longer than the original one; it is 256 here.
        t.Phi3Config,
        dict(SPECIAL | dict(max_position_embeddings=512), **SMALL, rope_parameters=LONG,
             original_max_position_embeddings=256),
        prefixed, 1e-3,
    ),
    "olmo2": (t.Olmo2Config, dict(SPECIAL, **SMALL), lambda p: byte_level(p, LLAMA3_SPLIT), 1e-3),
    "granite": (
        t.GraniteConfig,
        dict(SPECIAL, **SMALL, embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.6,
             logits_scaling=1.5),
        lambda p: byte_level(p, digits=True), 1e-3,
    ),
    "smollm3": (
        t.SmolLM3Config, dict(SPECIAL, **(SMALL | dict(num_hidden_layers=4)), no_rope_layer_interval=4),
        lambda p: byte_level(p, LLAMA3_SPLIT), 1e-3,
    ),
    "gpt2": (
        t.GPT2Config,
        dict(n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, initializer_range=0.12,
             resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        byte_level, GELU,
    ),
    "gpt_neox": (t.GPTNeoXConfig, dict(SPECIAL, **HEADS, rotary_pct=0.5), byte_level, GELU),
    "gpt_neox, one after the other": (
        t.GPTNeoXConfig, dict(SPECIAL, **HEADS, rotary_pct=0.25, use_parallel_residual=False), byte_level, GELU,
    ),
}


def base(path, config, sizes, tokenizer):
    rows = tokenizer(path)
    model = t.AutoModelForCausalLM.from_config(config(vocab_size=rows, **sizes)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases away from where training starts, or nobody sees them left out.
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return readable(path)


def check(fourfold, name, path, work, within):
    adapter = write_adapter(fourfold, path, work)
    bare = ["--base", path]
    want = ours(fourfold, [*bare, "--adapter", adapter])
    moved = furthest_move(fourfold, path, want)
    report(f"{name}: the adapter matters", moved > 0.5, f"it moves the greedy log-probabilities by {moved:.1f}")
    merged = work / "merged.gguf"
    fourfold("merge", *bare, "--adapter", adapter, "--format", "gguf", "--dtype", "f32", "--out", merged)
    compare(f"{name}: merged f32 GGUF in llama.cpp", Llama(merged), want, within)
    lora, over, zero = work / "adapter.gguf", work / "base.gguf", work / "zero"
    fourfold("merge", *bare, "--adapter", adapter, "--format", "gguf-lora", "--out", lora)
    shut(adapter, zero)
    fourfold("merge", *bare, "--adapter", zero, "--format", "gguf", "--dtype", "f32", "--out", over)
    compare(f"{name}: base GGUF + GGUF-LoRA in llama.cpp", Llama(over, lora), want, within)


def refusal(fourfold, work):
    """OPT has no architecture in llama.cpp, so there is nothing to write, and that is said."""
    path = work / "opt"
    rows = byte_level(path)
    config = t.OPTConfig(vocab_size=rows, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                         bos_token_id=1, eos_token_id=2, word_embed_proj_dim=32)
    t.AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    adapter = write_adapter(fourfold, path, work)
    for format in ("gguf", "gguf-lora"):
        out = work / f"opt.{format}"
        code, said = fourfold.refused("merge", "--base", path, "--adapter", adapter, "--format", format, "--out", out)
        report(f"opt: --format {format} is refused", code == 2 and "no opt architecture" in said and not out.exists(), said)


def main():
    torch.set_num_threads(1)
    t.logging.set_verbosity_error()
    t.utils.logging.disable_progress_bar()
    fourfold = Program(str(pathlib.Path(sys.argv[1]).resolve()))
    wanted = sys.argv[2:] or [*FAMILIES, "opt"]
    with tempfile.TemporaryDirectory(prefix="fourfold-llama-cpp-") as folder:
        for i, name in enumerate(wanted):
            torch.manual_seed(SEED)
            work = pathlib.Path(folder) / str(i)
            work.mkdir()
            if name == "opt":
                refusal(fourfold, work)
                continue
            config, sizes, tokenizer, within = FAMILIES[name]
            check(fourfold, name, base(work / "base", config, sizes, tokenizer), work, within)
    print(f"{len(interop.failures)} failed" if interop.failures else "all checks passed")
    return 1 if interop.failures else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main())

"""Whether fourfold and Python's transformers and PEFT mean the same by the same files, in both directions.

usage: check_interop.py path/to/fourfold
Over two tiny random Llamas with tokenizers made here: adapters that PEFT saved through `fourfold logprobs` and `score`;
adapters that `fourfold sft`, `reward` and `ppo` trained through PeftModel; `fourfold merge` through from_pretrained;
greedy text on both sides; a value head as TRL writes it; tokenizers of two other kinds. One line a check, with the largest difference found; exit code 1 if any failed.

A PEFT head has no bias. Where `[reward] center = true` gave ours one, it stands in adapter_model.safetensors as
base_model.model.score.bias, which PEFT leaves out: Python's score is ours less that number, and the check adds it.

Checked with the versions in requirements.txt; the seed is below.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings

import peft
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SEED = 11
# Two f32 orders of summation through three blocks differ by some 1e-6; a wrong scale, layer or row by 1e-2 and more.
TOLERANCE = 1e-4
NOUNS = ["river", "kettle", "garden", "letter", "window", "tiger", "market", "violin", "harbour", "blanket"]
VERBS = ["holds", "follows", "remembers", "paints", "carries", "hides", "answers", "warms"]
BIAS = "base_model.model.score.bias"
failures = []


def check(what, difference, tolerance=TOLERANCE, above=None):
    """One line: `difference` must be a number within `tolerance`; `above`: an effect that must be larger than this."""
    good = difference <= tolerance  # False for NaN
    note = f"largest difference {difference:.2e}"
    if above is not None:
        effect, least = above
        good = good and effect > least
        note += f"; the adapter moves by {effect:.2f}"
    report(what, good, note)


def report(what, good, note):
    print(f"{'ok  ' if good else 'FAIL'} {what}: {note}", flush=True)
    if not good:
        failures.append(what)


def furthest(a, b):
    """Largest distance of two ragged lists of numbers; NaN if one holds NaN."""
    assert [len(x) for x in a] == [len(y) for y in b], "other lengths"
    return max((torch.tensor(x).double() - torch.tensor(y).double()).abs().max().item() for x, y in zip(a, b))


class Program:
    def __init__(self, binary):
        self.binary = binary

    def __call__(self, *arguments):
        done = subprocess.run([self.binary, *map(str, arguments), "--json"], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"fourfold {' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stderr}")
        return json.loads(done.stdout)

    def refused(self, *arguments):
        """(exit code, what it said)"""
        done = subprocess.run([self.binary, *map(str, arguments), "--json"], capture_output=True, text=True)
        return done.returncode, done.stderr.strip()


# ---- the tiny models -------------------------------------------------------------------------------------------------


def sentences(n):
    pick = torch.Generator().manual_seed(SEED)
    draw = lambda words: words[torch.randint(len(words), (1,), generator=pick).item()]
    return [f"The {draw(NOUNS)} {draw(VERBS)} the {draw(NOUNS)} and {draw(VERBS)} a {draw(NOUNS)}." for _ in range(n)]


def make_tokenizer(add_bos):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(300), trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_base(path, add_bos, **more):
    """Grouped queries, heads that do not add up to the hidden size, weights large enough that every part matters."""
    tokenizer = make_tokenizer(add_bos)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=3, head_dim=16,
        max_position_embeddings=128, initializer_range=0.12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        attn_implementation="eager", **more,
    )
    model = transformers.LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        # The padding token's row starts at zero, a direction of no length, of which PEFT's DoRA makes NaN.
        model.get_input_embeddings().weight[0].normal_(std=0.12)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# ---- the Python side -------------------------------------------------------------------------------------------------


def causal(base, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager").eval()


def with_adapter(model, adapter):
    """PeftModel, and no complaint about a key but our bias."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    complaints = [str(w.message) for w in caught if "key" in str(w.message).lower()]
    assert not complaints, complaints
    theirs = peft.get_peft_model_state_dict(model)
    # The tables of the base that PEFT would save below a branch on them.
    theirs = {k: v for k, v in theirs.items() if ".base_layer." not in k}
    ours = load_file(pathlib.Path(adapter) / "adapter_model.safetensors")
    ours.pop(BIAS, None)
    assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in ours), "a tensor changed on the way"
    return model


@torch.no_grad()
def logprobs(model, sequences):
    out = []
    for ids in sequences:
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), -1)
        out.append(rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return out


@torch.no_grad()
def greedy(model, ids, new):
    out = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(ids):].tolist()


def scorer(base):
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def scores(model, adapter, tokenizer, records):
    """Prompt and answer tokenised apart, the end token behind; one sequence a pass; our bias added."""
    bias = load_file(pathlib.Path(adapter) / "adapter_model.safetensors").get(BIAS)
    bias = bias.item() if bias is not None else 0.0
    tail = lambda text: tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    score = lambda prompt, answer: model(torch.tensor([prompt + tail(answer)])).logits[0, 0].item() + bias
    rows = [[score(tokenizer(r["prompt"]).input_ids, r[key]) for key in ("chosen", "rejected")] for r in records]
    return rows, bias


# ---- records ---------------------------------------------------------------------------------------------------------


def write_records(work):
    texts = sentences(40)
    cut = [(t[: t.index(" and")], t[t.index(" and"):]) for t in texts]
    sft = [{"prompt": p, "completion": c} for p, c in cut]
    ranked = [{"prompt": p, "chosen": c, "rejected": c[:5] + c[:5:-1]} for p, c in cut]
    for name, records in [("sft", sft), ("ranked", ranked)]:
        (work / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return ranked


def config(work, stage, base, lora, keys, data):
    sections = {"base": f'path = "{base}"', "lora": lora, "data": f'path = "{work / data}"\neval_rows = 4', stage: keys}
    path = work / f"{stage}.toml"
    path.write_text(f"seed = {SEED}\n" + "".join(f"[{name}]\n{body}\n" for name, body in sections.items()))
    return path


# ---- checks ----------------------------------------------------------------------------------------------------------

PEFT_ADAPTERS = {
    "all linear maps, alpha / r = 1.5": dict(r=4, lora_alpha=6, target_modules="all-linear"),
    "rslora over three maps": dict(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]
    ),
    "o and gate of layers 0 and 2": dict(
        r=5, lora_alpha=4, target_modules=["o_proj", "gate_proj"], layers_to_transform=[0, 2]
    ),
    "a regular expression, rslora": dict(
        r=2, lora_alpha=3, use_rslora=True, target_modules=r".*\.[12]\..*\.(k|up)_proj"
    ),
    "rank and alpha patterns": dict(
        r=2, lora_alpha=3, target_modules=["q_proj", "o_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 4, "up_proj": 1}, alpha_pattern={r"layers\.[02]\..*o_proj": 7},
    ),
    "DoRA over all linear maps": dict(r=3, lora_alpha=4, target_modules="all-linear", use_dora=True),
    "both ends": dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "lm_head", "v_proj"]),
    "DoRA on both ends, rslora": dict(
        r=2, lora_alpha=3, use_rslora=True, use_dora=True, target_modules=["embed_tokens", "lm_head", "down_proj"]
    ),
}


def save_peft(model, out, task, **lora):
    """A PEFT adapter away from its start."""
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=task, lora_dropout=0.1, **lora)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.15)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(out)
    return model


def from_peft(fourfold, name, base, work, tokens, sequences, records):
    bare = logprobs(causal(base), sequences)
    got = fourfold("logprobs", "--base", base, "--tokens", tokens)["logprobs"]
    check(f"{name}: bare base, logprobs", furthest(got, bare))
    for i, (what, lora) in enumerate(PEFT_ADAPTERS.items()):
        out = work / f"peft{i}"
        want = logprobs(save_peft(causal(base), out, "CAUSAL_LM", **lora), sequences)
        got = fourfold("logprobs", "--base", base, "--adapter", out, "--tokens", tokens)["logprobs"]
        check(f"{name}: PEFT -> fourfold, {what}", furthest(got, want), above=(furthest(want, bare), 0.1))
    out = work / "peft_rm"
    model = save_peft(scorer(base), out, "SEQ_CLS", r=4, lora_alpha=6, target_modules="all-linear")
    want, _ = scores(model, out, transformers.AutoTokenizer.from_pretrained(base), records)
    got = fourfold("score", "--base", base, "--adapter", out, "--data", work / "ranked.jsonl")["scores"]
    check(f"{name}: PEFT -> fourfold, a classifier's scores", furthest(got, want))


def to_peft(fourfold, name, base, work, tokens, sequences, records):
    bare = logprobs(causal(base), sequences)

    def compare_policy(what, adapter, least):
        want = logprobs(with_adapter(causal(base), adapter), sequences)
        got = fourfold("logprobs", "--base", base, "--adapter", adapter, "--tokens", tokens)["logprobs"]
        check(f"{name}: {what} -> PEFT, logprobs", furthest(got, want), above=(furthest(want, bare), least))

    def compare_scorer(what, adapter, biased=None):
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        want, bias = scores(with_adapter(scorer(base), adapter), adapter, tokenizer, records)
        got = fourfold("score", "--base", base, "--adapter", adapter, "--data", work / "ranked.jsonl")["scores"]
        check(f"{name}: {what} -> PEFT, scores (bias {bias:.3f})", furthest(got, want))
        if biased is not None:
            report(f"{name}: {what} stores a bias: {biased}", (bias != 0.0) == biased, f"{bias}")

    keys = "learning_rate = 1e-2\nnum_train_epochs = 2\n"
    maps = '["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]'
    lora = f"r = 4\nlora_alpha = 6\nuse_rslora = true\ntarget_modules = {maps}"
    fourfold("sft", config(work, "sft", base, lora, keys, "sft.jsonl"), "--out", work / "sft")
    compare_policy("fourfold sft, rslora over five maps", work / "sft/adapter", 0.1)
    some = "r = 3\nlora_alpha = 5\nlayers_to_transform = [1, 2]"
    fourfold("sft", config(work, "sft", base, some, keys, "sft.jsonl"), "--out", work / "sft_some")
    compare_policy("fourfold sft, all linear of two layers", work / "sft_some/adapter", 0.1)
    for start in ("pissa", "olora", "gaussian", "dschat"):
        variant = f'r = 3\nlora_alpha = 5\ninit_lora_weights = "{start}"\nloraplus_lr_ratio = 4.0\n'
        variant += 'rank_pattern = { q_proj = 2, "layers.1.mlp.up_proj" = 4 }\nalpha_pattern = { o_proj = 2.5 }'
        fourfold("sft", config(work, "sft", base, variant, keys, "sft.jsonl"), "--out", work / f"sft_{start}")
        compare_policy(f"fourfold sft, {start}, patterns, LoRA+", work / f"sft_{start}/adapter", 0.1)
    ends = 'r = 3\nlora_alpha = 5\nuse_dora = true\ntarget_modules = ["embed_tokens", "lm_head", "gate_proj"]'
    fourfold("sft", config(work, "sft", base, ends, keys, "sft.jsonl"), "--out", work / "sft_ends")
    compare_policy("fourfold sft, DoRA on both ends", work / "sft_ends/adapter", 0.1)
    fourfold("sft", config(work, "sft", base, "r = 3\nuse_dora = true", keys, "sft.jsonl"), "--out", work / "sft_dora")
    compare_policy("fourfold sft, DoRA over all linear maps", work / "sft_dora/adapter", 0.1)
    continued = keys + f'adapter = "{work / "sft/adapter"}"\n'
    for center in (True, False):
        more = continued + f"center = {str(center).lower()}"
        out = work / f"reward_{center}"
        fourfold("reward", config(work, "reward", base, lora, more, "ranked.jsonl"), "--out", out)
        compare_scorer(f"fourfold reward, center = {str(center).lower()}", out / "adapter", biased=center)
    keys = (
        f'adapter = "{work / "sft/adapter"}"\nreward_adapter = "{work / "reward_True/adapter"}"\nlearning_rate = 1e-2\n'
        "total_episodes = 16\nbatch_size = 8\nresponse_length = 12\n"
    )
    fourfold("ppo", config(work, "ppo", base, lora, keys, "sft.jsonl"), "--out", work / "ppo")
    compare_policy("fourfold ppo's actor", work / "ppo/actor", 0.1)
    compare_scorer("fourfold ppo's critic", work / "ppo/critic")


def merges(fourfold, name, base, work, tokens, sequences):
    adapter = work / "ppo/actor"
    adapted = with_adapter(causal(base), adapter)
    want = logprobs(adapted, sequences)
    for dtype in ("f32", "bf16"):
        out = work / f"merged_{dtype}"
        fourfold("merge", "--base", base, "--adapter", adapter, "--dtype", dtype, "--out", out)
        merged = causal(out, "auto")
        expected = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        types = {p.dtype for p in merged.parameters()}
        report(f"{name}: merge --dtype {dtype} opens in that type", types == {expected}, str(types))
        in_f32 = causal(out)
        if dtype == "f32":
            with torch.no_grad():
                inputs = [torch.tensor([ids]) for ids in sequences]
                logits = max((in_f32(x).logits - adapted(x).logits).abs().max().item() for x in inputs)
            check(f"{name}: merge --dtype f32 -> transformers, logits of base + adapter", logits)
        else:
            # 8 bits of mantissa in every weight: some 1e-2, of an adapter that moves them by 1 and more.
            difference = furthest(logprobs(in_f32, sequences), want)
            check(f"{name}: merge --dtype bf16 -> transformers, logprobs of base + adapter", difference, 0.15)
        got = fourfold("logprobs", "--base", out, "--tokens", tokens)["logprobs"]
        difference = furthest(got, logprobs(in_f32, sequences))
        check(f"{name}: merge --dtype {dtype}, fourfold and transformers read the same", difference)
        same = transformers.AutoTokenizer.from_pretrained(out)("The tiger paints").input_ids
        original = transformers.AutoTokenizer.from_pretrained(base)("The tiger paints").input_ids
        report(f"{name}: merge --dtype {dtype} brings the tokenizer", same == original, f"{same}")
        ends = [transformers.GenerationConfig.from_pretrained(at).to_diff_dict() for at in (base, out)]
        own = [{k: v for k, v in e.items() if not k.startswith(("_", "transformers"))} for e in ends]
        good = own[0] == own[1] and (out / "generation_config.json").is_file() and own[0]["eos_token_id"] == 2
        report(f"{name}: merge --dtype {dtype} brings the generation config", good, str(own[1]))
    out = work / "shards"
    fourfold(
        "merge", "--base", base, "--adapter", adapter, "--dtype", "f32", "--max-shard-size", "60KB", "--out", out
    )
    shards = len(list(out.glob("model-*.safetensors")))
    difference = furthest(logprobs(causal(out), sequences), want)
    check(f"{name}: merge in {shards} shards -> transformers", difference if shards > 1 else float("nan"))
    for what in ("ends", "dora"):
        out = work / f"merged_{what}"
        fourfold("merge", "--base", base, "--adapter", work / f"sft_{what}/adapter", "--dtype", "f32", "--out", out)
        theirs, ours = with_adapter(causal(base), work / f"sft_{what}/adapter"), causal(out)
        with torch.no_grad():
            inputs = [torch.tensor([ids]) for ids in sequences]
            logits = max((ours(x).logits - theirs(x).logits).abs().max().item() for x in inputs)
        check(f"{name}: merge of {what} -> transformers, logits of base + adapter", logits)
        tied = ours.config.tie_word_embeddings
        expected = False if what == "ends" else causal(base).config.tie_word_embeddings
        report(f"{name}: merge of {what}: one table for both ends: {expected}", tied == expected, str(tied))
    # Two adapters as one. The sum is made here: PEFT's "cat" takes only adapters over the same maps, and under rslora
    # scales its result by the square root of the rank.
    two = work / "sft_some/adapter"
    mixed = peft.PeftModel.from_pretrained(causal(base), adapter)
    mixed.load_adapter(two, "two")
    with torch.no_grad():
        for module in mixed.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                for part, weight in [("default", 0.75), ("two", -0.5)]:
                    if part in module.lora_A:
                        module.base_layer.weight += weight * module.get_delta_weight(part)
    mixed = mixed.unload()
    weighted = ["--adapter", f"{adapter}=0.75", "--adapter", f"{two}=-0.5"]
    fourfold("merge", "--base", base, *weighted, "--dtype", "f32", "--out", work / "mixed")
    want = logprobs(mixed.eval(), sequences)
    got = logprobs(causal(work / "mixed"), sequences)
    check(f"{name}: merge of two adapters with weights", furthest(got, want))
    fourfold("merge", "--base", base, *weighted, "--format", "peft", "--out", work / "mixed_peft")
    again = logprobs(with_adapter(causal(base), work / "mixed_peft"), sequences)
    check(f"{name}: two adapters as one PEFT adapter", furthest(again, want))
    return adapter, adapted


def reward_exports(fourfold, name, base, work, records):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for centered in (True, False):
        adapter = work / f"reward_{centered}/adapter"
        want = fourfold("score", "--base", base, "--adapter", adapter, "--data", work / "ranked.jsonl")["scores"]
        out = work / f"classifier_{centered}"
        fourfold("merge", "--base", base, "--adapter", adapter, "--format", "classifier", "--dtype", "f32", "--out", out)
        # No num_labels: the model's own configuration must say it.
        model = transformers.AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
        got, bias = scores(model, adapter, tokenizer, records)
        check(f"{name}: reward model as a classifier -> transformers, scores (bias {bias:.3f})", furthest(got, want))
        padded = tokenizer([r["prompt"] for r in records[:3]], return_tensors="pt", padding=True)
        single = [model(torch.tensor([tokenizer(r["prompt"]).input_ids])).logits.item() for r in records[:3]]
        with torch.no_grad():
            batch = model(**{k: padded[k] for k in ("input_ids", "attention_mask")}).logits[:, 0].tolist()
        check(f"{name}: the classifier's padded batch", furthest([batch], [single]))
        out = work / f"value_head_{centered}"
        fourfold("merge", "--base", base, "--adapter", adapter, "--format", "value-head", "--out", out)
        head = torch.nn.Linear(tokens_width(base), 1)
        stored = load_file(out / "value_head.safetensors")
        head.load_state_dict({k.removeprefix("v_head.summary."): v for k, v in stored.items()})
        lm = with_adapter(causal(base), out)
        ids = tokenizer(records[0]["prompt"] + records[0]["chosen"]).input_ids
        with torch.no_grad():
            hidden = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            value = head(hidden).item()
            plain = with_adapter(scorer(base), adapter)(torch.tensor([ids])).logits.item() + bias
        check(f"{name}: value head over PEFT's hidden states, as TRL computes it", abs(value - plain))
        read = fourfold("score", "--base", base, "--adapter", out, "--data", work / "ranked.jsonl")["scores"]
        check(f"{name}: value head read back", furthest(read, want))


def foreign_value_head(fourfold, name, base, work, records):
    """What TRL and LLaMA-Factory leave: a PEFT adapter of a language model, and the head in a file of its own, with the
    names of TRL's ValueHead. Scored by the head over PEFT's hidden states."""
    out = work / "trl"
    model = save_peft(causal(base), out, "CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear")
    head = torch.nn.Linear(tokens_width(base), 1)
    save_file({f"v_head.summary.{k}": v.detach() for k, v in head.state_dict().items()}, out / "value_head.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    @torch.no_grad()
    def value(prompt, answer):
        ids = tokenizer(prompt).input_ids + tokenizer(answer, add_special_tokens=False).input_ids
        ids.append(tokenizer.eos_token_id)
        return head(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]).item()

    want = [[value(r["prompt"], r[key]) for key in ("chosen", "rejected")] for r in records]
    got = fourfold("score", "--base", base, "--adapter", out, "--data", work / "ranked.jsonl")["scores"]
    check(f"{name}: TRL's value head -> fourfold, scores", furthest(got, want))


def other_tokenizers(fourfold, base, work):
    """Unigram and WordPiece, as transformers applies them: special tokens around, normalisation, unknown characters."""
    cls = [("[CLS]", 1), ("[SEP]", 2)]
    wordpiece = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    wordpiece.train_from_iterator(sentences(300), trainer)
    wordpiece.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=cls)
    unigram = tokenizers.Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="[UNK]", show_progress=False)
    unigram.train_from_iterator(sentences(300), trainer)
    unigram.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=cls[:1])
    texts = ["The river holds a letter.", "  THE Tiger  paints, Ünïcode ﬁ!", "東京 🦙 river", "a [SEP] b", "x" * 120, " "]
    for kind, made in [("WordPiece", wordpiece), ("Unigram", unigram)]:
        path = work / kind
        shutil.copytree(base, path)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
        )
        tokenizer.save_pretrained(path)
        said = fourfold("inspect", path)["tokenizer"]["kind"]
        different = []
        for text in texts:
            # What the tokenizer puts behind a text is left out: the response follows there.
            want = tokenizer(text).input_ids
            want = want[:-1] if kind == "WordPiece" else want
            got = fourfold("generate", "--base", path, "--prompt", text, "--raw", "--temperature", "0", "--max-new-tokens", "4")
            tail = tokenizer.decode(got["token_ids"], skip_special_tokens=True)
            if got["prompt_token_ids"] != want or got["text"].strip() != tail.strip():
                different.append((text, got["prompt_token_ids"], want, got["text"], tail))
        report(f"{kind} tokenizer -> fourfold", said == kind and not different, str(different or f"{len(texts)} texts"))


def tokens_width(base):
    return transformers.AutoConfig.from_pretrained(base).hidden_size


def greedy_text(fourfold, name, base, work, adapter, adapted):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    sides = [
        ("base + adapter", ["--base", base, "--adapter", adapter], adapted),
        ("bare base", ["--base", base], causal(base)),
        ("merged f32", ["--base", work / "merged_f32"], causal(work / "merged_f32")),
    ]
    for what, arguments, model in sides:
        different, tokens = 0, 0
        for prompt in ["The river", "A violin hides", "The market remembers the letter and", "é – 7"]:
            ids = tokenizer(prompt).input_ids
            how = ["--prompt", prompt, "--raw", "--temperature", "0", "--max-new-tokens", "24"]
            got = fourfold("generate", *arguments, *how)
            want = greedy(model, ids, 24)
            different += got["prompt_token_ids"] != ids or got["token_ids"] != want
            tokens += len(want)
        report(f"{name}: greedy text of {what}", different == 0, f"{different} of 4 prompts differ, {tokens} tokens")


def main(binary):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about itself
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    fourfold = Program(str(pathlib.Path(binary).resolve()))
    llama3 = dict(
        rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    bases = {
        "grouped queries": dict(add_bos=False, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False),
        "one kv head, tied, llama3 rope, bos": dict(
            add_bos=True, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=llama3
        ),
    }
    for name, shape in bases.items():
        with tempfile.TemporaryDirectory(prefix="fourfold-interop-") as folder:
            work = pathlib.Path(folder)
            torch.manual_seed(SEED)
            base = make_base(work / "base", **shape)
            records = write_records(work)
            vocab = len(transformers.AutoTokenizer.from_pretrained(base))
            sequences = [torch.randint(3, vocab, (n,)).tolist() for n in (2, 17, 60, 100)]
            tokens = work / "tokens.json"
            tokens.write_text(json.dumps({"input_ids": sequences}))
            from_peft(fourfold, name, base, work, tokens, sequences, records)
            to_peft(fourfold, name, base, work, tokens, sequences, records)
            adapter, adapted = merges(fourfold, name, base, work, tokens, sequences)
            reward_exports(fourfold, name, base, work, records)
            foreign_value_head(fourfold, name, base, work, records)
            greedy_text(fourfold, name, base, work, adapter, adapted)
            if shape["add_bos"]:
                other_tokenizers(fourfold, base, work)
    print(f"{len(failures)} failed" if failures else "all checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))

"""Log-probabilities of encyclopedia.txt by transformers over the dequantised weights of SmolLM2-135M-Instruct (Q4_1) and
Gemma 3 270M (Q4_K_M); for Gemma also greedy continuations, and token ids by the sentencepiece library.

usage: real_models.py SmolLM2-135M-Instruct.Q4_1.gguf gemma-3-270m-q4_k_m.gguf
(tests/fetch/fetch-smollm2.sh and fetch-gemma3.sh print the paths.) Needs, beside requirements.txt of tests/python:
sentencepiece and protobuf.
Writes real_models.json. Nothing is random. Printed with the versions in the file.

Gemma's own tokenizer.model is a sentencepiece file; a GGUF carries its pieces, scores and types. Here they become a
sentencepiece model again, which the library itself runs: the ids are not ours, nor transformers', nor llama.cpp's. That
llama.cpp agrees with them is checked on the way.
"""
import json
import pathlib
import sys
import urllib.request

import gguf
import sentencepiece
import torch
import transformers
import xllamacpp
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoModelForCausalLM, AutoTokenizer

here = pathlib.Path(__file__).parent
ARTICLE = (here / "encyclopedia.txt").read_text()
TEXTS = [
    "Hello, world! It's 2024 and we've 1234567 reasons; don't they'll I'M HE'S",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if v != 0}  # squares\n\n\tif a[0] >= 0x1F: pass\r\n",
    "<table><tr><td>a</td></tr></table>\n<h1>b</h1>\t\t<unused7>[multimodal]",
    "日本語のテキスト と 中文字符，한국어 문장. Ελληνικά, русский, العربية, हिन्दी",
    "emoji 🙂🙃 👩‍👩‍👧‍👦 🇩🇪 ✓ — “quotes” …",
    "  two  spaces   three\t\ttabs \n\n\n newlines    ",
    "a" + 40 * " " + "b" + 35 * "\n" + "c",
    "naïve café Ünïcödé ǅ ß \u00a0nbsp\u3000wide\u200bzero-width ﬁ ｆｕｌｌ e\u0301",
    "<start_of_turn>user\nName a river.<end_of_turn>\n<start_of_turn>model\n",
    "",
    " ",
    "▁a",
    ARTICLE,
]
PROMPTS = ["The Tide mill is", "Once upon a time, in a small village by the river,",
           "def fibonacci(n):\n    ", "The first ten prime numbers are 2, 3, 5,", "東京は日本の"]
NEW = 32


def sentencepiece_model(path):
    """The pieces of a GGUF as a sentencepiece model, with what Gemma's tokenizer.model says of white space."""
    fields = gguf.GGUFReader(path).fields
    get = lambda key: fields[f"tokenizer.ggml.{key}"].contents()
    proto = sentencepiece_model_pb2.ModelProto()
    tokens, kinds, unknown = get("tokens"), get("token_type"), get("unknown_token_id")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(tokens)
    for name, key in [("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")]:
        setattr(trainer, f"{name}_id", get(f"{key}_token_id"))
        setattr(trainer, f"{name}_piece", tokens[get(f"{key}_token_id")])
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
    for id, (token, score, kind) in enumerate(zip(tokens, get("scores"), kinds)):
        # The numbers of the types are the same, but that converters mark <unk> a control token; and they write the
        # spaces of user-defined pieces out.
        plain = token.replace(" ", "▁") if kind == gguf.TokenType.USER_DEFINED else token
        proto.pieces.add(piece=plain, score=score, type=2 if id == unknown else int(kind))
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor, [get("bos_token_id")]


def llama_cpp(path):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup, params.verbosity = str(path), 64, 0, False, -1
    server = xllamacpp.Server(params)

    def encode(text):
        body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["tokens"]

    return encode


def opened(path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def logprobs(model, ids):
    rows = model(torch.tensor([ids])).logits[0, :-1]
    # A row at a time: a float64 copy of all would be gigabytes.
    return [round(torch.log_softmax(row.double(), -1)[id].item(), 6) for row, id in zip(rows, ids[1:])]


@torch.no_grad()
def greedy(model, ids):
    """A full forward a token; with the closest call."""
    ids, new, closest = list(ids), [], float("inf")
    for _ in range(NEW):
        top = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].topk(2)
        closest = min(closest, (top.values[0] - top.values[1]).item())
        new.append(top.indices[0].item())
        ids.append(new[-1])
    return dict(token_ids=new, closest_call=round(closest, 5))


def perplexity(values):
    return round(torch.tensor(values, dtype=torch.float64).mean().neg().exp().item(), 4)


def article(model, ids):
    values = logprobs(model, ids)
    print(len(ids), "tokens, perplexity", perplexity(values))
    return dict(input_ids=ids, logprobs=values, perplexity=perplexity(values))


smollm2, gemma = map(pathlib.Path, sys.argv[1:])
tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
found = {"smollm2": article(opened(smollm2), tokenizer(ARTICLE).input_ids)}

pieces, first = sentencepiece_model(gemma)
# <start_of_turn> and its like are control tokens, which the library never finds in text; whole programs do.
encode = lambda text: first + pieces.encode(text)
theirs = llama_cpp(gemma)
cases = []
for text in TEXTS[:-1]:
    ids = encode(text)
    spelled = "<start_of_turn>" in text or "<unused7>" in text
    assert spelled or theirs(text) == ids, (text, theirs(text), ids)
    if not spelled:
        cases.append(dict(text=text, ids=ids, decoded=pieces.decode(ids)))
model = opened(gemma)
ids = encode(ARTICLE)
assert theirs(ARTICLE) == ids
found["gemma3"] = dict(
    cases=cases, **article(model, ids),
    greedy=[dict(prompt=p, prompt_ids=encode(p), **greedy(model, encode(p))) for p in PROMPTS],
)
for case in found["gemma3"]["greedy"]:
    print(repr(case["prompt"]), "->", repr(pieces.decode(case["token_ids"])), "closest call", case["closest_call"])
versions = {m.__name__: m.__version__ for m in (transformers, torch, sentencepiece, xllamacpp)}
lines = lambda value: json.dumps(value, ensure_ascii=False).replace(' {"', '\n {"')
(here / "real_models.json").write_text(lines(dict(versions=versions, **found)) + "\n")

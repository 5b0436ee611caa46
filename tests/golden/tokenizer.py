"""Token ids as transformers reads them out of GGUF metadata.

usage: tokenizer.py SmolLM2-135M-Instruct.Q4_1.gguf    (tests/fetch/fetch-smollm2.sh prints its path)

Writes tokenizer_smollm2.json: mixed texts, the ids of that file's tokenizer, and the texts of those ids; and
tokenizer_small.json: three vocabularies of some hundred tokens, trained here on the same texts (the trainer has no
randomness), as the arrays a GGUF would hold, with the ids that transformers' GGUF conversion gives.
Printed with transformers 5.23.0, tokenizers 0.23.3, gguf 0.19.0.
"""
import json
import pathlib
import sys

import tokenizers
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import _LLAMA3_SPLIT, _QWEN2_SPLIT, convert_gguf_tokenizer

here = pathlib.Path(__file__).parent
path = pathlib.Path(sys.argv[1])
TEXTS = [
    "Hello, world! It's 2024 and we've 1234567 reasons; don't they'll I'M HE'S",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if v != 0}  # squares\n\n\tif a[0] >= 0x1F: pass\r\n",
    "日本語のテキスト と 中文字符，한국어 문장. Ελληνικά, русский, العربية, हिन्दी",
    "emoji 🙂🙃 👩‍👩‍👧‍👦 🇩🇪 ✓ — “quotes” …",
    "  two  spaces   three\t\ttabs \n\n\n newlines    ",
    "<|im_start|>user\nWhat is <|endoftext|>?<|im_end|>\n",
    "x=1,y=22,z=333,w=4444 3.14159 1e-5 $9.99",
    "naïve café Ünïcödé ǅ ß \u00a0nbsp\u200bzero-width \x00 nul",
    "",
    " ",
    "a",
]
VERSIONS = dict(transformers=transformers.__version__, tokenizers=tokenizers.__version__)


def write(name, content):
    (here / name).write_text(json.dumps(dict(versions=VERSIONS, **content), indent=1, ensure_ascii=False) + "\n")


smollm2 = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
cases = []
for text in TEXTS:
    ids = smollm2(text, add_special_tokens=True).input_ids
    cases.append(dict(text=text, ids=ids, decoded=smollm2.decode(ids),
                      decoded_without_special_tokens=smollm2.decode(ids, skip_special_tokens=True)))
turns = [dict(role="user", content="Name three rivers."), dict(role="assistant", content="Rhine, Nile, Amazon."),
         dict(role="user", content="One more?")]
chat = dict(messages=turns, text=smollm2.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
            ids=smollm2.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
write("tokenizer_smollm2.json", dict(cases=cases, chat=chat))


def trained(pre, special, size, normalizer=None, alphabet=()):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=list(alphabet),
                                  show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(state["vocab"].items(), key=lambda item: item[1])]
    return tokens, [" ".join(pair) for pair in state["merges"]]


def small(name, architecture, arrays, texts):
    backend, _ = convert_gguf_tokenizer(architecture, arrays)
    rows = []
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        rows.append(dict(text=text, ids=ids, decoded=backend.decode(ids, skip_special_tokens=False)))
    return dict(name=name, arrays=arrays, cases=rows)


def byte_level(name, split):
    pre = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), behavior="isolated"),
                                   pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokens, merges = trained(pre, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 700,
                             alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    arrays = dict(tokenizer_type="gpt2", pre_tokenizer_type=name, tokens=tokens, merges=merges,
                  token_type=[3, 3, 3] + [1] * (len(tokens) - 3))
    return small(name, "llama", arrays, TEXTS)


def sentence_piece():
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    to_blocks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Cut at words for training only: the conversion must find the merges again out of the scores alone.
    pre = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tokens, _ = trained(pre, special, 600, normalizer=to_blocks)
    # Characters that are rare stay out, so that bytes must stand in for them.
    tokens = [token for token in tokens if not set(token) & set("🙂🙃👩语語ह✓ǅ")]
    scores = [0.0] * len(special) + [-float(i) for i in range(len(tokens) - len(special))]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - len(special))
    arrays = dict(tokenizer_type="llama", pre_tokenizer_type="default", tokens=tokens, scores=scores,
                  token_type=types)
    # Architecture phi3: the prefix space as a normalizer, which is how Llama 2's own tokenizer.json has it.
    return small("spm", "phi3", arrays, [text for text in TEXTS if text.strip()])


write("tokenizer_small.json",
      dict(tokenizers=[byte_level("llama-bpe", _LLAMA3_SPLIT), byte_level("qwen2", _QWEN2_SPLIT), sentence_piece()]))

"""Tokens of dialogues and of prompts with completions, as transformers and TRL make them, for every kind of tokenizer.

usage: chat_tokens.py

Trains tiny tokenizers here (the trainers have no randomness): byte-level BPE with and without a prefix space and with a
split pattern, BPE behind Llama 2's normaliser with byte fallback, BPE behind Metaspace (first, always, never), Unigram and
WordPiece. For each tokenizer, chat template and dialogue it writes the ids of the whole rendered text and the ranges that a
model learns. A range begins where the ids of the text before it end (TRL's difference of lengths); where these ids are not
the beginning of the whole ids, the range is taken from the offsets and the case is marked `"agrees": false`. TRL's trainer is
not imported: `pair` repeats what its `tokenize_fn` and `add_eos` compute for a prompt-completion record.

Writes chat_tokens.json. Printed with transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6.
"""
import itertools
import json
import pathlib
import tempfile

import jinja2
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

here = pathlib.Path(__file__).parent
CORPUS = [
    "Hello there. How are you today? I am well, thank you.",
    "The capital of France is Paris. The capital of Italy is Rome.",
    "user assistant system [INST] [/INST] <think> </think> model",
    "naïve café, x = 12 + 345; don't they'll go?\n\nNew lines\nand  two  spaces",
    "See you. Bye! Hi yes no 日本",
] * 3 + ["a\n\n"] * 40
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|user|>", "<|assistant|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def added(tokenizer):
    # As Phi-3's: the token takes the white space behind it.
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True, normalized=False)])


def bos(tokenizer):
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])


def byte_level(prefix, split=None):
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
    parts = [pre_tokenizers.Split(Regex(split), behavior="isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, level]) if parts else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def with_bytes(trained, **model):
    """A BPE model over the trained tokens and a token for each byte, without the rare characters."""
    state = json.loads(trained.to_str())["model"]
    rare = set("日本ï")
    kept = [token for token, _ in sorted(state["vocab"].items(), key=lambda item: item[1]) if not set(token) & rare]
    vocab = {token: i for i, token in enumerate(SPECIAL + BYTES + [t for t in kept if t not in SPECIAL])}
    merges = [tuple(pair) for pair in state["merges"] if not set("".join(pair)) & rare]
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **model))


def sentence_piece(setup):
    """BPE over words that begin with "▁", trained once; `setup` puts the "▁" there."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=190, special_tokens=SPECIAL, show_progress=False))
    tokenizer = with_bytes(tokenizer)
    setup(tokenizer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(SPECIAL)
    bos(tokenizer)
    return tokenizer


def llama2(tokenizer):
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def metaspace(scheme, split):
    def setup(tokenizer):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return setup


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False))
    bos(tokenizer)
    return tokenizer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=SPECIAL + ["[CLS]", "[SEP]"], show_progress=False))
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]")))
    return tokenizer


LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")
TOKENIZERS = dict(
    bytes=byte_level(False), bytes_prefix=byte_level(True), bytes_split=byte_level(False, LLAMA3_SPLIT),
    llama2=sentence_piece(llama2), first=sentence_piece(metaspace("first", False)),
    always=sentence_piece(metaspace("always", False)), never=sentence_piece(metaspace("never", False)),
    always_split=sentence_piece(metaspace("always", True)), unigram=unigram(), word_piece=word_piece(),
)
for tokenizer in TOKENIZERS.values():
    added(tokenizer)

TURNS = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}"
TEMPLATES = dict(
    llama2=TURNS + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    zephyr=TURNS + "<|{{ m.role }}|>\n{{ m.content + eos_token + '\n' }}{% endfor %}" + OPEN + "{{ '<|assistant|>\n' }}{% endif %}",
    chatml=TURNS + "<|im_start|>{{ m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}"
    + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Content right behind a special token.
    glued=TURNS + "<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    + OPEN + "<|assistant|>{% endif %}",
    # As Phi-3's: another token ends a turn, and the end token ends the dialogue.
    phi3=TURNS + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    + OPEN + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    # As Qwen3's: thoughts in the last response only.
    qwen3=TURNS + "<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m.content + eos_token + '\n' }}{% endfor %}" + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    # As DeepSeek-R1's: the generation prompt opens thoughts, and the dialogue has none.
    r1="{{ bos_token }}" + TURNS + "<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}" + OPEN + "{{ '<|assistant|><think>\n' }}{% endif %}",
    # With the block that marks the assistant's text.
    marked=TURNS + "<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}",
)
REWRITES = {"qwen3"}


def turns(*contents):
    return [dict(role=role, content=content) for role, content in zip(itertools.cycle(["user", "assistant"]), contents)]


DIALOGUES = [
    turns("Hi", "Hello there."),
    turns("Hi", "Hello there.", "Bye", "See you."),
    turns("don't", " naïve 日本", "x = 12", "\nNew lines", "café?", "<think>\nno\n</think>yes"),
]
PAIRS = [
    ("The capital of France is", " Paris."), ("The capital of France is ", "Paris."), ("How", "ever"), ("Q: 12", "345"),
    ("New lines\n\n", "and two"), ("New lines\n", "\nand two"), ("Answer:", " Yo</s>"), ("日", "本"), ("[INST] Hi [/INST]", "Hello"),
]
TEXTS = ["Answer: Yo</s>", "Answer: Yo", "Hello</s> there."]


def loaded(tokenizer, template=None):
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def front(tok):
    framed, bare = tok("a").input_ids, tok("a", add_special_tokens=False).input_ids
    at = next(i for i in range(len(framed)) if framed[i:i + len(bare)] == bare)
    return framed[:at]


def ids(tok, text):
    return tok(text, add_special_tokens=False).input_ids


def begin(tok, text, whole, at):
    """Index of the token at which the text from character `at` on begins, and whether TRL's difference of lengths agrees."""
    before = ids(tok, text[:at])
    if whole[:len(before)] == before:
        return len(before), True
    # The crate's offsets without the post-processor, which trims white space.
    plain = Tokenizer.from_str(tok.backend_tokenizer.to_str())
    plain.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    spans = plain.encode(text, add_special_tokens=False).offsets
    return next((i for i, (a, b) in enumerate(spans) if not (a < at and b <= at)), len(spans)), False


def cut(text):
    """The rendered text up to its end token; white space behind it is no part of the response."""
    return text.rstrip()


def chat(name, tok, template, messages):
    render = lambda turns, **kw: tok.apply_chat_template(turns, tokenize=False, **kw)
    text = cut(render(messages))
    whole = ids(tok, text)
    # What transformers makes of the dialogue begins with it.
    assert tok.apply_chat_template(messages, return_dict=False)[:len(whole)] == whole, (name, template)
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if template in REWRITES and len(places) > 1:
        places = places[-1:]
    ranges, agrees = [], True
    if template == "marked":
        _, marks = render_jinja_template([messages], chat_template=tok.chat_template, return_assistant_tokens_mask=True,
                                         bos_token="<s>", eos_token="</s>")
        spans = marks[0]
    else:
        spans = []
        for i in places:
            opening = render(messages[:i], add_generation_prompt=True)
            if template == "r1":
                opening = opening.removesuffix("<think>\n")
            closed = cut(render(messages[:i + 1]))
            if template == "phi3" and i < len(messages) - 1:
                closed = closed.removesuffix("</s>")
            assert text.startswith(opening) and text.startswith(closed), (template, opening, closed, text)
            spans.append((len(opening), len(closed)))
    for a, b in spans:
        first, one = begin(tok, text, whole, a)
        last, _ = begin(tok, text, whole, b)
        ranges.append([first, last])
        agrees &= one
    return dict(tokenizer=name, template=template, ids=whole, learnt=ranges, agrees=agrees)


def pair(name, tok, prompt, completion):
    completion = completion if completion.endswith("</s>") else completion + "</s>"
    whole = ids(tok, prompt + completion)
    first, agrees = begin(tok, prompt + completion, whole, len(prompt))
    before = front(tok)
    return dict(tokenizer=name, prompt=prompt, ids=before + whole, begin=len(before) + first, agrees=agrees)


def generation():
    """Templates with the block, and what transformers' own renderer marks."""
    bodies = [
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n",
        "{%- generation -%}\n  {{ m.content }}  \n{%- endgeneration -%}\n",
        "    {% generation %}\n    {{ m.content }}\n    {% endgeneration %}\nafter",
        "{{ '\n' }}{% generation %}{% if loop.last %}last {% endif %}{{ m.content | trim }}{% endgeneration %} {{ eos_token }}",
        "a {%- generation %} b {{ m.content }} {%- endgeneration %} c",
        "{% generation %}{% endgeneration %}{{ m.content }}",
    ]
    rows = []
    for body in bodies:
        template = TURNS + "{% if m.role == 'assistant' %}" + body + "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
        for messages in (DIALOGUES[1], turns("Grüße 日本", " é ")):
            texts, marks = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=True,
                                                 bos_token="<s>", eos_token="</s>")
            marked = [texts[0][a:b] for a, b in marks[0]]
            rows.append(dict(template=template, messages=messages, text=texts[0], marked=[m for m in marked if m]))
    return rows


def added_ends():
    """`add_bos_token` and `add_eos_token` of tokenizer_config.json: transformers 5 leaves a tokenizer.json as it is."""
    rows = []
    processor = {
        "none": None, "bos": "<s> $A", "bos_eos": "<s> $A </s>",
    }
    for kind, single in processor.items():
        tokenizer = Tokenizer.from_str(TOKENIZERS["bytes"].to_str())
        tokenizer.post_processor = None if single is None else processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
        for bos_key, eos_key in itertools.product([None, True, False], repeat=2):
            with tempfile.TemporaryDirectory() as folder:
                folder = pathlib.Path(folder)
                tokenizer.save(str(folder / "tokenizer.json"))
                config = dict(bos_token="<s>", eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast")
                config |= {key: value for key, value in (("add_bos_token", bos_key), ("add_eos_token", eos_key))
                           if value is not None}
                (folder / "tokenizer_config.json").write_text(json.dumps(config))
                read = AutoTokenizer.from_pretrained(folder)
                rows.append(dict(processor=single, config=config, ids=read("Hello").input_ids))
    return rows


result = dict(
    versions=dict(transformers=transformers.__version__, tokenizers=tokenizers.__version__, jinja2=jinja2.__version__),
    templates=TEMPLATES, dialogues=DIALOGUES,
    tokenizers={name: json.loads(t.to_str()) for name, t in TOKENIZERS.items()},
    chats=[], pairs=[], texts=[], generation=generation(), added=added_ends(),
)
for name, tokenizer in TOKENIZERS.items():
    for template, source in TEMPLATES.items():
        tok = loaded(tokenizer, source)
        for number, messages in enumerate(DIALOGUES):
            result["chats"].append(dict(dialogue=number, **chat(name, tok, template, messages)))
    tok = loaded(tokenizer)
    result["pairs"] += [dict(completion=completion, **pair(name, tok, prompt, completion)) for prompt, completion in PAIRS]
    for text in TEXTS:
        ended = text if text.endswith("</s>") else text + "</s>"
        result["texts"].append(dict(tokenizer=name, text=text, ids=front(tok) + ids(tok, ended)))

lines = []
for key, value in result.items():
    if isinstance(value, list):
        rows = ",\n  ".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in value)
        lines.append(f"{json.dumps(key)}: [\n  {rows}\n ]")
    else:
        rows = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, separators=(',', ':'))}" for k, v in value.items()) \
            if isinstance(value, dict) else json.dumps(value)
        lines.append(f"{json.dumps(key)}: {{\n  {rows}\n }}")
(here / "chat_tokens.json").write_text("{\n " + ",\n ".join(lines) + "\n}\n")

"""The quickstart's task: reviews of places in a small town, with a gold rule that is known and so can be checked.

Everything is a function of src/quickstart/assets/grammar.json and a 64-bit seed through splitmix64, so that src/quickstart
draws the very same texts. Uses no library randomness and no set or dictionary order. make_base.py reads `documents`;
tests/golden/quickstart_task.py prints what the Rust side is compared with.
"""
import json
import re
from pathlib import Path

GRAMMAR = json.loads((Path(__file__).resolve().parents[3] / "src/quickstart/assets/grammar.json").read_text())
KINDS = GRAMMAR["kinds"]
CHANCES = GRAMMAR["chances"]
TONES = ("good", "bad", "mixed")
MASK = (1 << 64) - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15

# One stream of random numbers a data set: no two share a draw. Held-out streams use the held-out combinations.
STREAM_DOCUMENTS, STREAM_SFT, STREAM_PAIRS, STREAM_PROMPTS = 1, 2, 3, 4
TRAIN, HELD_OUT = 0, 1

GOOD_WORDS = set(GRAMMAR["judging"]["good"]).union(*(domain["good"] for domain in GRAMMAR["adjectives"].values()))
BAD_WORDS = set(GRAMMAR["judging"]["bad"]).union(*(domain["bad"] for domain in GRAMMAR["adjectives"].values()))
assert not GOOD_WORDS & BAD_WORDS


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def derive(seed, *path):
    """The seed of a named stream, as `derive` in src/rng.rs."""
    h = mix((seed + GOLDEN_RATIO) & MASK)
    for step in path:
        h = mix(h ^ mix((step + GOLDEN_RATIO) & MASK))
    return h


class SplitMix64:
    """Steele, Lea and Flood 2014; as src/rng.rs."""

    def __init__(self, seed):
        self.state = seed & MASK

    def next(self):
        self.state = (self.state + GOLDEN_RATIO) & MASK
        return mix(self.state)

    def below(self, n):
        return self.next() % n

    def pick(self, items):
        return items[self.below(len(items))]

    def chance(self, percent):
        return self.below(100) < percent


# ---- sentences ----


def fill(rng, template, **given):
    """Fills {slots} from left to right: a given one with its text, any other with a draw from its table."""
    word = lambda slot: given.get(slot[1]) or rng.pick(GRAMMAR["slots"][slot[1]])  # noqa: E731
    return re.sub(r"\{(\w+)\}", word, template)


def two(rng, items):
    """Two different entries; the second draw is over one entry fewer."""
    i = rng.below(len(items))
    j = rng.below(len(items) - 1)
    return items[i], items[j + (j >= i)]


def polarity(rng, tone):
    """What one sentence of a review in this tone says: mostly the tone, sometimes the contrary or nothing."""
    good, bad = CHANCES["tone"][tone]
    x = rng.below(100)
    return "good" if x < good else "bad" if x < good + bad else "plain"


def about(rng, templates, name, aspect, said):
    """A sentence about one aspect, with adjectives of its domain."""
    noun, domain = aspect
    a, b = two(rng, GRAMMAR["adjectives"][domain][said])
    return fill(rng, rng.pick(templates), aspect=noun, name=name, a=a, b=b)


def contrast(rng, kind):
    first, second = two(rng, kind["aspects"])
    good = rng.pick(GRAMMAR["adjectives"][first[1]]["good"])
    bad = rng.pick(GRAMMAR["adjectives"][second[1]]["bad"])
    return fill(rng, rng.pick(GRAMMAR["contrasts"]), aspect=first[0], other=second[0], good=good, bad=bad)


def detail(rng, said):
    return fill(rng, rng.pick(GRAMMAR["details"][said]))


def verdict(rng, kind, name, said):
    if rng.chance(CHANCES["named_verdict"]):
        return fill(rng, GRAMMAR["named_verdicts"][said], name=name)
    return fill(rng, rng.pick(kind["verdicts"][said]))


def opening(rng, kind, place, aspect, said):
    """The first sentence. A visitor who speaks of something else says so: a reward model of this size learns to hear an
    evasion, while it does not learn to compare two nouns; the gold rule below does compare them."""
    topic = aspect if rng.chance(CHANCES["asked_aspect"]) else rng.pick(kind["aspects"])
    tables = GRAMMAR["openings" if topic == aspect else "evasions"]
    return about(rng, tables["named" if rng.chance(CHANCES["named_opening"]) else "bare"], place, topic, said)


def drafts(rng, kind, name, aspect, count):
    """Answers of one visitor that differ in their first sentence only. Visitors differ in tone, in whether they keep to
    the asked aspect and name the place, in length, in repeating themselves and in whether they come to an end: what the
    gold rule judges."""
    tone = TONES[(0, 0, 0, 1, 1, 1, 2, 2)[rng.below(8)]]
    place = name if rng.chance(CHANCES["asked_name"]) else rng.pick(kind["names"])
    said = polarity(rng, tone)
    openings = [opening(rng, kind, place, aspect, said) for _ in range(count)]
    rest = []
    for _ in range((0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3)[rng.below(16)]):
        said = polarity(rng, tone)
        x = rng.below(10)
        if x < 4:
            rest.append(detail(rng, said))
        elif x < 8:
            rest.append(about(rng, GRAMMAR["follow_ups"], place, rng.pick(kind["aspects"]), said))
        elif x < 9 or not rest:
            rest.append(contrast(rng, kind))
        else:
            rest.append(rest[-1])
    if rng.chance(CHANCES["verdict"]):
        rest.append(verdict(rng, kind, place, polarity(rng, tone)))
    lost = 1 + rng.below(6) if rng.chance(CHANCES["cut_off"]) else 0
    return [cut(" ".join([first, *rest]), lost) for first in openings]


def cut(text, lost):
    """An answer as it follows `Assistant:`; without its last `lost` words and the stop, it breaks off."""
    if lost:
        words = text.split(" ")
        text = " ".join(words[: max(3, len(words) - lost)]).rstrip(".,")
    return " " + text


def answer(rng, kind, name, aspect):
    return drafts(rng, kind, name, aspect, 1)[0]


# ---- prompts ----


def wrap(question):
    """The dialogue format of the base's chat template, up to where the answer begins."""
    return "\n\nHuman: " + question + "\n\nAssistant:"


def combinations(split):
    """(kind, name, aspect) in table order; those whose place and aspect numbers add up to a multiple of 8 (24 of 192)
    are held out: such an aspect was never asked at such a place before."""
    return [
        (kind, name, aspect)
        for kind in KINDS
        for i, name in enumerate(kind["names"])
        for j, aspect in enumerate(kind["aspects"])
        if ((i + j) % 8 == 0) == (split == HELD_OUT)
    ]


def draw_row(rng, combos):
    kind, name, aspect = rng.pick(combos)
    question = fill(rng, rng.pick(GRAMMAR["questions"]), aspect=aspect[0], name=name)
    return {"prompt": wrap(question), "kind": kind["kind"], "name": name, "aspect": aspect[0]}, (kind, name, aspect)


# ---- the gold rule ----


def gold(row, text, ended=True):
    """3 x mean sentence polarity + 2 if the first sentence has the asked aspect + 2 if the asked place is named and no
    other is + 2 if well formed (ended by the model, by a full stop; 2 to 4 sentences; 12 to 40 words) - 1 a
    repetition."""
    sentences = [s.strip(" \n") for s in text.split(".")[:-1]]
    words = re.findall("[A-Za-z]+", text)
    judged = 0
    for sentence in sentences:
        found = re.findall("[A-Za-z]+", sentence)
        balance = sum(w in GOOD_WORDS for w in found) - sum(w in BAD_WORDS for w in found)
        judged += (balance > 0) - (balance < 0)
    mean = judged / len(sentences) if sentences else 0.0
    aspect = int(bool(sentences) and row["aspect"] in re.findall("[A-Za-z]+", sentences[0]))
    place = int([name for kind in KINDS for name in kind["names"] if name in text] == [row["name"]])
    form = int(ended and text.rstrip(" \n").endswith(".") and 2 <= len(sentences) <= 4 and 12 <= len(words) <= 40)
    judging = [w for w in words if w in GOOD_WORDS or w in BAD_WORDS]
    repeats = len(sentences) - len(set(sentences)) + len(judging) - len(set(judging))
    total = 3.0 * mean + 2.0 * aspect + 2.0 * place + 2.0 * form - repeats
    return {"total": total, "polarity": mean, "aspect": aspect, "place": place, "form": form, "repeats": repeats}


# ---- data sets ----


def sft_rows(seed, n, split=TRAIN):
    rng, combos, rows = SplitMix64(derive(seed, STREAM_SFT, split)), combinations(split), []
    for _ in range(n):
        row, combo = draw_row(rng, combos)
        rows.append({**row, "response": answer(rng, *combo)})
    return rows


def pairs(seed, n, flip_percent, split):
    """Two answers to one prompt, the better by the gold rule chosen, `flip_percent` of the labels wrong. Some are by
    two visitors, some two drafts by one, which tell apart what the tone would drown: the asked aspect and the place's
    name. Pairs less than one point apart are drawn again: annotators are shown clear cases."""
    rng, combos, out = SplitMix64(derive(seed, STREAM_PAIRS, split)), combinations(split), []
    while len(out) < n:
        row, combo = draw_row(rng, combos)
        if rng.chance(CHANCES["two_drafts"]):
            first, second = drafts(rng, *combo, 2)
        else:
            first, second = answer(rng, *combo), answer(rng, *combo)
        lead = gold(row, first)["total"] - gold(row, second)["total"]
        if abs(lead) < 1.0:
            continue
        better, worse = (first, second) if lead > 0.0 else (second, first)
        flipped = rng.chance(flip_percent)
        chosen, rejected = (worse, better) if flipped else (better, worse)
        out.append({**row, "chosen": chosen, "rejected": rejected, "clean": not flipped})
    return out


def prompts(seed, n, split):
    rng, combos = SplitMix64(derive(seed, STREAM_PROMPTS, split)), combinations(split)
    return [draw_row(rng, combos)[0] for _ in range(n)]


# ---- pretraining text ----


def document(rng, combos):
    """A review under a heading (tone even, every named aspect treated), loose sentences, or small talk as dialogue.
    A third of the reviews close with tags: the aspects and, where the text names it, the place. Nothing here answers a
    question about an aspect, so held-out questions stay held out; a review may treat a held-out aspect in passing."""
    kind, name, aspect = rng.pick(combos)
    x = rng.below(100)
    if x < CHANCES["document"]["review"]:
        return review(rng, kind, name, aspect)
    if x < CHANCES["document"]["review"] + CHANCES["document"]["loose"]:
        return " ".join(loose_sentence(rng, kind, name) for _ in range(2 + rng.below(4)))
    talk = rng.pick(GRAMMAR["small_talk"])
    return wrap(fill(rng, talk["question"], name=name)) + " " + fill(rng, rng.pick(talk["answers"]), name=name)


def review(rng, kind, name, aspect):
    topics = [aspect]
    for _ in range(rng.below(3)):
        more = rng.pick(kind["aspects"])
        if more not in topics:
            topics.append(more)
    heading = fill(rng, rng.pick(GRAMMAR["headings"]), aspects=" and the ".join(t[0] for t in topics), name=name)
    tone, out = TONES[rng.below(3)], []
    tables = (GRAMMAR["openings"]["named"], GRAMMAR["openings"]["bare"], GRAMMAR["follow_ups"])
    for topic in topics:
        said = polarity(rng, tone)
        out.append(about(rng, rng.pick(tables), name, topic, said))
        if rng.chance(33):
            out.append(detail(rng, polarity(rng, tone)))
    if rng.chance(50):
        out.append(verdict(rng, kind, name, polarity(rng, tone)))
    body = " ".join(out)
    if rng.chance(33):
        tags = [t[0] for t in topics] + ([name] if name in body else [])
        return heading + body + "\n\nTags: " + ", ".join(tags) + "."
    return heading + body


def loose_sentence(rng, kind, name):
    said = ("good", "bad", "plain")[rng.below(3)]
    x = rng.below(7)
    if x == 0:
        return detail(rng, said)
    if x == 1:
        return verdict(rng, kind, name, said)
    if x == 2:
        return contrast(rng, kind)
    evasions = GRAMMAR["evasions"]
    tables = (GRAMMAR["openings"]["named"], GRAMMAR["follow_ups"], evasions["named"], evasions["bare"])
    return about(rng, tables[x - 3], name, rng.pick(kind["aspects"]), said)


def document_stream(seed):
    """Endless documents."""
    rng, combos = SplitMix64(derive(seed, STREAM_DOCUMENTS)), combinations(TRAIN)
    while True:
        yield document(rng, combos)


def documents(seed, n):
    stream = document_stream(seed)
    return [next(stream) for _ in range(n)]

//! The quickstart's data sets: questions about an aspect of a place, visitors' answers, preference pairs. Every row is a
//! function of the grammar and a 64-bit seed, and src/quickstart/python/task.py generates the same rows. It does not depend on
//! the model or on the training stages. Read `gold.rs` for the rule that scores answers.

use serde::Serialize;

use super::answer::Writer;
use super::gold::gold;
use super::grammar::{Aspect, Kind, grammar};
use crate::rng::derive;

pub(super) const STREAM_DOCUMENTS: u64 = 1;
const STREAM_SFT: u64 = 2;
const STREAM_PAIRS: u64 = 3;
const STREAM_PROMPTS: u64 = 4;

/// A split of the combinations of place and aspect. The two splits have no question in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// 168 of 192, for every stage's training.
    Train,
    /// 24 of 192, for evaluation.
    HeldOut,
}

impl Split {
    fn stream(self) -> u64 {
        match self {
            Split::Train => 0,
            Split::HeldOut => 1,
        }
    }
}

/// A question with the facts that the gold rule needs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The question rendered by the base's chat template: `\n\nHuman: …\n\nAssistant:`.
    pub prompt: String,
    /// `cafe`, `inn` or `theatre`.
    pub kind: &'static str,
    /// The asked place.
    pub name: &'static str,
    /// The asked aspect, one lower-case word.
    pub aspect: &'static str,
}

impl Row {
    /// The question alone, for a `messages` record.
    pub fn question(&self) -> &str {
        self.prompt.strip_prefix(OPEN).and_then(|rest| rest.strip_suffix(CLOSE)).unwrap_or(&self.prompt)
    }
}

/// A demonstration.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SftRow {
    /// The question.
    #[serde(flatten)]
    pub row: Row,
    /// A visitor's answer. It starts with a space and has no end token.
    pub response: String,
}

/// A comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pair {
    /// The question.
    #[serde(flatten)]
    pub row: Row,
    /// The answer labelled better; starts with a space.
    pub chosen: String,
    /// The answer labelled worse; starts with a space.
    pub rejected: String,
    /// Whether the gold rule agrees with the label.
    pub clean: bool,
}

#[derive(Clone, Copy)]
pub(super) struct Combination {
    pub(super) kind: &'static Kind,
    pub(super) name: &'static str,
    pub(super) aspect: &'static Aspect,
}

const OPEN: &str = "\n\nHuman: ";
const CLOSE: &str = "\n\nAssistant:";

pub(super) fn wrap(question: &str) -> String {
    format!("{OPEN}{question}{CLOSE}")
}

/// The combinations of a split in table order. Held out are those whose indices of place and aspect add up to a multiple of
/// 8.
pub(super) fn combinations(split: Split) -> Vec<Combination> {
    let mut out = Vec::new();
    for kind in &grammar().kinds {
        for (i, name) in kind.names.iter().enumerate() {
            for (j, aspect) in kind.aspects.iter().enumerate() {
                if ((i + j) % 8 == 0) == (split == Split::HeldOut) {
                    out.push(Combination { kind, name, aspect });
                }
            }
        }
    }
    out
}

/// A stream of questions with the generator of their answers.
struct Source {
    writer: Writer,
    combos: Vec<Combination>,
}

impl Source {
    fn new(seed: u64, stream: u64, split: Split) -> Self {
        Self { writer: Writer::new(derive(seed, &[stream, split.stream()])), combos: combinations(split) }
    }

    fn row(&mut self) -> (Row, Combination) {
        let combo = *self.writer.pick(&self.combos);
        let template = self.writer.pick(&self.writer.grammar.questions);
        let question = self.writer.fill(template, &[("aspect", &combo.aspect.0), ("name", combo.name)]);
        let row =
            Row { prompt: wrap(&question), kind: &combo.kind.kind, name: combo.name, aspect: combo.aspect.0.as_str() };
        (row, combo)
    }

    fn answer(&mut self, combo: Combination) -> String {
        self.writer.answer(combo.kind, combo.name, combo.aspect)
    }
}

/// The first `n` demonstrations of a seed.
pub fn sft_rows(seed: u64, n: usize, split: Split) -> Vec<SftRow> {
    let mut source = Source::new(seed, STREAM_SFT, split);
    let next = |_| {
        let (row, combo) = source.row();
        SftRow { row, response: source.answer(combo) }
    };
    (0..n).map(next).collect()
}

/// The first `n` comparisons of a seed: two answers, of which the one with the higher gold score is chosen, with
/// `flip_percent` of the labels wrong. Some pairs are two drafts by one visitor, which isolate the asked aspect and the
/// place's name from the tone. Pairs whose scores differ by less than one point are drawn again.
pub fn pairs(seed: u64, n: usize, flip_percent: usize, split: Split) -> Vec<Pair> {
    let mut source = Source::new(seed, STREAM_PAIRS, split);
    let mut out = Vec::with_capacity(n);
    while out.len() < n {
        let (row, combo) = source.row();
        let Combination { kind, name, aspect } = combo;
        let [first, second] = if source.writer.chance(grammar().chances.two_drafts) {
            source.writer.drafts(kind, name, aspect)
        } else {
            [source.answer(combo), source.answer(combo)]
        };
        let lead = gold(&row, &first, true).total - gold(&row, &second, true).total;
        if lead.abs() < 1.0 {
            continue;
        }
        let (better, worse) = if lead > 0.0 { (first, second) } else { (second, first) };
        let flipped = source.writer.chance(flip_percent);
        let (chosen, rejected) = if flipped { (worse, better) } else { (better, worse) };
        out.push(Pair { row, chosen, rejected, clean: !flipped });
    }
    out
}

/// The first `n` questions of a seed, for PPO (train) or the evaluation (held out).
pub fn prompts(seed: u64, n: usize, split: Split) -> Vec<Row> {
    let mut source = Source::new(seed, STREAM_PROMPTS, split);
    (0..n).map(|_| source.row().0).collect()
}

#[cfg(test)]
mod tests {
    use super::super::document::documents;
    use super::super::gold::Gold;
    use super::*;
    use serde_json::{Value, json};

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/golden/quickstart_task.json")).unwrap()
    }

    fn fnv1a(lines: impl Iterator<Item = String>) -> String {
        let mut hash: u64 = 0xCBF2_9CE4_8422_2325;
        for line in lines {
            for byte in line.bytes().chain([b'\n']) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
            }
        }
        format!("{hash:016x}")
    }

    fn row_line(row: &Row) -> String {
        [&row.prompt, row.kind, row.name, row.aspect].join("|")
    }

    fn sft_line(x: &SftRow) -> String {
        let Gold { total, polarity, aspect, place, form, repeats } = gold(&x.row, &x.response, true);
        let judged = format!("{total:.6} {polarity:.6} {aspect} {place} {form} {repeats}");
        [row_line(&x.row), x.response.clone(), judged].join("|")
    }

    fn pair_line(x: &Pair) -> String {
        let label = if x.clean { "clean" } else { "flipped" };
        [&row_line(&x.row), &x.chosen, &x.rejected, label].join("|")
    }

    /// Compares the first rows, for a readable difference, then the hash over thousands of rows.
    fn agree<T: Serialize>(what: &str, golden: &Value, shown: &[T], hash: String) {
        let expected = golden[what].as_array().unwrap();
        assert!(!expected.is_empty());
        assert_eq!(json!(shown[..expected.len()]), golden[what], "{what}");
        assert_eq!(json!(hash), golden[format!("{what}_hash")], "{what}");
    }

    #[test]
    fn texts_rows_pairs_prompts_and_gold_scores_match_the_python_generator() {
        let golden = golden();
        let (n, flips) =
            (golden["hashed"].as_u64().unwrap() as usize, golden["flip_percent"].as_u64().unwrap() as usize);
        for entry in golden["seeds"].as_array().unwrap() {
            let seed = entry["seed"].as_str().unwrap().parse().unwrap();
            let texts = documents(seed, n);
            agree("documents", entry, &texts, fnv1a(texts.iter().cloned()));
            let rows = sft_rows(seed, n, Split::Train);
            let judged: Vec<Value> = rows
                .iter()
                .map(|x| {
                    let mut value = json!(x);
                    value["gold"] = json!(gold(&x.row, &x.response, true));
                    value
                })
                .collect();
            agree("sft", entry, &judged, fnv1a(rows.iter().map(sft_line)));
            for (split, label) in [(Split::Train, "train"), (Split::HeldOut, "held_out")] {
                let compared = pairs(seed, n, flips, split);
                agree("pairs", &entry[label], &compared, fnv1a(compared.iter().map(pair_line)));
                let asked = prompts(seed, n, split);
                agree("prompts", &entry[label], &asked, fnv1a(asked.iter().map(row_line)));
            }
        }
    }

    #[test]
    fn gold_rule_matches_python_on_incomplete_repetitive_and_off_topic_texts() {
        let golden = golden();
        let row = &prompts_like(&golden["odd_row"]);
        for case in golden["odd_texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let judged = gold(row, text, case["ended"].as_bool().unwrap());
            assert_eq!(json!(judged), case["gold"], "{text:?}");
        }
    }

    /// The grammar's own row for a golden one: names and aspects are borrowed from the tables.
    fn prompts_like(golden: &Value) -> Row {
        let fits = |c: &&Combination| golden["name"] == c.name && golden["aspect"] == c.aspect.0.as_str();
        let all = [combinations(Split::Train), combinations(Split::HeldOut)].concat();
        let combo = *all.iter().find(fits).unwrap();
        let prompt = golden["prompt"].as_str().unwrap().to_owned();
        Row { prompt, kind: &combo.kind.kind, name: combo.name, aspect: &combo.aspect.0 }
    }

    #[test]
    fn held_out_questions_are_not_in_the_training_data() {
        let key = |row: &Row| (row.name, row.aspect);
        let held: std::collections::HashSet<_> = prompts(5, 2000, Split::HeldOut).iter().map(key).collect();
        assert_eq!(held.len(), 24);
        assert_eq!((combinations(Split::Train).len(), combinations(Split::HeldOut).len()), (168, 24));
        assert!(sft_rows(5, 2000, Split::Train).iter().all(|x| !held.contains(&key(&x.row))));
        assert!(pairs(5, 500, 15, Split::Train).iter().all(|x| !held.contains(&key(&x.row))));
        assert!(prompts(5, 2000, Split::Train).iter().all(|x| !held.contains(&key(x))));
    }

    #[test]
    fn flip_percent_is_the_share_of_labels_against_the_gold_rule() {
        let compared = pairs(9, 2000, 15, Split::Train);
        for x in &compared {
            let lead = gold(&x.row, &x.chosen, true).total - gold(&x.row, &x.rejected, true).total;
            assert!(if x.clean { lead >= 1.0 } else { lead <= -1.0 }, "{lead} {x:?}");
        }
        let flipped = compared.iter().filter(|x| !x.clean).count() as f64 / 2000.0;
        assert!((flipped - 0.15).abs() < 0.032, "{flipped}"); // four deviations of a binomial share
        assert!(pairs(9, 300, 0, Split::Train).iter().all(|x| x.clean));
    }

    #[test]
    fn question_is_the_text_between_the_prompt_markers() {
        let row = &prompts(1, 1, Split::Train)[0];
        assert_eq!(wrap(row.question()), row.prompt);
        assert!(row.question().contains(row.name) && row.question().contains(row.aspect));
    }
}

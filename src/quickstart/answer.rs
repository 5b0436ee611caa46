//! Generates the task's sentences and visitors' answers from the grammar. The order of random draws must equal that of
//! src/quickstart/python/task.py; tests/golden/quickstart_task.json compares the two. It does not depend on the gold rule. Read
//! `task.rs` next.

use super::grammar::{Aspect, Grammar, Kind, Polarity, grammar};
use crate::rng::SplitMix64;

/// Tone of one visitor.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tone {
    Good,
    Bad,
    Mixed,
}

/// A text generator: the grammar plus the random stream it draws from.
pub(super) struct Writer {
    rng: SplitMix64,
    pub(super) grammar: &'static Grammar,
}

impl Writer {
    pub(super) fn new(seed: u64) -> Self {
        Self { rng: SplitMix64::new(seed), grammar: grammar() }
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        self.rng.below(n)
    }

    pub(super) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// Picks two different entries; the second draw is over one entry fewer.
    fn two<'a, T>(&mut self, items: &'a [T]) -> (&'a T, &'a T) {
        let i = self.below(items.len());
        let j = self.below(items.len() - 1);
        (&items[i], &items[j + usize::from(j >= i)])
    }

    /// Fills `{slots}` from left to right: a given one with its text, any other with a draw from its table.
    pub(super) fn fill(&mut self, template: &str, given: &[(&str, &str)]) -> String {
        let mut out = String::with_capacity(template.len() + 16);
        let mut rest = template;
        while let Some((before, (slot, after))) =
            rest.split_once('{').and_then(|(before, tail)| Some((before, tail.split_once('}')?)))
        {
            out.push_str(before);
            match given.iter().find(|(name, _)| *name == slot) {
                Some((_, text)) => out.push_str(text),
                None => {
                    let table = self.grammar.slot(slot);
                    let word: &String = self.pick(table);
                    out.push_str(word);
                }
            }
            rest = after;
        }
        out.push_str(rest);
        out
    }

    /// Draws the polarity of one sentence of a review in this tone: mostly the tone's, sometimes the opposite or plain.
    pub(super) fn polarity(&mut self, tone: Tone) -> Polarity {
        let tones = &self.grammar.chances.tone;
        let [good, bad] = match tone {
            Tone::Good => tones.good,
            Tone::Bad => tones.bad,
            Tone::Mixed => tones.mixed,
        };
        let x = self.below(100);
        if x < good {
            Polarity::Good
        } else if x < good + bad {
            Polarity::Bad
        } else {
            Polarity::Plain
        }
    }

    /// A sentence about one aspect, with adjectives of its domain.
    pub(super) fn about(&mut self, templates: &[String], name: &str, aspect: &Aspect, polarity: Polarity) -> String {
        let (a, b) = self.two(self.grammar.adjectives.of(aspect.1).of(polarity));
        let template = self.pick(templates);
        self.fill(template, &[("aspect", &aspect.0), ("name", name), ("a", a), ("b", b)])
    }

    /// A sentence that praises one aspect and blames another.
    pub(super) fn contrast(&mut self, kind: &Kind) -> String {
        let (first, second) = self.two(&kind.aspects);
        let good = self.pick(self.grammar.adjectives.of(first.1).of(Polarity::Good));
        let bad = self.pick(self.grammar.adjectives.of(second.1).of(Polarity::Bad));
        let template = self.pick(&self.grammar.contrasts);
        self.fill(template, &[("aspect", &first.0), ("other", &second.0), ("good", good), ("bad", bad)])
    }

    /// A sentence about the visit.
    pub(super) fn detail(&mut self, polarity: Polarity) -> String {
        let template = self.pick(self.grammar.details.of(polarity));
        self.fill(template, &[])
    }

    /// A closing sentence.
    pub(super) fn verdict(&mut self, kind: &Kind, name: &str, polarity: Polarity) -> String {
        if self.chance(self.grammar.chances.named_verdict) {
            return self.fill(self.grammar.named_verdicts.of(polarity), &[("name", name)]);
        }
        let template = self.pick(kind.verdicts.of(polarity));
        self.fill(template, &[])
    }

    /// The first sentence. A visitor who talks about another aspect says so: a reward model of this size learns to detect
    /// such an evasion, but not to compare two nouns as the gold rule does.
    fn opening(&mut self, kind: &Kind, place: &str, aspect: &Aspect, polarity: Polarity) -> String {
        let grammar = self.grammar;
        let topic = if self.chance(grammar.chances.asked_aspect) { aspect } else { self.pick(&kind.aspects) };
        let tables = if topic.0 == aspect.0 { &grammar.openings } else { &grammar.evasions };
        let table = if self.chance(grammar.chances.named_opening) { &tables.named } else { &tables.bare };
        self.about(table, place, topic, polarity)
    }

    /// One visitor's answer, starting with the space that follows `Assistant:`.
    pub(super) fn answer(&mut self, kind: &Kind, name: &str, aspect: &Aspect) -> String {
        let [answer] = self.drafts(kind, name, aspect);
        answer
    }

    /// Answers of one visitor that differ in their first sentence only. Visitors differ in what the gold rule scores: tone,
    /// the aspect and place they talk about, length, repetitions, and whether the answer is complete.
    pub(super) fn drafts<const COUNT: usize>(&mut self, kind: &Kind, name: &str, aspect: &Aspect) -> [String; COUNT] {
        const TONES: [Tone; 8] =
            [Tone::Good, Tone::Good, Tone::Good, Tone::Bad, Tone::Bad, Tone::Bad, Tone::Mixed, Tone::Mixed];
        const MIDDLE_SENTENCES: [usize; 16] = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3];
        let grammar = self.grammar;
        let chances = &grammar.chances;
        let tone = *self.pick(&TONES);
        let place = if self.chance(chances.asked_name) { name } else { self.pick(&kind.names) };
        let polarity = self.polarity(tone);
        let openings: [String; COUNT] = std::array::from_fn(|_| self.opening(kind, place, aspect, polarity));
        let mut rest: Vec<String> = Vec::new();
        for _ in 0..*self.pick(&MIDDLE_SENTENCES) {
            let polarity = self.polarity(tone);
            let next = match (self.below(10), rest.last()) {
                (0..=3, _) => self.detail(polarity),
                (4..=7, _) => {
                    let further = self.pick(&kind.aspects);
                    self.about(&grammar.follow_ups, place, further, polarity)
                }
                (9, Some(last)) => last.clone(),
                _ => self.contrast(kind),
            };
            rest.push(next);
        }
        if self.chance(chances.verdict) {
            let polarity = self.polarity(tone);
            rest.push(self.verdict(kind, place, polarity));
        }
        let lost = if self.chance(chances.cut_off) { 1 + self.below(6) } else { 0 };
        openings.map(|opening| {
            rest.insert(0, opening);
            let text = cut(&rest.join(" "), lost);
            rest.remove(0);
            text
        })
    }
}

/// An answer as it follows `Assistant:`, without its last `lost` words and final punctuation.
fn cut(text: &str, lost: usize) -> String {
    if lost == 0 {
        return format!(" {text}");
    }
    let words: Vec<&str> = text.split(' ').collect();
    let kept = words.len().saturating_sub(lost).max(3).min(words.len());
    format!(" {}", words[..kept].join(" ").trim_end_matches(['.', ',']))
}

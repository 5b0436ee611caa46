//! The tables of the quickstart's task (src/quickstart/assets/grammar.json): kinds of place, sentences, words, probabilities. It
//! does not depend on random numbers or on the gold rule. Read `answer.rs`, which draws from it, and `gold.rs`, which looks
//! words up.

use std::sync::OnceLock;

use serde::Deserialize;

/// Polarity of a sentence or of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polarity {
    /// Praise.
    Good,
    /// Blame.
    Bad,
    /// Neither.
    Plain,
}

/// One table entry per polarity.
#[derive(Debug, Deserialize)]
pub struct ByPolarity<T> {
    good: T,
    bad: T,
    plain: T,
}

impl<T> ByPolarity<T> {
    /// The entry of a polarity.
    pub fn of(&self, polarity: Polarity) -> &T {
        match polarity {
            Polarity::Good => &self.good,
            Polarity::Bad => &self.bad,
            Polarity::Plain => &self.plain,
        }
    }
}

/// A list of sentence templates or words.
pub type Lines = Vec<String>;

/// An aspect that can be asked about, with the domain of its adjectives.
#[derive(Debug, Deserialize)]
pub struct Aspect(pub String, pub Domain);

/// Domain of an aspect's adjectives.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Domain {
    /// Food and drink.
    Food,
    /// Staff.
    People,
    /// Rooms and furniture.
    Space,
    /// Plays on a stage.
    Story,
}

/// A kind of place: eight names, eight aspects, closing sentences.
#[derive(Debug, Deserialize)]
pub struct Kind {
    /// `cafe`, `inn` or `theatre`.
    pub kind: String,
    /// Names of places.
    pub names: Lines,
    /// Aspects that can be asked about at any of them.
    pub aspects: Vec<Aspect>,
    /// Closing sentences that do not name the place.
    pub verdicts: ByPolarity<Lines>,
}

/// Adjectives by domain.
#[derive(Debug, Deserialize)]
pub struct Adjectives {
    food: ByPolarity<Lines>,
    people: ByPolarity<Lines>,
    space: ByPolarity<Lines>,
    story: ByPolarity<Lines>,
}

impl Adjectives {
    /// The adjectives that fit a domain.
    pub fn of(&self, domain: Domain) -> &ByPolarity<Lines> {
        match domain {
            Domain::Food => &self.food,
            Domain::People => &self.people,
            Domain::Space => &self.space,
            Domain::Story => &self.story,
        }
    }
}

/// First sentences of an answer.
#[derive(Debug, Deserialize)]
pub struct Openings {
    /// With the place's name.
    pub named: Lines,
    /// Without it.
    pub bare: Lines,
}

/// Judging words other than adjectives.
#[derive(Debug, Deserialize)]
pub struct Judging {
    good: Lines,
    bad: Lines,
}

/// Tables for the slots that a caller does not fill.
#[derive(Debug, Deserialize)]
pub struct Slots {
    degree: Lines,
    person: Lines,
    day: Lines,
    time: Lines,
    season: Lines,
}

/// A question of the pretraining text, not about an aspect, with its answers.
#[derive(Debug, Deserialize)]
pub struct SmallTalk {
    /// The question, with a slot for the place.
    pub question: String,
    /// Answers that fit it.
    pub answers: Lines,
}

/// Percentages [good, bad] of a review's sentences, by the review's tone; the rest are plain.
#[derive(Debug, Deserialize)]
pub struct ToneChances {
    /// A pleased visitor.
    pub good: [usize; 2],
    /// A displeased visitor.
    pub bad: [usize; 2],
    /// A visitor with mixed impressions.
    pub mixed: [usize; 2],
}

/// Percentage of each sort of pretraining document; the rest is small talk.
#[derive(Debug, Deserialize)]
pub struct DocumentChances {
    /// Reviews under a heading.
    pub review: usize,
    /// Unconnected sentences.
    pub loose: usize,
}

/// Percentages of the generator.
#[derive(Debug, Deserialize)]
pub struct Chances {
    /// Good and bad sentences by tone.
    pub tone: ToneChances,
    /// The first sentence keeps to the asked aspect; otherwise it takes any of the kind (the asked one included).
    pub asked_aspect: usize,
    /// The answer is about the asked place; otherwise about any of the kind.
    pub asked_name: usize,
    /// The first sentence names the place.
    pub named_opening: usize,
    /// There is a closing sentence.
    pub verdict: usize,
    /// The closing sentence names the place.
    pub named_verdict: usize,
    /// The answer breaks off.
    pub cut_off: usize,
    /// A pair consists of two drafts by one visitor; otherwise of answers by two visitors.
    pub two_drafts: usize,
    /// Sorts of pretraining documents.
    pub document: DocumentChances,
}

/// All of grammar.json.
#[derive(Debug, Deserialize)]
pub struct Grammar {
    /// Café, inn, theatre.
    pub kinds: Vec<Kind>,
    /// Adjectives by domain and polarity.
    pub adjectives: Adjectives,
    /// First sentences about what was asked.
    pub openings: Openings,
    /// First sentences about something else, which say so.
    pub evasions: Openings,
    /// Sentences about a further aspect.
    pub follow_ups: Lines,
    /// Sentences that praise one aspect and blame another.
    pub contrasts: Lines,
    /// Sentences about the visit.
    pub details: ByPolarity<Lines>,
    /// Closing sentences that name the place.
    pub named_verdicts: ByPolarity<String>,
    judging: Judging,
    slots: Slots,
    /// Questions about an aspect.
    pub questions: Lines,
    /// Headings of pretraining reviews.
    pub headings: Lines,
    /// Dialogues of the pretraining text.
    pub small_talk: Vec<SmallTalk>,
    /// The generator's percentages.
    pub chances: Chances,
}

impl Grammar {
    /// The table of a slot that the caller does not fill; empty for an unknown slot.
    pub fn slot(&self, name: &str) -> &[String] {
        match name {
            "degree" => &self.slots.degree,
            "person" => &self.slots.person,
            "day" => &self.slots.day,
            "time" => &self.slots.time,
            "season" => &self.slots.season,
            _ => &[],
        }
    }

    /// Polarity of a word, case-sensitive. A linear scan is fast enough for about sixty words.
    pub fn judges(&self, word: &str) -> Polarity {
        let a = &self.adjectives;
        let domains = [&a.food, &a.people, &a.space, &a.story];
        let among = |extra: &Lines, side: Polarity| {
            extra.iter().chain(domains.iter().flat_map(|d| d.of(side))).any(|listed| listed == word)
        };
        if among(&self.judging.good, Polarity::Good) {
            Polarity::Good
        } else if among(&self.judging.bad, Polarity::Bad) {
            Polarity::Bad
        } else {
            Polarity::Plain
        }
    }
}

/// The embedded tables, parsed once.
pub fn grammar() -> &'static Grammar {
    static GRAMMAR: OnceLock<Grammar> = OnceLock::new();
    GRAMMAR.get_or_init(|| {
        let text = include_str!("assets/grammar.json");
        serde_json::from_str(text).expect("grammar.json is part of this program and its tests read it")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_eight_names_and_eight_aspects_and_no_name_word_is_used_twice() {
        let mut words = std::collections::HashSet::new();
        for kind in &grammar().kinds {
            assert_eq!((kind.names.len(), kind.aspects.len()), (8, 8), "{}", kind.kind);
            for word in kind.names.iter().flat_map(|name| name.split(' ')) {
                assert!(words.insert(word), "{word} stands in two names");
            }
        }
    }

    #[test]
    fn no_judging_word_both_praises_and_blames() {
        let g = grammar();
        let a = &g.adjectives;
        let bad = [&a.food, &a.people, &a.space, &a.story].into_iter().flat_map(|d| &d.bad).chain(&g.judging.bad);
        for word in bad {
            assert_eq!(g.judges(word), Polarity::Bad, "{word}");
        }
        assert_eq!(g.judges("fresh"), Polarity::Good);
        assert_eq!(g.judges("Fresh"), Polarity::Plain);
    }
}

//! The text on which src/quickstart/python/make_base.py pretrains the tiny base: reviews under headings, loose sentences, small
//! talk. None of it answers a question about an aspect. It does not depend on the training stages. Read `answer.rs` first.

use super::answer::{Tone, Writer};
use super::grammar::{Aspect, Kind, Polarity};
use super::task::{Combination, STREAM_DOCUMENTS, Split, combinations, wrap};
use crate::rng::derive;

/// The first `n` pretraining documents of a seed, without the end token that closes each.
pub fn documents(seed: u64, n: usize) -> Vec<String> {
    let mut writer = Writer::new(derive(seed, &[STREAM_DOCUMENTS]));
    let combos = combinations(Split::Train);
    (0..n).map(|_| document(&mut writer, &combos)).collect()
}

fn document(w: &mut Writer, combos: &[Combination]) -> String {
    let &Combination { kind, name, aspect } = w.pick(combos);
    let sorts = &w.grammar.chances.document;
    match w.below(100) {
        x if x < sorts.review => review(w, kind, name, aspect),
        x if x < sorts.review + sorts.loose => {
            let sentences: Vec<String> = (0..2 + w.below(4)).map(|_| loose_sentence(w, kind, name)).collect();
            sentences.join(" ")
        }
        _ => {
            let talk = w.pick(&w.grammar.small_talk);
            let question = w.fill(&talk.question, &[("name", name)]);
            let reply = w.pick(&talk.answers);
            format!("{} {}", wrap(&question), w.fill(reply, &[("name", name)]))
        }
    }
}

/// A review of every aspect in its heading, in order. A third of them end with tags: the aspects and, if named, the place.
fn review(w: &mut Writer, kind: &'static Kind, name: &str, aspect: &'static Aspect) -> String {
    let grammar = w.grammar;
    let mut topics = vec![aspect];
    for _ in 0..w.below(3) {
        let more = w.pick(&kind.aspects);
        if topics.iter().all(|topic| topic.0 != more.0) {
            topics.push(more);
        }
    }
    let nouns: Vec<&str> = topics.iter().map(|topic| topic.0.as_str()).collect();
    let template = w.pick(&grammar.headings);
    let heading = w.fill(template, &[("aspects", &nouns.join(" and the ")), ("name", name)]);
    let tone = *w.pick(&[Tone::Good, Tone::Bad, Tone::Mixed]);
    let tables = [&grammar.openings.named, &grammar.openings.bare, &grammar.follow_ups];
    let mut sentences = Vec::new();
    for topic in &topics {
        let polarity = w.polarity(tone);
        let table = *w.pick(&tables);
        sentences.push(w.about(table, name, topic, polarity));
        if w.chance(33) {
            let polarity = w.polarity(tone);
            sentences.push(w.detail(polarity));
        }
    }
    if w.chance(50) {
        let polarity = w.polarity(tone);
        sentences.push(w.verdict(kind, name, polarity));
    }
    let body = sentences.join(" ");
    if !w.chance(33) {
        return heading + &body;
    }
    let mut tags = nouns;
    if body.contains(name) {
        tags.push(name);
    }
    format!("{heading}{body}\n\nTags: {}.", tags.join(", "))
}

fn loose_sentence(w: &mut Writer, kind: &Kind, name: &str) -> String {
    let grammar = w.grammar;
    let polarity = *w.pick(&[Polarity::Good, Polarity::Bad, Polarity::Plain]);
    match w.below(7) {
        0 => w.detail(polarity),
        1 => w.verdict(kind, name, polarity),
        2 => w.contrast(kind),
        x => {
            let table = match x {
                3 => &grammar.openings.named,
                4 => &grammar.follow_ups,
                5 => &grammar.evasions.named,
                _ => &grammar.evasions.bare,
            };
            let aspect = w.pick(&kind.aspects);
            w.about(table, name, aspect, polarity)
        }
    }
}

//! What `score` found, in JSON and in words: the results of the scores, and those of each member where an ensemble gave them.
//! It does not depend on the model. Read `score.rs` for where the scores come from, `subsets.rs` for the table.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::subsets::{self, Subset};
use crate::data::PairLabel;
use crate::error::counted;
use crate::report::number;
use crate::reward::length::LengthReport;
use crate::reward::source::combine::Aggregate;
use crate::reward::train as reward;
use crate::reward::train::Evaluation;
use crate::watch::in_a_line;

/// The scores of the records, one list per record with its best response first: those of each member, and the one that they
/// become.
pub(super) struct Scores {
    paths: Vec<PathBuf>,
    aggregate: Aggregate,
    of_all: Vec<Vec<f32>>,
    of_members: Vec<Vec<Vec<f32>>>,
    deviations: Vec<f64>,
}

impl Scores {
    /// Of the reward models at `paths`, no record yet.
    pub(super) fn new(paths: &[PathBuf], aggregate: Aggregate) -> Self {
        let of_members = vec![vec![]; paths.len()];
        Self { paths: paths.into(), aggregate, of_all: vec![], of_members, deviations: vec![] }
    }

    /// Adds a record: one list of scores per member.
    pub(super) fn push(&mut self, of_members: Vec<Vec<f32>>) {
        let responses = of_members.first().map_or(0, Vec::len);
        let of = |response: usize| self.aggregate.of(of_members.iter().map(move |scores| scores[response]));
        let (scores, deviations): (Vec<f32>, Vec<f64>) = (0..responses).map(of).unzip();
        self.of_all.push(scores);
        self.deviations.extend(deviations);
        self.of_members.iter_mut().zip(of_members).for_each(|(all, scores)| all.push(scores));
    }

    /// The records.
    pub(super) fn len(&self) -> usize {
        self.of_all.len()
    }

    fn is_ensemble(&self) -> bool {
        self.paths.len() > 1
    }

    /// The scores of the last record, and each member's where there are several.
    pub(super) fn last(&self) -> (&[f32], Vec<&[f32]>) {
        fn last(all: &[Vec<f32>]) -> &[f32] {
            all.last().map(Vec::as_slice).unwrap_or_default()
        }
        let members = self.of_members.iter().filter(|_| self.is_ensemble());
        (last(&self.of_all), members.map(|all| last(all)).collect())
    }

    /// Mean over all responses of the deviation of the members' scores.
    fn disagreement(&self) -> f64 {
        self.deviations.iter().sum::<f64>() / self.deviations.len() as f64
    }

    /// The name of the aggregate and the weight of the deviation, if it has one.
    fn rule(&self) -> (&'static str, Option<f64>) {
        match self.aggregate {
            Aggregate::MeanMinusStd(coef) => ("mean_minus_std", Some(coef)),
            Aggregate::Mean => ("mean", None),
            Aggregate::Min => ("min", None),
        }
    }
}

/// What the records say of their responses, one entry per scored record.
pub(super) struct Asked<'r> {
    /// Which response is preferred.
    pub labels: &'r [PairLabel],
    /// The responses' lengths in tokens, the preferred one first; none for a tie.
    pub lengths: &'r [Vec<usize>],
    /// The subset, where the records have one.
    pub names: Option<&'r [String]>,
}

/// The results of one list of scores per record.
struct Judged {
    /// `None` if nothing is compared.
    summary: Option<Evaluation>,
    mean: f64,
    responses: usize,
    lengths: LengthReport,
    subsets: Vec<Subset>,
}

impl Judged {
    fn of(scores: &[Vec<f32>], asked: &Asked<'_>) -> Result<Self> {
        let first =
            |(label, scores): (&PairLabel, &Vec<f32>)| label.preferred_first(scores.clone()).unwrap_or_default();
        let judged: Vec<Vec<f32>> = asked.labels.iter().zip(scores).map(first).collect();
        let compared: Vec<Vec<f32>> = judged.iter().filter(|scores| scores.len() > 1).cloned().collect();
        let responses = scores.iter().map(Vec::len).sum::<usize>();
        let subsets = asked.names.map(|names| subsets::accuracies(names, &judged)).transpose()?;
        Ok(Self {
            summary: if compared.is_empty() { None } else { Some(reward::summarise(&compared)?) },
            mean: scores.iter().flatten().map(|&score| f64::from(score)).sum::<f64>() / responses as f64,
            responses,
            lengths: LengthReport::of(&judged, asked.lengths),
            subsets: subsets.unwrap_or_default(),
        })
    }

    fn to_json(&self) -> Map<String, Value> {
        let found = json!({
            "accuracy": self.summary.map(|s| number(s.accuracy)),
            "mean_chosen_score": self.summary.map(|s| number(s.mean_chosen)),
            "mean_rejected_score": self.summary.map(|s| number(s.mean_rejected)),
            "mean_score": number(self.mean),
            "pairs": self.summary.map_or(0, |s| s.pairs),
            "subsets": subsets::to_json(&self.subsets),
            "subset_mean_accuracy": number(subsets::mean_accuracy(&self.subsets)),
        });
        let Value::Object(mut found) = found else { return Map::new() };
        found.extend(self.lengths.named(""));
        found
    }

    fn text(&self) -> String {
        match &self.summary {
            Some(summary) => format!(
                "accuracy {:.3} over {}; mean score of the best responses {:.3}, of the others {:.3}; {}",
                summary.accuracy,
                counted(summary.pairs, "pair"),
                summary.mean_chosen,
                summary.mean_rejected,
                of_lengths(&self.lengths)
            ),
            None => format!(
                "mean score {:.3} over {}, none of them compared",
                self.mean,
                counted(self.responses, "response")
            ),
        }
    }
}

/// How the scores follow the length, in words where a number cannot be told.
fn of_lengths(lengths: &LengthReport) -> String {
    let correlation = match lengths.correlation {
        r if r.is_nan() => "no correlation of score and length, since one of them is the same throughout".to_owned(),
        r => format!("correlation of score and length {r:.3}"),
    };
    let missing = match (lengths.accuracy_chosen_shorter.is_nan(), lengths.accuracy_chosen_longer.is_nan()) {
        (false, false) => {
            return format!(
                "{correlation}, accuracy with the length difference controlled {:.3}",
                lengths.controlled()
            );
        }
        (true, true) => "differs in length",
        (true, false) => "has the shorter response preferred",
        (false, true) => "has the longer response preferred",
    };
    format!("{correlation}; the length difference cannot be controlled, since no pair {missing}")
}

/// The results: of the scores, and of each member where there are several.
pub(super) struct Found<'s> {
    scores: &'s Scores,
    whole: Judged,
    members: Vec<Judged>,
}

impl<'s> Found<'s> {
    /// Judges the scores by what the records say.
    ///
    /// # Errors
    /// If a score is NaN or infinite.
    pub(super) fn of(scores: &'s Scores, asked: &Asked<'_>) -> Result<Self> {
        let members = scores.of_members.iter().filter(|_| scores.is_ensemble());
        let members = members.map(|of_member| Judged::of(of_member, asked)).collect::<Result<_>>()?;
        Ok(Self { scores, whole: Judged::of(&scores.of_all, asked)?, members })
    }

    /// The results of the scores; `ensemble` is null for a single reward model.
    pub(super) fn to_json(&self) -> Map<String, Value> {
        let mut found = Map::from_iter([("scores".to_owned(), json!(self.scores.of_all))]);
        found.extend(self.whole.to_json());
        let (aggregate, std_coef) = self.scores.rule();
        let of = |((path, scores), judged): ((&PathBuf, &Vec<Vec<f32>>), &Judged)| {
            let mut member = Map::new();
            member.insert("adapter".into(), path.display().to_string().into());
            member.insert("scores".into(), json!(scores));
            member.extend(judged.to_json());
            Value::Object(member)
        };
        let members = self.scores.paths.iter().zip(&self.scores.of_members).zip(&self.members);
        let ensemble = self.scores.is_ensemble().then(|| {
            json!({
                "aggregate": aggregate,
                "std_coef": std_coef,
                "disagreement": number(self.scores.disagreement()),
                "members": members.map(of).collect::<Value>(),
            })
        });
        found.insert("ensemble".into(), ensemble.into());
        found
    }

    /// The table of the subsets, if there are any, and a line for the scores and for each member.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        if !self.whole.subsets.is_empty() {
            let members: Vec<&[Subset]> = self.members.iter().map(|member| &member.subsets[..]).collect();
            text += &subsets::table(&self.whole.subsets, &members);
        }
        if !self.scores.is_ensemble() {
            return text + &format!("{}\n", self.whole.text());
        }
        let rule = match self.scores.rule() {
            (name, Some(coef)) => format!("{name} with std_coef = {coef}"),
            (name, None) => name.to_owned(),
        };
        text += &format!(
            "ensemble of {}, {rule}: {}; their scores of a response deviate by {:.3} on average\n",
            self.members.len(),
            self.whole.text(),
            self.scores.disagreement()
        );
        for (number, (path, member)) in self.scores.paths.iter().zip(&self.members).enumerate() {
            text += &format!("member {number}, {}: {}\n", in_a_line(&path.display().to_string()), member.text());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scores_of_members_become_one_by_the_formula_in_float64() {
        let members: [[f32; 2]; 3] = [[0.1, -2.5], [0.7, 1.25], [-0.3, 3.0]];
        let paths = ["a", "b", "c"].map(PathBuf::from);
        for (aggregate, want) in [
            (Aggregate::MeanMinusStd(0.5), [WANT[0] - 0.5 * WANT[2], WANT[1] - 0.5 * WANT[3]]),
            (Aggregate::Mean, [WANT[0], WANT[1]]),
            (Aggregate::Min, [f64::from(-0.3f32), -2.5]),
        ] {
            let mut scores = Scores::new(&paths, aggregate);
            scores.push(members.map(Vec::from).into());
            assert_eq!(scores.of_all, [want.map(|score| score as f32)], "{aggregate:?}");
            assert!((scores.disagreement() - (WANT[2] + WANT[3]) / 2.0).abs() < 1e-15);
            assert_eq!(scores.last().1, members);
        }
        let mut one = Scores::new(&paths[..1], Aggregate::MeanMinusStd(1.0));
        one.push(vec![members[0].into()]);
        assert_eq!((one.last().0, one.last().1.len()), (&members[0][..], 0));
    }

    /// Means, then deviations, of both responses' float32 scores, computed by Python in float64: `m = sum(v) / 3` and
    /// `sqrt(sum((x - m) ** 2 for x in v) / 3)`.
    const WANT: [f64; 4] =
        [0.166_666_659_216_086_06, 0.583_333_333_333_333_4, 0.410_960_932_806_078_87, 2.294_316_649_656_034];

    #[test]
    fn what_lengths_cannot_tell_is_said_in_words() {
        let of = |lengths: [[usize; 2]; 2], scores: [[f32; 2]; 2]| {
            of_lengths(&LengthReport::of(&scores.map(Vec::from), &lengths.map(Vec::from)))
        };
        let scores = [[1.0, 0.0], [0.0, 1.0]];
        assert!(of([[2, 3], [3, 2]], scores).ends_with("length difference controlled 0.500"));
        for (lengths, says) in [
            ([[3, 2], [5, 2]], "no pair has the shorter response preferred"),
            ([[2, 3], [2, 5]], "no pair has the longer response preferred"),
            ([[2, 2], [3, 3]], "no pair differs in length"),
        ] {
            let said = of(lengths, scores);
            assert!(said.ends_with(says) && !said.contains("NaN"), "{said}");
        }
        let said = of([[2, 3], [3, 2]], [[1.0, 1.0], [1.0, 1.0]]);
        assert!(said.starts_with("no correlation") && !said.contains("NaN"), "{said}");
    }
}

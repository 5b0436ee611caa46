//! `score` on RewardBench-shaped files: the accuracy by subset, against the scores that it prints, and by length.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::Place;

const RECORDS: [(&str, &str, &str); 5] = [
    (" The soup was lovely and warm.", " The soup was awful.", "chat"),
    (" The room was clean.", " The room was dirty, and the bed was hard.", "chat"),
    (" Lovely.", " Awful, and the staff was rude to us all week.", "safety"),
    (" The food was cold.", " The food was fine.", "safety"),
    (" It was near the beach, and quiet.", " No.", "maths"),
];

fn place() -> Place {
    let place = Place::new();
    place.write_base("base");
    let line = |(chosen, rejected, subset): (&str, &str, &str)| {
        format!(
            "{}\n",
            json!({"prompt": "How was it?", "chosen": chosen, "rejected": rejected, "subset": subset, "level": 1})
        )
    };
    place.write("bench.jsonl", RECORDS.map(line).concat());
    place
}

fn score(place: &Place, more: &[&str]) -> crate::support::Ran {
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/quickstart/reward").display().to_string();
    let args = ["score", "--base", "base", "--adapter", &adapter, "--data", "bench.jsonl"];
    place.run_with(&[&args, more].concat(), "")
}

#[test]
fn accuracy_is_broken_down_by_subset_in_the_table_and_in_json() {
    let place = place();
    let ran = score(&place, &["--json"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let found: Value = serde_json::from_str(&ran.stdout).unwrap();
    let right = |i: usize| found["scores"][i][0].as_f64().unwrap() > found["scores"][i][1].as_f64().unwrap();
    let share = |of: &[usize]| of.iter().filter(|&&i| right(i)).count() as f64 / of.len() as f64;
    let subsets = found["subsets"].as_array().unwrap();
    let names: Vec<&str> = subsets.iter().map(|subset| subset["subset"].as_str().unwrap()).collect();
    assert_eq!(names, ["chat", "safety", "maths"]);
    let rows: [&[usize]; 3] = [&[0, 1], &[2, 3], &[4]];
    for (subset, rows) in subsets.iter().zip(rows) {
        assert_eq!((&subset["pairs"], &subset["accuracy"]), (&json!(rows.len()), &json!(share(rows))), "{found}");
        let at = |key: &str| subset[key].as_f64().unwrap();
        assert!(at("low") <= at("accuracy") + 1e-9 && at("accuracy") <= at("high") + 1e-9, "{subset}");
    }
    let mean = rows.iter().map(|rows| share(rows)).sum::<f64>() / 3.0;
    assert!((found["subset_mean_accuracy"].as_f64().unwrap() - mean).abs() < 1e-12, "{found}");
    // The better response is the longer one in the first, the fourth (by a token or none) and the last record.
    assert!(found["score_length_correlation"].as_f64().is_some_and(|r| (-1.0..=1.0).contains(&r)), "{found}");
    let controlled = found["length_controlled_accuracy"].as_f64().unwrap();
    let (shorter, longer) = (&found["accuracy_chosen_shorter"], &found["accuracy_chosen_longer"]);
    assert_eq!(shorter, share(&[1, 2]), "{found}");
    assert!((controlled - (shorter.as_f64().unwrap() + longer.as_f64().unwrap()) / 2.0).abs() < 1e-12);
    let ran = score(&place, &[]);
    assert!(ran.stdout.starts_with("subset   pairs  accuracy  95% interval\nchat         2 "), "{}", ran.stdout);
}

#[test]
fn another_column_is_named_and_one_that_is_missing_is_an_error() {
    let place = place();
    let by_level: Value = serde_json::from_str(&score(&place, &["--json", "--by", "level"]).stdout).unwrap();
    assert_eq!((&by_level["subsets"][0]["subset"], &by_level["subsets"][0]["pairs"]), (&json!("1"), &json!(5)));
    let ran = score(&place, &["--by", "topic"]);
    assert!(
        ran.code == 2 && ran.stderr.contains("--by topic: record \"bench.jsonl:1\" has no such column"),
        "{}",
        ran.stderr
    );
    // Files without the column have no table.
    let line = json!({"prompt": "How?", "chosen": " Good.", "rejected": " Bad."});
    place.write("bench.jsonl", format!("{line}\n"));
    let plain: Value = serde_json::from_str(&score(&place, &["--json"]).stdout).unwrap();
    assert_eq!((&plain["subsets"], &plain["subset_mean_accuracy"]), (&json!([]), &Value::Null));
}

#[test]
fn soft_labels_are_read_from_their_columns_and_decide_what_is_right() {
    let place = place();
    let with = |more: Value| {
        let mut line =
            json!({"prompt": "How was it?", "chosen": " It was lovely and warm.", "rejected": " It was awful."});
        line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        place.write("bench.jsonl", format!("{line}\n"));
        score(&place, &["--json"])
    };
    let found = |more: Value| -> Value {
        let ran = with(more);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        serde_json::from_str(&ran.stdout).unwrap()
    };
    let plain = found(json!({}));
    let accuracy = plain["accuracy"].as_f64().unwrap();
    assert_eq!(plain["pairs"], 1);
    let other = found(json!({"chosen_probability": 0, "margin": 2.5}));
    assert_eq!((&other["accuracy"], &other["scores"]), (&json!(1.0 - accuracy), &plain["scores"]));
    assert_eq!(other["mean_chosen_score"], plain["mean_rejected_score"]);
    let tie = found(json!({"chosen_probability": 0.5}));
    assert_eq!((&tie["accuracy"], &tie["pairs"]), (&Value::Null, &json!(0)));
    // A column of the same name that holds no number is another one.
    assert_eq!(found(json!({"margin": "significantly better"}))["accuracy"], plain["accuracy"]);
    let ran = with(json!({"chosen_probability": 1.5}));
    assert!(ran.code == 2 && ran.stderr.contains("expected a number from 0 to 1, found 1.5"), "{}", ran.stderr);
    let ran = with(json!({"margin": 1e300}));
    assert!(ran.code == 2 && ran.stderr.contains("margin"), "{}", ran.stderr);
}

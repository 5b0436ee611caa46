//! `score` on RewardBench-shaped files: the accuracy by subset, against the scores that it prints, and by length; and by an
//! ensemble of reward models, whose members' scores become one by the formula.

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
    // The columns that nothing reads are counted and named once.
    let unread = |names: &[&str]| -> serde_json::Map<String, Value> {
        names.iter().map(|name| (format!("with a column {name:?} that is not read"), json!(5))).collect()
    };
    assert_eq!(by_level["remarks"], Value::Object(unread(&["subset"])), "{by_level}");
    let usual = score(&place, &["--json"]);
    let found: Value = serde_json::from_str(&usual.stdout).unwrap();
    assert_eq!(found["remarks"], Value::Object(unread(&["level"])), "{found}");
    assert!(!usual.stderr.contains("not read"), "the object has it: {}", usual.stderr);
    let told = score(&place, &[]).stderr;
    assert_eq!(told.matches("; 5 with a column \"level\" that is not read").count(), 1, "{told}");
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

/// Three members of an ensemble over the quickstart's base, in the folder of their run.
fn ensemble(place: &Place) {
    place.write(
        "reward.toml",
        "seed = 5\n[base]\npath = 'base'\n[lora]\nr = 2\n[data]\npath = 'pairs.jsonl'\neval_rows = 2\n[reward]\n\
         per_device_train_batch_size = 2\nlearning_rate = 1e-2\nensemble = 3\n",
    );
    let ran = place.run("reward reward.toml --out three");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

#[test]
fn an_ensemble_is_its_members_scores_by_the_formula_and_each_member_is_what_it_is_alone() {
    let place = place();
    ensemble(&place);
    let members = ["three/adapter", "three/adapter_1", "three/adapter_2"];
    let run = |more: &str| {
        let ran = place.run(&format!("score --base base --data bench.jsonl {more}"));
        assert_eq!(ran.code, 0, "{more}: {}", ran.stderr);
        ran
    };
    let json = |more: &str| -> Value { serde_json::from_str(&run(&format!("{more} --json")).stdout).unwrap() };
    let alone = members.map(|path| json(&format!("--adapter {path}")));
    let by_folder = json("--adapter three");
    // The formula in float64 over the scores that each gives alone.
    let of = |member: &Value, i: usize, j: usize| member["scores"][i][j].as_f64().unwrap();
    let combined = |i: usize, j: usize| {
        let all = [0, 1, 2].map(|m| of(&alone[m], i, j));
        let mean = all.iter().sum::<f64>() / 3.0;
        let deviation = (all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 3.0).sqrt();
        (mean, deviation, all.into_iter().fold(f64::INFINITY, f64::min))
    };
    let rows = || (0..RECORDS.len()).flat_map(|i| [(i, 0), (i, 1)]);
    for (options, rule, of_rule) in [
        ("", json!(["mean_minus_std", 1.0]), (|(mean, std, _)| mean - std) as fn((f64, f64, f64)) -> f64),
        ("--std-coef 0.25", json!(["mean_minus_std", 0.25]), |(mean, std, _)| mean - 0.25 * std),
        ("--aggregate mean", json!(["mean", null]), |(mean, _, _)| mean),
        ("--aggregate min", json!(["min", null]), |(_, _, min)| min),
    ] {
        let found = json(&format!("--adapter three {options}"));
        let ensemble = &found["ensemble"];
        assert_eq!(json!([ensemble["aggregate"], ensemble["std_coef"]]), rule);
        let (mut right, mut deviations) = (0, 0.0);
        for (i, j) in rows() {
            // The scores are printed as float32 have them.
            assert_eq!(of(&found, i, j) as f32, of_rule(combined(i, j)) as f32, "{options}: {i} {j}");
            deviations += combined(i, j).1 / 10.0;
            right += usize::from(j == 0 && of_rule(combined(i, 0)) > of_rule(combined(i, 1)));
        }
        assert_eq!(found["accuracy"].as_f64().unwrap(), right as f64 / 5.0, "{options}");
        assert!((ensemble["disagreement"].as_f64().unwrap() - deviations).abs() < 1e-12, "{options}");
        // Each member as it is alone, its accuracy by subset and by length among the rest.
        for (m, path) in members.into_iter().enumerate() {
            let member = &ensemble["members"][m];
            assert_eq!(member["adapter"], path);
            for key in
                ["scores", "accuracy", "mean_score", "subsets", "subset_mean_accuracy", "length_controlled_accuracy"]
            {
                assert_eq!(member[key], alone[m][key], "{options} {path} {key}");
            }
        }
    }
    assert_eq!(json("--adapter three/adapter --adapter three/adapter_1 --adapter three/adapter_2"), by_folder);
    assert_eq!((&alone[0]["ensemble"], by_folder["ensemble"].is_object()), (&Value::Null, true));
    let text = run("--adapter three").stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].ends_with("95% interval     member 0   member 1   member 2"), "{text}");
    let cell = |i: usize| by_folder["ensemble"]["members"][i]["subsets"][0]["accuracy"].as_f64().unwrap();
    let cells: String = (0..3).map(|i| format!("  {:>9}", format!("{:.3}", cell(i)))).collect();
    assert!(lines[1].starts_with("chat ") && lines[1].ends_with(&cells), "{text}");
    let accuracy = format!("accuracy {:.3} over 5 pairs", by_folder["accuracy"].as_f64().unwrap());
    assert!(lines[5].starts_with(&format!("ensemble of 3, mean_minus_std with std_coef = 1: {accuracy}")), "{text}");
    assert!(lines[6].starts_with("member 0, three/adapter: accuracy ") && lines.len() == 9, "{text}");
    run("--adapter three --out lines.jsonl");
    let written = std::fs::read_to_string(place.path("lines.jsonl")).unwrap();
    for (i, line) in written.lines().enumerate() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["scores"], by_folder["scores"][i]);
        assert_eq!(line["members"], json!([0, 1, 2].map(|m| alone[m]["scores"][i].clone())));
    }
}

#[test]
fn options_of_an_ensemble_that_change_nothing_are_told_and_half_an_ensemble_is_refused() {
    let place = place();
    ensemble(&place);
    let run = |more: &str| place.run(&format!("--quiet score --base base --data bench.jsonl {more}"));
    for (more, says) in [
        ("--adapter three/adapter --aggregate min", "--aggregate has no effect on a single adapter"),
        ("--adapter three/adapter --std-coef 2", "--std-coef has no effect on a single adapter"),
        (
            "--adapter three --aggregate mean --std-coef 2",
            "--std-coef has no effect without --aggregate mean_minus_std",
        ),
        ("--adapter three --adapter three/adapter", "three/adapter is there twice: it counts twice"),
    ] {
        let ran = run(more);
        assert!(ran.code == 0 && ran.stderr.contains(&format!("score: warning: {says}")), "{more}: {}", ran.stderr);
    }
    assert_eq!(run("--adapter three").stderr, "");
    let ran = run("--adapter three --std-coef=-1");
    assert!(ran.code == 2 && ran.stderr.contains("use 0 or a number above it"), "{}", ran.stderr);
    std::fs::rename(place.path("three/adapter"), place.path("away")).unwrap();
    let ran = run("--adapter three");
    assert!(ran.code == 2 && ran.stderr.contains("a run of 3 reward models and holds 2 of them"), "{}", ran.stderr);
    std::fs::rename(place.path("away"), place.path("three/adapter")).unwrap();
    let ran = place.run("serve --base base --adapter rm=three");
    assert!(ran.code == 2 && ran.stderr.contains("the folder of an ensemble"), "{}", ran.stderr);
    assert!(ran.stderr.contains("NAME=three/adapter to --adapter NAME=three/adapter_2"), "{}", ran.stderr);
}

#[test]
fn what_cannot_be_told_of_lengths_is_null_in_json_and_a_reason_in_words() {
    let place = place();
    let line = json!({"prompt": "How?", "chosen": " It was good and warm.", "rejected": " Bad."});
    place.write("bench.jsonl", format!("{line}\n"));
    let found: Value = serde_json::from_str(&score(&place, &["--json"]).stdout).unwrap();
    assert_eq!((&found["length_controlled_accuracy"], &found["accuracy_chosen_shorter"]), (&Value::Null, &Value::Null));
    let text = score(&place, &[]).stdout;
    assert!(!text.contains("NaN") && text.contains("no pair has the shorter response preferred"), "{text}");
}

//! Ensembles of reward models: trained in one run over one base, resumed from any checkpoint to the same bytes, planned with the
//! adapters that are kept, and aggregated in a reward, by a table or by `reward_adapter`; and rewards whose weights move from
//! iteration to iteration.

use std::fs;

use fourfold::report::clocks;
use serde_json::{Value, json};

use crate::support::Place;

const REWARD: &str = "seed = 5\n[base]\npath = 'base'\n[lora]\nr = 2\n[data]\npath = 'pairs.jsonl'\neval_rows = 2\n\
                      [checkpoint]\nsave_steps = 1\nsave_total_limit = 99\n[reward]\nper_device_train_batch_size = 2\n\
                      learning_rate = 1e-3\nnum_train_epochs = 2\n";
const GRPO: &str = "seed = 3\n[base]\npath = 'base'\n[lora]\nr = 2\n[data]\npath = 'asked.jsonl'\neval_rows = 2\n\
                    [checkpoint]\nsave_steps = 1\nsave_total_limit = 99\n[grpo]\nlearning_rate = 1e-3\nnum_generations = 4\n\
                    per_device_train_batch_size = 8\nmax_steps = 4\nmax_completion_length = 12\n\
                    lr_scheduler_type = 'constant'\neval_prompts = 2\neval_every = 2\n";

fn place() -> Place {
    let p = Place::new();
    let prompt = |i: usize| json!({"prompt": format!("\n\nHuman: How was the soup, number {i}?\n\nAssistant:")});
    p.write("asked.jsonl", (0..14).map(|i| format!("{}\n", prompt(i))).collect::<String>());
    p.write("reward.toml", REWARD);
    p
}

fn object(p: &Place, line: &str) -> Value {
    let ran = p.run(line);
    assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{line}: {error}: {}", ran.stdout))
}

fn metrics(p: &Place, name: &str) -> Vec<Value> {
    let text = clocks::without(&fs::read_to_string(p.path(&format!("{name}/metrics.jsonl"))).unwrap());
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn weights(p: &Place, folder: &str) -> Vec<u8> {
    fs::read(p.path(&format!("{folder}/adapter_model.safetensors"))).unwrap()
}

/// The checkpoints of a run, as `--resume` takes them.
fn checkpoints(p: &Place, name: &str) -> Vec<String> {
    let all = fs::read_dir(p.path(&format!("{name}/checkpoints"))).unwrap();
    let mut names: Vec<String> = all.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names.into_iter().map(|of| format!("{name}/checkpoints/{of}")).collect()
}

const MEMBERS: [&str; 3] = ["adapter", "adapter_1", "adapter_2"];

#[test]
fn members_differ_the_first_is_a_run_of_its_own_and_a_resumed_run_has_the_same_bytes() {
    let p = place();
    let alone = object(&p, "reward reward.toml --out alone --json");
    let ran = p.run("reward reward.toml --set reward.ensemble=3 --out three --json");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let summary: Value = serde_json::from_str(&ran.stdout).unwrap();
    let members = || MEMBERS.map(|name| weights(&p, &format!("three/{name}")));
    let whole = members();
    assert_eq!(whole[0], weights(&p, "alone/adapter"), "the first member is what a run of one makes");
    assert!(whole[0] != whole[1] && whole[1] != whole[2] && whole[0] != whole[2]);
    assert_eq!(summary["adapters"], json!(MEMBERS.map(|name| format!("three/{name}"))));
    assert_eq!((&summary["adapter"], &summary["steps"]), (&json!("three/adapter"), &json!(12)), "{summary}");
    let ensemble = &summary["ensemble"];
    assert!(ensemble["disagreement"].as_f64().unwrap() > 0.0 && ensemble["accuracy"].is_number(), "{summary}");
    assert_eq!(ensemble["members"].as_array().unwrap().len(), 3);
    // The results are those of the members' mean; the scores of each are in the notes.
    assert_eq!((&summary["accuracy"], &summary["accuracy_before"]), (&ensemble["accuracy"], &Value::Null));
    assert_eq!((&alone["accuracy"], alone["accuracy_before"].is_number()), (&ensemble["members"][0], true));
    for (key, said) in [("mean_chosen_score", "mean chosen "), ("mean_rejected_score", ", rejected ")] {
        let of = |line: &str| {
            let end = line.split_once(said).unwrap().1;
            end.split(',').next().unwrap().trim().parse::<f64>().unwrap()
        };
        let all: Vec<f64> =
            ran.stderr.lines().filter(|line| line.contains(", member ") && line.contains(said)).map(of).collect();
        let mean = all.iter().sum::<f64>() / 3.0;
        assert!(all.len() == 3 && (summary[key].as_f64().unwrap() - mean).abs() < 1.1e-3, "{key}: {all:?} {summary}");
        assert_ne!(summary[key], alone[key], "{key} is not the first member's");
    }
    let [one, three] = ["alone", "three"].map(|run| fs::read_to_string(p.path(&format!("{run}/report.html"))).unwrap());
    let tile = |summary: &Value, of: &str| {
        format!("<span>held-out accuracy{of}</span><b>{:.1}%</b>", 100.0 * summary["accuracy"].as_f64().unwrap())
    };
    assert!(one.contains(&tile(&alone, "")) && three.contains(&tile(&summary, " of the ensemble")), "{summary}");
    let lines = metrics(&p, "three");
    assert_eq!(lines.len(), 12);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!((&line["step"], &line["member"]), (&json!(i + 1), &json!(i / 4)), "{line}");
        // Every member has a schedule of its own.
        assert_eq!(line["lr"], lines[i % 4]["lr"]);
    }
    for (one, line) in metrics(&p, "alone").iter().zip(&lines) {
        assert_eq!((&one["loss"], &one["grad_norm"]), (&line["loss"], &line["grad_norm"]));
        assert!(one.get("member").is_none());
    }
    let from = checkpoints(&p, "three");
    assert!(from.len() >= 12, "{from:?}");
    for from in from {
        MEMBERS.iter().for_each(|name| fs::remove_dir_all(p.path(&format!("three/{name}"))).unwrap());
        fs::remove_file(p.path("three/summary.json")).unwrap();
        let ran = p.run(&format!("reward reward.toml --set reward.ensemble=3 --out three --resume {from}"));
        assert_eq!(ran.code, 0, "{from}: {}", ran.stderr);
        assert_eq!((members(), metrics(&p, "three")), (whole.clone(), lines.clone()), "resumed from {from}");
        let now: Value = serde_json::from_str(&fs::read_to_string(p.path("three/summary.json")).unwrap()).unwrap();
        assert_eq!(now["ensemble"], *ensemble, "resumed from {from}");
    }
    // A run of fewer members leaves none of the former's.
    let ran = p.run("reward reward.toml --out three --overwrite");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(p.path("three/adapter").exists() && !p.path("three/adapter_1").exists());
}

#[test]
fn members_are_named_where_nothing_is_held_out_and_one_that_is_lost_is_named_and_made_again() {
    let p = place();
    let line = "reward reward.toml --set data.eval_rows=0 --set reward.ensemble=2 --out two";
    let ran = p.run(line);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for member in 0..2 {
        assert!(ran.stderr.contains(&format!("none held out, member {member}\n")), "{}", ran.stderr);
    }
    let whole = weights(&p, "two/adapter_1");
    let state = || object(&p, "inspect two --json")["state"].as_str().unwrap().to_owned();
    assert!(state().starts_with("finished ") && !state().contains("without"), "{}", state());
    fs::remove_file(p.path("two/adapter_1/adapter_model.safetensors")).unwrap();
    let lost = "two/adapter_1/adapter_model.safetensors";
    assert!(state().contains(&format!(", but without {lost}")), "{}", state());
    // From the newest checkpoint to the same bytes; without one there is no way.
    let ran = p.run(&format!("{line} --resume"));
    assert!(ran.code == 0 && ran.stderr.contains(&format!("is finished, and {lost} is missing")), "{}", ran.stderr);
    assert!(weights(&p, "two/adapter_1") == whole && !state().contains("without"));
    fs::remove_dir_all(p.path("two/adapter_1")).unwrap();
    fs::remove_dir_all(p.path("two/checkpoints")).unwrap();
    let ran = p.run(&format!("{line} --resume"));
    let says = ["is finished, and two/adapter_1/adapter_config.json is missing", "--overwrite"];
    assert!(ran.code == 2 && says.iter().all(|say| ran.stderr.contains(say)), "{}", ran.stderr);
    assert!(state().contains("without two/adapter_1/adapter_config.json, two/adapter_1/adapter_model"), "{}", state());
}

#[test]
fn a_plan_has_one_base_and_the_adapters_of_all_members() {
    let p = place();
    let update = |members: usize| object(&p, &format!("plan reward.toml --json --set reward.ensemble={members}"));
    let of = |plan: &Value, class: &str| plan["phases"]["update"][class].as_u64().unwrap();
    let [one, three, five] = [1, 3, 5].map(update);
    for class in ["base", "mapped", "optimizer"] {
        assert_eq!(of(&one, class), of(&five, class), "{class}");
    }
    let (two_more, four_more) =
        (of(&three, "adapters") - of(&one, "adapters"), of(&five, "adapters") - of(&one, "adapters"));
    assert!(two_more > 0 && four_more == 2 * two_more, "{two_more} {four_more}");
    object(&p, "reward reward.toml --out rm --json");
    // An adapter and its head, as the file has them, without its header.
    let bytes = weights(&p, "rm/adapter");
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) + 8;
    // Beside its numbers a tensor takes what the allocator keeps of it.
    let share = two_more as f64 / (2 * (bytes.len() as u64 - header)) as f64;
    assert!((1.0..1.4).contains(&share), "{share}");
}

#[test]
fn a_reward_of_several_adapters_is_their_mean_their_minimum_or_the_mean_less_the_deviation() {
    let p = place();
    object(&p, "reward reward.toml --set reward.ensemble=3 --out three --json");
    let run = |name: &str, keys: &str| {
        let adapters = MEMBERS.map(|name| format!("'three/{name}'")).join(", ");
        p.write("grpo.toml", format!("{GRPO}[[grpo.reward]]\nname = 'rm'\nadapters = [{adapters}]\n{keys}\n"));
        let ran = p.run(&format!("grpo grpo.toml --out {name}"));
        assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
        assert!(!ran.stderr.contains("has no effect"), "{}", ran.stderr);
        metrics(&p, name)[0].clone()
    };
    let get = |line: &Value, key: &str| line[&format!("rewards/rm/{key}")].as_f64().unwrap();
    // The first rollout is the same in all, before a step was made.
    let mean = run("mean", "aggregate = 'mean'");
    let spread = get(&mean, "disagreement");
    assert!(spread > 1e-3, "{mean}");
    let careful = run("careful", "std_coef = 0.5");
    let wanted = get(&mean, "mean") - 0.5 * spread;
    assert!((get(&careful, "mean") - wanted).abs() < 1e-5, "{careful}, not {wanted}");
    let worst = run("worst", "aggregate = 'min'");
    // Of three numbers the lowest lies at least deviation / sqrt(2) below the mean, and at most sqrt(2) times it.
    let below = (get(&mean, "mean") - get(&worst, "mean")) / spread;
    assert!((0.7..1.5).contains(&below), "{below}");
    for line in [&careful, &worst] {
        assert_eq!(get(line, "disagreement"), spread);
    }
}

#[test]
fn a_weight_moves_from_iteration_to_iteration_and_a_resumed_run_has_the_same_bytes() {
    let p = place();
    let rules = "[[grpo.reward]]\nkind = 'length'\nmax_tokens = 9\nweight = 2.0\nweight_end = 0.5\n\
                 [[grpo.reward]]\nkind = 'regex'\npattern = 'a'\n";
    p.write("grpo.toml", format!("{GRPO}{rules}"));
    let ran = p.run("grpo grpo.toml --out moving");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let lines = metrics(&p, "moving");
    let weight: Vec<f64> = lines.iter().map(|line| line["rewards/length/weight"].as_f64().unwrap()).collect();
    assert_eq!(weight, [2.0, 1.5, 1.0, 0.5]);
    for (line, weight) in lines.iter().zip(&weight) {
        let [total, length, regex] =
            ["objective/scores", "rewards/length/mean", "rewards/regex/mean"].map(|key| line[key].as_f64().unwrap());
        assert!((total - (weight * length + regex)).abs() < 1e-6, "{line}");
        assert!(line.get("rewards/regex/weight").is_none());
    }
    // Evaluations have the last weight: a held-out score is 0, 1/2, 1 or 3/2.
    let summary: Value = serde_json::from_str(&fs::read_to_string(p.path("moving/summary.json")).unwrap()).unwrap();
    let before = summary["eval_score_before"]["mean"].as_f64().unwrap();
    assert!((before * 4.0).fract() == 0.0 && before <= 1.5, "{summary}");
    let whole = (weights(&p, "moving/actor"), lines);
    let from = checkpoints(&p, "moving");
    assert!(from.len() >= 4, "{from:?}");
    for from in from {
        fs::remove_file(p.path("moving/summary.json")).unwrap();
        let ran = p.run(&format!("grpo grpo.toml --out moving --resume {from}"));
        assert_eq!(ran.code, 0, "{from}: {}", ran.stderr);
        assert_eq!((weights(&p, "moving/actor"), metrics(&p, "moving")), whole, "resumed from {from}");
    }
    // The weight is not only shown: the same run without it is another.
    p.write("still.toml", format!("{GRPO}{}", rules.replace("weight_end = 0.5\n", "")));
    assert_eq!(p.run("grpo still.toml --out still").code, 0);
    assert_ne!(weights(&p, "still/actor"), whole.0);
    assert_eq!(metrics(&p, "still")[0]["objective/scores"], whole.1[0]["objective/scores"]);
}

/// A plan's bytes by phase, without those that depend on the process that plans.
fn planned(plan: &Value) -> Vec<(String, Vec<u64>)> {
    let classes = ["base", "mapped", "adapters", "gradients", "optimizer", "kv_cache", "inputs", "blocks", "head"];
    let of = |bytes: &Value| classes.map(|class| bytes[class].as_u64().unwrap()).into();
    plan["phases"].as_object().unwrap().iter().map(|(phase, bytes)| (phase.clone(), of(bytes))).collect()
}

#[test]
fn a_reward_adapter_that_is_an_ensemble_is_the_table_of_its_members_in_every_byte() {
    let p = place();
    object(&p, "reward reward.toml --set reward.ensemble=3 --out three --json");
    let adapters = MEMBERS.map(|name| format!("'three/{name}'")).join(", ");
    let ppo = GRPO.split("[grpo]").next().unwrap().to_owned()
        + "[ppo]\nlearning_rate = 1e-3\nbatch_size = 4\ntotal_episodes = 8\nresponse_length = 12\neval_prompts = 2\n\
           critic = 'own'\n";
    for (stage, head) in [("grpo", GRPO.to_owned()), ("rloo", GRPO.replace("[grpo]", "[rloo]")), ("ppo", ppo.clone())] {
        fs::remove_dir_all(p.path("run")).ok();
        let rule = format!("[[{stage}.reward]]\nkind = 'length'\nmax_tokens = 9\n");
        let table = format!("{head}[[{stage}.reward]]\nname = 'reward_adapter'\nadapters = [{adapters}]\n{rule}");
        let left = |text: &str| {
            p.write("run.toml", text);
            let plan = planned(&object(&p, &format!("plan run.toml --phase {stage} --json")));
            let ran = p.run(&format!("{stage} run.toml --out run --overwrite"));
            assert_eq!(ran.code, 0, "{stage}: {}", ran.stderr);
            let config = fs::read_to_string(p.path("run/config.toml")).unwrap();
            let samples = fs::read_to_string(p.path("run/samples.jsonl")).unwrap();
            let resumed = format!("{stage} run.toml --out run --resume {}", checkpoints(&p, "run")[0]);
            let whole = (weights(&p, "run/actor"), metrics(&p, "run"));
            fs::remove_file(p.path("run/summary.json")).unwrap();
            let ran = p.run(&resumed);
            assert_eq!(ran.code, 0, "{stage}: {}", ran.stderr);
            assert_eq!((weights(&p, "run/actor"), metrics(&p, "run")), whole, "{stage} resumed");
            (plan, whole, config, samples)
        };
        let want = left(&table);
        let line = &want.1.1[0];
        assert!(line["rewards/reward_adapter/disagreement"].as_f64().unwrap() > 0.0, "{line}");
        for main in ["'three'".to_owned(), format!("[{adapters}]")] {
            let text = format!("{head}reward_adapter = {main}\n{rule}");
            let found = left(&text);
            assert_eq!(found.0, want.0, "{main}: the plan");
            assert_eq!((&found.2, &found.3), (&want.2, &want.3), "{main}");
            assert!(found.1 == want.1, "{stage}, {main}: metrics or weights differ");
        }
        // The folder is as good among the adapters of a table.
        let folder = left(&format!("{head}[[{stage}.reward]]\nname = 'reward_adapter'\nadapters = ['three']\n{rule}"));
        assert!(folder == want, "{stage}");
    }
    // What an ensemble cannot be.
    let refused = |text: &str, line: &str, says: &[&str]| {
        p.write("run.toml", text);
        let ran = p.run(line);
        assert_eq!(ran.code, 2, "{line}: {}", ran.stderr);
        for say in says {
            assert!(ran.stderr.contains(say), "{line}: no {say:?} in {}", ran.stderr);
        }
    };
    let main = |text: &str| format!("{text}reward_adapter = 'three'\n");
    let says = ["[ppo] critic = \"reward\" starts as the one reward_adapter, and there are 3; use critic = \"actor\""];
    let critic = main(&ppo.replace("critic = 'own'\n", ""));
    refused(&critic, "ppo run.toml --out o", &says);
    // The commands that show what a run will do tell of it.
    for line in ["plan run.toml", "data run.toml"] {
        let ran = p.run(line);
        assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
        let told = "`fourfold ppo` will refuse to start: [ppo] critic = \"reward\" starts as the one reward_adapter";
        assert!(ran.stderr.contains(told), "{line}: {}", ran.stderr);
        let other = p.run(&format!("{line} --set ppo.critic=actor"));
        assert!(!other.stderr.contains("will refuse"), "{line}: {}", other.stderr);
    }
    let warnings = object(&p, "data run.toml --json")["warnings"].clone();
    assert!(warnings.to_string().contains("will refuse to start: [ppo] critic"), "{warnings}");
    fs::rename(p.path("three/adapter_1"), p.path("away")).unwrap();
    let says = ["[grpo] reward_adapter", "three is the folder of a run of 3 reward models and holds 2 of them"];
    refused(&main(GRPO), "grpo run.toml --out o", &says);
    refused(&main(GRPO), "plan run.toml", &says);
    let running = fourfold::train::lock::lock(&p.path("three")).unwrap();
    let says = ["three is the folder of a run of 3 reward models that goes on (process ", "wait for its end"];
    refused(&main(GRPO), "grpo run.toml --out o", &says);
    drop(running);
    refused(
        &format!("{GRPO}reward_adapter = ['a', '']\n"),
        "grpo run.toml --out o",
        &["has an empty path among others"],
    );
    // The run that trains the members is not kept from it by a section that will read them.
    p.write("both.toml", format!("{REWARD}{}", "[ppo]\nreward_adapter = 'three'\n"));
    let ran = p.run("reward both.toml --set reward.ensemble=3 --out three --overwrite");
    assert!(ran.code == 0 && p.path("three/adapter_1").exists(), "{}", ran.stderr);
}

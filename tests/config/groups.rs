//! `[grpo]` and `[rloo]`: the keys and defaults of TRL's configs, what is refused, that a run by them is the run of PPO's
//! loop with the settings that they mean, and what dynamic sampling leaves in the metrics.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fourfold::config;
use fourfold::config::{AdvantageEstimator, KlIn, LossType, PolicyLoss, Ppo, Stage, known_keys};
use fourfold::report::clocks;
use serde_json::{Value, json};

use crate::support::Place;

/// A section by name with a reward, and more lines.
fn file(section: &str, lines: &str) -> String {
    format!("[base]\npath = 'base'\n[data]\npath = 'prompts.jsonl'\n[{section}]\nreward_adapter = 'r'\n{lines}\n")
}

fn ppo_of(section: &str, lines: &str) -> Ppo {
    config::from_text(&file(section, lines), "test").unwrap().ppo().unwrap().clone()
}

fn refusal(section: &str, lines: &str) -> String {
    config::from_text(&file(section, lines), "test").unwrap_err().to_string()
}

/// The keys that differ from TRL's defaults, with the reason in their documentation.
const OURS: [&str; 1] = ["learning_rate"];

/// tests/golden/trl_configs.py printed them.
#[test]
fn every_key_of_trls_configs_is_here_with_its_default_or_refused_with_a_reason() {
    let golden: BTreeMap<String, BTreeMap<String, Value>> =
        serde_json::from_str(include_str!("../golden/trl_configs.json")).unwrap();
    for (class, section) in [("GRPOConfig", "grpo"), ("RLOOConfig", "rloo")] {
        let written = config::from_text(&file(section, ""), "test").unwrap().to_toml().unwrap();
        let written: toml::Table = written.parse().unwrap();
        let ours = known_keys().into_iter().find(|(name, _)| *name == section).unwrap().1;
        let (mut same, mut refused) = (0, 0);
        for (key, default) in &golden[class] {
            if ours.contains(&key.as_str()) {
                // A key that is not written out is absent: null, or -1 for no limit on steps.
                let value = written[section].get(key).map_or(Value::Null, |value| serde_json::to_value(value).unwrap());
                let is_same = match (value.as_f64(), default.as_f64()) {
                    (Some(a), Some(b)) => a == b,
                    (None, Some(b)) => key == "max_steps" && b == -1.0,
                    _ => value == *default,
                };
                assert!(is_same || OURS.contains(&key.as_str()), "[{section}] {key}: {value}, TRL's {default}");
                same += 1;
            } else {
                let said = refusal(section, &format!("{key} = true"));
                assert!(said.starts_with(&format!("test: [{section}] has no key \"{key}\"; ")), "{said}");
                let reason = said.split("; ").nth(1).unwrap();
                let is_guess =
                    ["did you mean", "there are ", "[sft]", "[ppo] has it"].iter().any(|g| reason.starts_with(g));
                assert!(!is_guess, "[{section}] {key} is refused without a reason: {said}");
                refused += 1;
            }
        }
        assert!(same >= 28 && refused >= 30, "{section}: {same} {refused}");
    }
}

#[test]
fn the_sections_mean_settings_of_ppos_loop() {
    let grpo = ppo_of("grpo", "");
    assert_eq!(grpo.advantage_estimator, AdvantageEstimator::Grpo);
    assert_eq!((grpo.batch_size, grpo.num_mini_batches, grpo.num_ppo_epochs, grpo.micro_batch_size), (8, 1, 1, 8));
    assert_eq!((grpo.kl_coef, grpo.measure_kl, grpo.score_clip()), (0.0, false, None), "no reference");
    assert_eq!((grpo.policy_loss, grpo.loss_type, grpo.whiten_advantages()), (PolicyLoss::Clip, LossType::Dapo, false));
    let rollout = "per_device_train_batch_size = 4\ngradient_accumulation_steps = 2\nsteps_per_generation = 8\n\
                   num_iterations = 3\nmax_steps = 25\nnum_generations = 4";
    let grpo = ppo_of("grpo", rollout);
    assert_eq!((grpo.batch_size, grpo.num_mini_batches, grpo.num_ppo_epochs, grpo.micro_batch_size), (32, 4, 3, 4));
    assert_eq!(grpo.iterations(), 3, "25 steps, 12 to a rollout");
    let by_size = ppo_of("grpo", &rollout.replace("steps_per_generation = 8", "generation_batch_size = 32"));
    assert_eq!(by_size, grpo);
    // Passes over the prompts are counted once the prompts are: two to a rollout of 8 with 4 responses each.
    let passes = ppo_of("grpo", "num_generations = 4\nnum_train_epochs = 3").over(21);
    assert_eq!((passes.iterations(), passes.total_episodes), (31, 31 * 8));
    assert_eq!(ppo_of("grpo", "").over(0).iterations(), 1);
    for (kind, policy_loss, loss_type) in [
        ("grpo", PolicyLoss::Clip, LossType::Grpo),
        ("bnpo", PolicyLoss::Clip, LossType::Dapo),
        ("dr_grpo", PolicyLoss::Clip, LossType::DrGrpo),
        ("cispo", PolicyLoss::Cispo, LossType::Dapo),
        ("sapo", PolicyLoss::Sapo, LossType::Grpo),
    ] {
        let found = ppo_of("grpo", &format!("loss_type = '{kind}'"));
        assert_eq!((found.policy_loss, found.loss_type), (policy_loss, loss_type), "{kind}");
    }
    let synced = ppo_of("grpo", "beta = 0.1\nsync_ref_model = true\nref_model_sync_steps = 6\nnum_iterations = 2");
    assert_eq!((synced.ref_model_sync_iterations, synced.ref_model_mixup_alpha, synced.kl_in), (3, 0.6, KlIn::Loss));
    let rloo = ppo_of("rloo", "reward_clip_range = [-2.0, 2.0]");
    assert_eq!((rloo.kl_coef, rloo.kl_in, rloo.score_clip(), rloo.measure_kl), (0.05, KlIn::Reward, Some(2.0), true));
}

#[test]
fn what_does_not_go_together_is_refused_with_a_remedy() {
    for (section, lines, said) in [
        ("grpo", "num_generations = 3", "is not a multiple of num_generations = 3; try steps_per_generation = 3"),
        ("grpo", "num_generations = 1", "num_generations = 1 leaves nothing to compare"),
        ("rloo", "temperature = 0.0", "temperature = 0 gives a prompt the same response"),
        (
            "grpo",
            "generation_batch_size = 12",
            "generation_batch_size = 12 is not a multiple of per_device_train_batch_size = 8; try 16",
        ),
        ("grpo", "generation_batch_size = 16\nsteps_per_generation = 2", "keep one of them"),
        ("grpo", "gradient_accumulation_steps = 2\nsteps_per_generation = 3", "try steps_per_generation = 4"),
        ("grpo", "sync_ref_model = true", "beta = 0 has none"),
        ("grpo", "beta = 0.1\nsync_ref_model = true\nref_model_sync_steps = 5\nnum_iterations = 2", "try 6"),
        ("grpo", "eval_every = 1", "set eval_prompts"),
        ("grpo", "beta = -0.1", "[grpo] beta = -0.1 is out of range"),
        ("grpo", "top_entropy_quantile = 0.0", "top_entropy_quantile = 0 is out of range"),
        ("grpo", "importance_sampling_level = 'product'", "`fourfold rloo`"),
        ("grpo", "multi_objective_aggregation = 'normalize_then_sum'\nscale_rewards = 'none'", "remove scale_rewards"),
        ("rloo", "reward_clip_range = [0.0, 3.0]", "use [-3, 3]"),
        ("grpo", "reward = [{ kind = 'regex' }]", "[[grpo.reward]] of kind = \"regex\" needs pattern"),
        ("grpo", "importance_sampling_clip_min = 4.0", "[grpo] importance_sampling_clip_min = 4 is more than"),
        ("grpo", "lerning_rate = 1.0", "did you mean \"learning_rate\"?"),
    ] {
        let found = refusal(section, lines);
        assert!(found.contains(said), "{lines}: {found}");
        assert!(found.contains(section), "{lines}: {found}");
    }
    let both = format!("{}[ppo]\nreward_adapter = 'r'\n", file("grpo", ""));
    let said = config::from_text(&both, "test").unwrap_err().to_string();
    assert!(said.contains("a file has one of [ppo], [grpo] and [rloo]"), "{said}");
    let p = Place::new();
    p.write("grpo.toml", file("grpo", ""));
    for (line, said) in [
        ("ppo grpo.toml", "the section [ppo] is missing, and the file has [grpo]: run `fourfold grpo`"),
        ("rloo grpo.toml", "the section [rloo] is missing, and the file has [grpo]"),
        ("grpo run.toml", "the section [grpo] is missing, and the file has [ppo]: run `fourfold ppo`"),
    ] {
        let ran = p.run(line);
        assert!(ran.code == 2 && ran.stderr.contains(said), "{line}: {}", ran.stderr);
    }
}

/// A run's place: prompts enough for some rollouts, and a rule that short responses pass.
const RUN: &str = "seed = 3\n[base]\npath = 'base'\n[lora]\nr = 2\n[data]\npath = 'asked.jsonl'\neval_rows = 2\n\
                   [checkpoint]\nsave_steps = 1\nsave_total_limit = 99\n";
const RULE: &str = "[[SECTION.reward]]\nkind = 'length'\nmax_tokens = 9\n";

fn place() -> Place {
    let p = Place::new();
    let prompt = |i: usize| json!({"prompt": format!("\n\nHuman: How was the soup, number {i}?\n\nAssistant:")});
    p.write("asked.jsonl", (0..14).map(|i| format!("{}\n", prompt(i))).collect::<String>());
    p
}

fn run(p: &Place, command: &str, name: &str, section: &str, lines: &str) -> Vec<Value> {
    let rule = RULE.replace("SECTION", section);
    p.write(&format!("{name}.toml"), format!("{RUN}[{section}]\nlearning_rate = 1e-3\n{lines}\n{rule}"));
    let ran = p.run(&format!("{command} {name}.toml --out {name}"));
    assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
    metrics(&p.path(name))
}

fn metrics(folder: &Path) -> Vec<Value> {
    let text = clocks::without(&fs::read_to_string(folder.join("metrics.jsonl")).unwrap());
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn actor(p: &Place, name: &str) -> Vec<u8> {
    fs::read(p.path(&format!("{name}/actor/adapter_model.safetensors"))).unwrap()
}

const GROUPS: &str = "num_generations = 4\nper_device_train_batch_size = 4\nsteps_per_generation = 4\n\
                      gradient_accumulation_steps = 2\nnum_iterations = 2\nmax_steps = 8\nmax_completion_length = 12\n\
                      eval_prompts = 2\nlr_scheduler_type = 'constant'";
const AS_PPO: &str = "num_generations = 4\nbatch_size = 16\nmicro_batch_size = 4\nnum_mini_batches = 2\nnum_ppo_epochs = 2\n\
                      total_episodes = 32\nresponse_length = 12\neval_prompts = 2\nlr_scheduler_type = 'constant'\n\
                      score_clip = 0.0";

#[test]
fn a_run_by_grpo_or_rloo_is_the_run_of_ppos_loop_with_their_settings() {
    let p = place();
    let of_grpo = "advantage_estimator = 'grpo'\nkl_coef = 0.0\nuse_bias_correction_kl = true";
    let of_rloo =
        "advantage_estimator = 'rloo'\nkl_coef = 0.05\nimportance_sampling_level = 'product'\nloss_type = 'grpo'";
    for (section, own, as_ppo) in
        [("grpo", "", of_grpo), ("rloo", "", of_rloo), ("grpo", "beta = 0.1", &of_grpo.replace("0.0", "0.1"))]
    {
        let _ = fs::remove_dir_all(p.path("group"));
        let _ = fs::remove_dir_all(p.path("plain"));
        let group = run(&p, section, "group", section, &format!("{GROUPS}\n{own}"));
        let plain = run(&p, "ppo", "plain", "ppo", &format!("{AS_PPO}\n{as_ppo}"));
        assert_eq!(group.len(), 2);
        assert_eq!(actor(&p, "group"), actor(&p, "plain"), "{section} {own}");
        assert!(!p.path("group/critic").exists());
        let has_kl = section == "rloo" || !own.is_empty();
        for (group, plain) in group.iter().zip(&plain) {
            assert_eq!(group["stage"], section);
            assert_eq!(group.get("objective/kl").is_some(), has_kl, "{section}: {group}");
            for (key, value) in group.as_object().unwrap().iter().filter(|(key, _)| *key != "stage") {
                assert_eq!(Some(value), plain.get(key), "{section} {own} {key}");
            }
        }
        let summary: Value = serde_json::from_str(&fs::read_to_string(p.path("group/summary.json")).unwrap()).unwrap();
        assert_eq!(summary["stage"], section);
        // Without a reference no pass computes its log-probabilities.
        assert_eq!(summary["eval"]["eval/kl"].is_null(), !has_kl, "{summary}");
        let kept = fs::read_to_string(p.path("group/config.toml")).unwrap();
        assert!(kept.starts_with(&format!("# fourfold {section}: ")) && !kept.contains("[ppo]"), "{kept}");
    }
}

#[test]
fn the_sampler_and_the_trainer_agree_and_the_share_of_equal_groups_is_told() {
    let p = place();
    let found = run(&p, "grpo", "out", "grpo", GROUPS);
    for line in &found {
        let [mean, max] =
            ["mean", "max"].map(|of| line[&format!("sampling/sampling_logp_difference/{of}")].as_f64().unwrap());
        assert!(mean > 0.0 && mean <= max && max < 1e-4, "{line}");
        let share = line["frac_reward_zero_std"].as_f64().unwrap();
        assert!((share * 4.0).fract() == 0.0 && share <= 1.0, "{line}");
        assert!(line.get("sampling/refills").is_none());
    }
}

#[test]
fn refilled_groups_come_from_further_prompts_and_a_resumed_run_has_the_same_bytes() {
    let p = place();
    let lines = format!("{GROUPS}\ndynamic_sampling_rollouts = 3\nsave_samples = 16");
    let whole = run(&p, "grpo", "whole", "grpo", &lines);
    let plain = run(&p, "grpo", "plain", "grpo", &format!("{GROUPS}\nsave_samples = 16"));
    let extra: Vec<f64> = whole.iter().map(|line| line["sampling/extra_groups"].as_f64().unwrap()).collect();
    let share = |line: &Value| line["frac_reward_zero_std"].as_f64().unwrap();
    assert!(extra[0] > 0.0, "some group of the first rollout is refilled here: {whole:?}");
    // The first rollout is the same, and what is left out of it is what had no spread.
    let samples = |name: &str, iteration: u64| -> Vec<Value> {
        let text = fs::read_to_string(p.path(&format!("{name}/samples.jsonl"))).unwrap();
        let all = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        all.filter(|sample| sample["iteration"] == iteration).collect()
    };
    let (ours, theirs) = (samples("whole", 1), samples("plain", 1));
    assert_eq!((ours.len(), theirs.len()), (16, 16));
    let is_flat = |group: &[Value]| group.iter().all(|sample| sample["score"] == group[0]["score"]);
    let kept: Vec<&Value> = theirs.chunks(4).filter(|group| !is_flat(group)).flatten().collect();
    let text = |sample: &Value| (sample["prompt"].clone(), sample["response"].clone());
    assert!(kept.iter().zip(&ours).all(|(a, b)| text(a) == text(b)), "the groups with a spread come first");
    let flat_before = theirs.chunks(4).filter(|group| is_flat(group)).count();
    assert_eq!(share(&plain[0]), flat_before as f64 / 4.0);
    assert!(ours.chunks(4).filter(|group| is_flat(group)).count() < flat_before, "fewer are left");
    let asked: Vec<&Value> = ours[kept.len()..].iter().map(|sample| &sample["prompt"]).collect();
    assert!(
        theirs.iter().all(|sample| !asked.contains(&&sample["prompt"])),
        "other prompts are answered in their place"
    );
    // The second iteration goes on behind the prompts that were taken.
    let first_of = |name: &str| samples(name, 2)[0]["prompt"].clone();
    assert_ne!(first_of("whole"), first_of("plain"));
    // Resumed from every turn of the loop.
    let bytes = (actor(&p, "whole"), whole);
    let checkpoints = p.path("whole/checkpoints");
    let mut names: Vec<_> = fs::read_dir(&checkpoints).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    assert!(names.len() >= 8, "{names:?}");
    for from in names {
        let from = from.strip_prefix(p.path("")).unwrap().display().to_string();
        fs::remove_file(p.path("whole/summary.json")).unwrap();
        let ran = p.run(&format!("grpo whole.toml --out whole --resume {from}"));
        assert_eq!(ran.code, 0, "{from}: {}", ran.stderr);
        assert_eq!((actor(&p, "whole"), metrics(&p.path("whole"))), bytes, "resumed from {from}");
    }
}

#[test]
fn truncated_responses_teach_nothing_where_they_are_masked() {
    let p = place();
    // No response ends within three tokens: no step is made, and the actor stays as it began.
    let short = GROUPS.replace("max_completion_length = 12", "max_completion_length = 2");
    let masked = run(&p, "grpo", "masked", "grpo", &format!("{short}\nmask_truncated_completions = true"));
    assert!(masked.iter().all(|line| line["val/num_eos_tokens"] == 0), "{masked:?}");
    assert!(masked.iter().all(|line| line["policy/entropy_avg"].is_null()), "{masked:?}");
    let none = run(&p, "grpo", "none", "grpo", &format!("{GROUPS}\nmask_truncated_completions = true"));
    let all = run(&p, "grpo", "all", "grpo", GROUPS);
    assert_eq!(none[0]["objective/scores"], all[0]["objective/scores"], "rewards count all the same");
    assert_ne!(none[0]["loss/policy_avg"], all[0]["loss/policy_avg"]);
}

#[test]
fn keys_that_change_nothing_are_named_and_a_bound_on_a_kl_needs_one() {
    let idle = |section: &str, lines: &str| {
        let config = config::from_text(&file(section, lines), "test").unwrap();
        config.idle_keys(if section == "grpo" { Stage::Grpo } else { Stage::Rloo })
    };
    assert!(idle("grpo", "").is_empty() && idle("rloo", "").is_empty());
    for (section, lines, key) in [
        ("grpo", "loss_type = 'cispo'\nepsilon = 0.1", "epsilon"),
        ("grpo", "loss_type = 'sapo'\nepsilon_high = 0.1", "epsilon_high"),
        ("grpo", "loss_type = 'sapo'\ndelta = 2.0", "delta"),
        ("grpo", "sapo_temperature_pos = 2.0", "sapo_temperature_pos"),
        ("grpo", "sapo_temperature_neg = 2.0", "sapo_temperature_neg"),
        ("grpo", "use_bias_correction_kl = false", "use_bias_correction_kl"),
        ("grpo", "importance_sampling_clip_max = 2.0", "importance_sampling_clip_max"),
        ("grpo", "importance_sampling_clip_min = 0.5", "importance_sampling_clip_min"),
        ("grpo", "beta = 0.1\nref_model_sync_steps = 4", "ref_model_sync_steps"),
        ("rloo", "ref_model_mixup_alpha = 0.5", "ref_model_mixup_alpha"),
        ("rloo", "max_steps = 4\nnum_train_epochs = 2", "num_train_epochs"),
    ] {
        let said = idle(section, lines);
        assert!(
            said.len() == 1 && said[0].starts_with(&format!("[{section}] {key} has no effect ")),
            "{lines}: {said:?}"
        );
    }
    let bounded = |lines: &str| config::from_text(&format!("[guard]\nmax_kl = 9.0\n{}", file("grpo", lines)), "test");
    assert!(bounded("beta = 0.1").is_ok());
    let said = bounded("").unwrap_err().to_string();
    assert!(said.contains("[guard] max_kl = 9 bounds a KL that is not measured: set [grpo] beta"), "{said}");
}

#[test]
fn the_share_of_uncertain_tokens_and_the_bonus_on_them_are_of_the_step_and_not_of_a_pass() {
    let p = place();
    let lines = format!("{GROUPS}\ntop_entropy_quantile = 0.3\nentropy_coef = 0.1");
    let whole = run(&p, "grpo", "whole", "grpo", &lines);
    let halves = lines.replace(
        "per_device_train_batch_size = 4\nsteps_per_generation = 4\n\
                                gradient_accumulation_steps = 2",
        "per_device_train_batch_size = 1\n\
                                steps_per_generation = 16\ngradient_accumulation_steps = 8",
    );
    assert_ne!(halves, lines);
    let halves = run(&p, "grpo", "halves", "grpo", &halves);
    for key in ["loss/policy_avg", "grad_norm/actor", "policy/entropy_avg"] {
        let [a, b] = [&whole, &halves].map(|found| found[0][key].as_f64().unwrap());
        assert!(a != 0.0 && (a - b).abs() < 1e-4 * a.abs(), "{key}: {a} and {b}");
    }
    // Of the bonus alone: it is the mean entropy of the tokens it acts on, which have more than the mean.
    let plain = run(&p, "grpo", "plain", "grpo", &format!("{GROUPS}\ntop_entropy_quantile = 0.3"));
    assert!(
        plain[0]["loss/policy_avg"].as_f64().unwrap() - whole[0]["loss/policy_avg"].as_f64().unwrap()
            > 0.1 * whole[0]["policy/entropy_avg"].as_f64().unwrap()
    );
}

#[test]
fn the_other_commands_know_a_run_and_a_file_of_a_group_method() {
    let p = place();
    run(&p, "grpo", "out", "grpo", GROUPS);
    let object = |line: &str| -> Value {
        let ran = p.run(line);
        assert_eq!(ran.code, 0, "{line}: {}", ran.stderr);
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{line}: {error}: {}", ran.stdout))
    };
    let told = object("watch out --json");
    let expected = (&json!("finished"), &json!("grpo"), &json!("grpo"));
    assert_eq!((&told["state"], &told["command"], &told["stage"]), expected, "{told}");
    assert_eq!(object("inspect out --json")["stage"], "grpo");
    object("report out --json");
    let page = fs::read_to_string(p.path("out/report.html")).unwrap();
    for part in
        ["Responses that ended", "Groups of equal rewards", "Sampler against trainer", "out/actor", "fourfold grpo"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("KL to the reference"), "none is measured");
    let ran = p.run("grpo out.toml --out out");
    assert!(ran.code == 2 && ran.stderr.contains("holds a finished run of `fourfold grpo`"), "{}", ran.stderr);
    assert_eq!(object("grpo out.toml --out out --resume --json")["stage"], "grpo", "it is finished");
    assert_eq!(object("data out.toml --json")["phase"], "grpo");
    // What a plan proposes keeps the optimizer steps and the rollouts.
    let plan = object("plan out.toml --json");
    let of = |set: &[String]| config::load(&p.path("out.toml"), set).unwrap().ppo().unwrap().clone();
    let (before, choices) = (of(&[]), plan["choices"].as_array().unwrap());
    let change = choices.iter().find(|choice| choice["set"].get("grpo.per_device_train_batch_size").is_some()).unwrap();
    let set: Vec<String> = change["set"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap()))
        .collect();
    let after = of(&set);
    assert!(after.micro_batch_size < before.micro_batch_size, "{change}");
    assert_eq!((after.batch_size, after.num_mini_batches), (before.batch_size, before.num_mini_batches), "{change}");
    let smaller = object(&format!("plan out.toml --json --set {}", set.join(" --set ")));
    assert!(smaller["peak"]["own"].as_u64() < plan["peak"]["own"].as_u64());
    let planned = object("plan --base base --phase grpo --json");
    assert_eq!((&planned["stage"], &planned["micro_batch_size"]), (&json!("grpo"), &json!(8)));
    for name in ["grpo", "rloo"] {
        let ran = p.run(&format!("{name} --help"));
        assert!(ran.stdout.contains(&format!("fourfold {name} ")), "{}", ran.stdout);
    }
}

#[test]
fn a_correction_for_the_sampler_is_a_weight_of_one_here_and_the_bounds_hold() {
    let p = place();
    let plain = run(&p, "grpo", "plain", "grpo", GROUPS);
    for mode in ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] {
        let lines = format!("{GROUPS}\nimportance_sampling_correction = '{mode}'");
        let found = run(&p, "grpo", mode, "grpo", &lines);
        let of = |key: &str| found[0][key].as_f64().unwrap();
        for side in ["min", "mean", "max"] {
            assert!(
                (of(&format!("sampling/importance_sampling_ratio/{side}")) - 1.0).abs() < 1e-3,
                "{mode}: {found:?}"
            );
        }
        // The trainer's log-probabilities are what the ratio is to, and the sampler's are what they are compared with.
        assert_eq!(of("val/first_ratio"), 1.0, "{mode}");
        let mismatch = "sampling/sampling_logp_difference/max";
        assert_eq!(found[0][mismatch], plain[0][mismatch], "{mode}");
        let [a, b] = [&plain, &found].map(|run| run[0]["grad_norm/actor"].as_f64().unwrap());
        assert!(a > 0.0 && (a - b).abs() < 1e-3 * a, "{mode}: {a} and {b}");
    }
    // Bounds that every ratio exceeds: half of the gradient, and none.
    let base =
        format!("{GROUPS}\nmax_grad_norm = 0.0\nimportance_sampling_clip_max = 0.5\nimportance_sampling_correction");
    let halved = run(&p, "grpo", "halved", "grpo", &format!("{base} = 'token_truncate'"));
    let none = run(&p, "grpo", "masked", "grpo", &format!("{base} = 'token_mask'"));
    assert_eq!(halved[0]["sampling/importance_sampling_ratio/max"], 0.5);
    assert_eq!((&none[0]["loss/policy_avg"], &none[0]["grad_norm/actor"]), (&json!(0.0), &json!(0.0)));
    assert_ne!(halved[0]["grad_norm/actor"], json!(0.0));
}

#[test]
fn a_plan_counts_no_sampling_where_a_server_samples() {
    let p = place();
    let keys = GROUPS.replace("eval_prompts = 2", "eval_prompts = 0").replace("length = 12", "length = 64");
    let rule = RULE.replace("SECTION", "grpo");
    let peak = |name: &str, more: &str| {
        p.write(name, format!("{RUN}[grpo]\nlearning_rate = 1e-3\n{keys}\n{rule}{more}"));
        let ran = p.run(&format!("plan {name} --json"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let plan: Value = serde_json::from_str(&ran.stdout).unwrap();
        // The whole of a phase has what the process holds, which is another number of bytes in each.
        let of = |phase: &str, kind: &str| plan["phases"][phase][kind].as_u64().unwrap();
        [of("rollout", "kv_cache"), of("scoring", "own")]
    };
    let here = peak("here.toml", "");
    let there = peak("there.toml", "[grpo.rollout]\nengine = 'vllm'\nurls = ['http://127.0.0.1:9/v1']\n");
    // Keys and values of 16 sequences of 64 tokens and more, in f32.
    let base: Value = serde_json::from_str(&fs::read_to_string(p.path("base/config.json")).unwrap()).unwrap();
    let of = |key: &str| base[key].as_u64().unwrap();
    let cache = 16 * 64 * 2 * of("num_hidden_layers") * of("num_key_value_heads") * of("head_dim") * 4;
    assert!(here[0] >= cache && there[0] == 0, "{here:?} {there:?} {cache}");
    assert!(there[1] > here[1], "the actor scores what it did not sample: {here:?} {there:?}");
}

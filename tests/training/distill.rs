//! Distillation: three steps follow torch's under TRL's loss, a student learns a teacher of another width whose lm_head has
//! padding rows, on the host and on the emulated machine, and a teacher that does not fit is refused.
//! tests/golden/distill.py printed the golden numbers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fourfold::config;
use fourfold::config::{Distill, LrScheduler, Stage};
use fourfold::data::examples::objectives::SftExample;
use fourfold::distill;
use fourfold::distill::Teaching;
use fourfold::error::exit_code;
use fourfold::model::block::Recompute;
use fourfold::model::roles::Policy;
use fourfold::report::Report;
use fourfold::run;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::support::Place;
use crate::tiny_decoders;

#[derive(Deserialize)]
struct Golden {
    lr: f64,
    max_grad_norm: f64,
    prompts: Vec<Vec<u32>>,
    answers: Vec<Vec<u32>>,
    courses: Vec<Course>,
}

#[derive(Deserialize)]
struct Course {
    beta: f64,
    losses: Vec<f64>,
    norms: Vec<f64>,
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn metrics(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn three_steps_take_torchs_course_under_trls_loss() {
    let golden: Golden = serde_json::from_str(include_str!("../golden/distill.json")).unwrap();
    let model = Model::open(&here("src/quickstart/assets/base")).unwrap();
    let start = model.adapter(&here("tests/golden/peft_logits/lm")).unwrap();
    let example = |(prompt, answer): (&Vec<u32>, &Vec<u32>)| SftExample {
        tokens: [&prompt[..], answer].concat(),
        loss_mask: (0..prompt.len() + answer.len()).map(|at| at >= prompt.len()).collect(),
    };
    let examples: Vec<SftExample> = golden.prompts.iter().zip(&golden.answers).map(example).collect();
    let decode = |ids: &[u32]| format!("{ids:?}");
    let teaching = Teaching { teacher: Policy::new(&model.base, None), stop: &[0], decode: &decode };
    let mut furthest = 0f64;
    for course in &golden.courses {
        let config = Distill {
            beta: course.beta,
            lmbda: 0.0,
            learning_rate: golden.lr,
            lr_scheduler_type: LrScheduler::Constant,
            max_grad_norm: golden.max_grad_norm,
            num_train_epochs: 4,
            // Two micro-batches a step: torch had one.
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 2,
            ..Distill::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let mut session = Session::new(Report::to_dir(dir.path()).unwrap());
        let setup = Setup { base: &model.base, start: &start, recompute: Recompute::Off, seed: 0 };
        let none: Vec<SftExample> = vec![];
        distill::train(setup, teaching, &examples, &none, &config, &mut session).unwrap();
        let lines = metrics(dir.path());
        assert_eq!(lines.len(), 4);
        for (line, want) in lines.iter().zip(&course.losses) {
            let off = (line["loss"].as_f64().unwrap() - want).abs() / want;
            assert!(off < 1e-4, "beta {}: torch has {want}: {line}", course.beta);
            furthest = furthest.max(off);
        }
        for (line, want) in lines.iter().zip(&course.norms) {
            let off = (line["grad_norm"].as_f64().unwrap() - want).abs() / want;
            assert!(off < 1e-3, "beta {}: torch has {want}: {line}", course.beta);
        }
    }
    eprintln!("losses within {furthest:.1e} of torch's");
}

/// A random Llama of another width than the quickstart's base, with its tokenizer and `vocabulary` rows.
fn teacher(dir: &Path, vocabulary: usize) {
    fs::create_dir_all(dir).unwrap();
    let base = here("src/quickstart/assets/base");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(base.join(name), dir.join(name)).unwrap();
    }
    let mut config: Value = serde_json::from_str(&fs::read_to_string(base.join("config.json")).unwrap()).unwrap();
    let (d, inner) = (96, 64);
    for (key, value) in
        [("hidden_size", d), ("intermediate_size", inner), ("num_hidden_layers", 1), ("vocab_size", vocabulary)]
    {
        config[key] = value.into();
    }
    config["torch_dtype"] = "float32".into();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes: BTreeMap<String, Vec<usize>> = [
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, d]),
        ("model.norm.weight".to_owned(), vec![d]),
        (layer("input_layernorm"), vec![d]),
        (layer("post_attention_layernorm"), vec![d]),
        (layer("self_attn.q_proj"), vec![128, d]),
        (layer("self_attn.k_proj"), vec![64, d]),
        (layer("self_attn.v_proj"), vec![64, d]),
        (layer("self_attn.o_proj"), vec![d, 128]),
        (layer("mlp.gate_proj"), vec![inner, d]),
        (layer("mlp.up_proj"), vec![inner, d]),
        (layer("mlp.down_proj"), vec![d, inner]),
    ]
    .into();
    tiny_decoders::save(&dir.join("model.safetensors"), &shapes);
}

/// Runs `[distill]` on some prompts with answers.
fn from_files(dir: &Path, records: usize, more: &str, section: &str) -> anyhow::Result<(Value, Vec<Value>)> {
    let record = |i: usize| json!({"prompt": format!("How was the soup at place {i}?"), "completion": "It was warm."});
    let lines: Vec<String> = (0..records).map(|i| record(i).to_string()).collect();
    fs::write(dir.join("data.jsonl"), lines.join("\n"))?;
    let text = format!(
        "[base]\npath = '{}'\ncompute_dtype = 'f32'\n{more}\n[data]\npath = '{}/data.jsonl'\neval_rows = 4\n\
         [lora]\nr = 8\n[distill]\n{section}",
        here("src/quickstart/assets/base").display(),
        dir.display(),
    );
    let file = dir.join("distill.toml");
    fs::write(&file, text)?;
    let out = tempfile::tempdir()?;
    let summary = run::stage(Stage::Distill, &config::load(&file, &[])?, out.path(), &run::RunOptions::default())?;
    Model::open(&here("src/quickstart/assets/base"))?.policy_adapter(&out.path().join("adapter"))?;
    Ok((summary, metrics(out.path())))
}

#[test]
fn a_student_learns_a_teacher_of_another_width_on_its_own_samples() {
    let dir = tempfile::tempdir().unwrap();
    teacher(&dir.path().join("teacher"), 1032);
    let taught = format!("[teacher]\npath = '{}'", dir.path().join("teacher").display());
    let long = "learning_rate = 1e-2\nnum_train_epochs = 8\nper_device_train_batch_size = 8\nmax_new_tokens = 6\n";
    for more in ["beta = 1.0\nlmbda = 1.0", "beta = 0.5\nlmbda = 0.5", "beta = 0.0\nlmbda = 0.0\nseq_kd = true"] {
        let (summary, lines) = from_files(dir.path(), 36, &taught, &format!("{long}{more}")).unwrap();
        let (before, after) = (summary["loss_before"].as_f64().unwrap(), summary["loss_after"].as_f64().unwrap());
        assert!(after < 0.9 * before, "{more}: {summary}");
        let own: f64 = lines.iter().map(|line| line["on_policy"].as_f64().unwrap()).sum();
        let share = own / lines.len() as f64;
        match more.split("lmbda = ").nth(1).unwrap().split('\n').next().unwrap() {
            "1.0" => assert_eq!(share, 1.0),
            "0.0" => assert_eq!(share, 0.0),
            _ => assert!(share > 0.2 && share < 0.8, "{share}"),
        }
        // A record's response is longer.
        let sampled = lines.iter().filter(|line| more.contains("seq_kd") || line["on_policy"] == 1.0);
        assert!(sampled.into_iter().all(|line| line["completions/mean_length"].as_f64().unwrap() <= 6.0));
    }
}

#[test]
fn the_emulated_machine_takes_the_hosts_steps() {
    if !fourfold::device::testing::can_emulate() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    teacher(&dir.path().join("teacher"), 1032);
    let run = |device: &str| {
        let more = format!(
            "device = '{device}'\n[teacher]\npath = '{}'\ncompute_dtype = 'f32'",
            dir.path().join("teacher").display()
        );
        let section =
            "beta = 0.5\nlmbda = 1.0\nper_device_train_batch_size = 2\nmax_new_tokens = 3\nlearning_rate = 1e-3";
        from_files(dir.path(), 8, &more, section).unwrap()
    };
    let ((_, host), (_, device)) = (run("cpu"), run("emulated"));
    assert_eq!(host.len(), 2);
    for (a, b) in host.iter().zip(&device) {
        for key in ["loss", "grad_norm"] {
            let (a, b) = (a[key].as_f64().unwrap(), b[key].as_f64().unwrap());
            assert!((a - b).abs() < 1e-3 * a, "{key}: {a} {b}");
        }
    }
}

#[test]
fn a_teacher_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("teacher");
    teacher(&place, 1024);
    let refusal = |more: &str, section: &str| {
        let error = from_files(dir.path(), 8, more, section).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    };
    let named = format!("[teacher]\npath = '{}'", place.display());
    assert!(refusal("", "").contains("[distill] has no teacher"));
    let both = refusal(&named, "teacher_model_name_or_path = 'x'");
    assert!(both.contains("beside [teacher]"), "{both}");
    let long = refusal(&named, "max_new_tokens = 250");
    assert!(long.contains("longer than the context of [base], 256"), "{long}");
    let key = refusal(&named, "teacher_model_init_kwargs = 'x'");
    assert!(key.contains("[teacher] path, quantize, compute_dtype and device describe the teacher"), "{key}");
    assert!(refusal(&named, "beta = 1.5").contains("beta = 1.5 is out of range"));
    let tokenizer = fs::read_to_string(place.join("tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&tokenizer).unwrap();
    let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
    let (one, other) = {
        let mut names =
            vocabulary.iter().filter(|(_, id)| [1000, 1001].contains(&id.as_u64().unwrap())).map(|(t, _)| t.clone());
        (names.next().unwrap(), names.next().unwrap())
    };
    let id = vocabulary[&one].clone();
    vocabulary[&one] = vocabulary[&other].clone();
    vocabulary[&other] = id;
    fs::write(place.join("tokenizer.json"), json.to_string()).unwrap();
    let found = refusal(&named, "");
    assert!(found.contains("another vocabulary than [base]: token 1000 is"), "{found}");
}

#[test]
fn samples_of_the_logged_steps_and_of_the_held_out_prompts_are_kept() {
    let p = Place::new();
    let keys = "teacher_adapter = 'sft/adapter'\nlmbda = 1.0\nmax_new_tokens = 6\nper_device_train_batch_size = 2\n\
                save_samples = 2\nnum_train_epochs = 2\n";
    let common = fs::read_to_string(p.path("run.toml")).unwrap();
    p.write("run.toml", common.split("[reward]").next().unwrap());
    assert_eq!(p.run("sft run.toml --out sft").code, 0);
    let samples = |name: &str, more: &str| -> Vec<Value> {
        p.write("distill.toml", format!("{}[distill]\n{keys}{more}", common.split("[sft]").next().unwrap()));
        let ran = p.run(&format!("distill distill.toml --out {name}"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let text = fs::read_to_string(p.path(&format!("{name}/samples.jsonl"))).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let found = samples("own", "");
    let steps = metrics(&p.path("own"));
    let marks: Vec<Value> =
        found.iter().map(|line| line.get("evaluation").or(line.get("iteration")).unwrap().clone()).collect();
    // Two held-out prompts before, two responses of each of four steps, and the two held-out prompts after.
    assert_eq!(steps.len(), 4);
    let wanted = [json!("before"), json!(1), json!(2), json!(3), json!(4), json!("after")];
    assert_eq!(marks, wanted.iter().flat_map(|mark| [mark.clone(), mark.clone()]).collect::<Vec<_>>());
    for line in &found {
        assert!(line["prompt"].as_str().unwrap().contains("Human:") && line["loss"].as_f64().unwrap() > 0.0, "{line}");
        assert!(["stop", "length"].contains(&line["finish_reason"].as_str().unwrap()), "{line}");
    }
    assert!(found[2..10].iter().all(|line| line["by"] == "policy"), "{found:?}");
    // A step's two responses are all of it: their losses are the step's, weighted by their tokens.
    for (pair, step) in found[2..10].chunks(2).zip(&steps) {
        let [low, high] = [0, 1].map(|i| pair[i]["loss"].as_f64().unwrap());
        let loss = step["loss"].as_f64().unwrap();
        assert!(loss >= low.min(high) - 1e-6 && loss <= low.max(high) + 1e-6, "{pair:?} {step}");
    }
    let evaluated = samples("evaluated", "eval_steps = 2\n");
    assert_eq!(evaluated.len(), 12, "an evaluation within the run leaves no samples");
    let page = fs::read_to_string(p.path("own/report.html")).unwrap();
    assert!(page.contains("before training") && !page.contains("before training (SFT)"));
}

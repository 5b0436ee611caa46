//! A wrong config file is refused with what is wrong, where, and the remedy; a correct one is read back equal.

use std::path::Path;

use fourfold::config;
use fourfold::config::{Config, EvalSize, LrScheduler, Paths, RecomputeSetting, RewardLoss, Stage, TargetModules};
use fourfold::error::exit_code;

fn load(text: &str, set: &[&str]) -> anyhow::Result<Config> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.toml");
    std::fs::write(&file, text).unwrap();
    config::load(&file, &set.iter().map(|text| text.to_string()).collect::<Vec<_>>())
}

/// The message without the folder of the file; the error must be the user's fault (exit code 2).
fn message(text: &str, set: &[&str]) -> String {
    let error = load(text, set).expect_err(text);
    assert_eq!(exit_code(&error), 2, "{error:#}");
    let message = format!("{error:#}");
    match message.find("run.toml: ") {
        Some(at) => message[at..].to_owned(),
        None => message,
    }
}

const BASE: &str = "[base]\npath = \"m.gguf\"\n";

#[track_caller]
fn refuses(section: &str, expected: &str) {
    let found = message(&format!("{BASE}{section}"), &[]);
    assert!(found.contains(expected), "\nfound:    {found}\nexpected: {expected}");
    assert!(found.starts_with("run.toml: "), "{found}");
}

#[test]
fn an_unknown_key_names_file_section_key_and_the_nearest_key() {
    assert_eq!(
        message(&format!("{BASE}[ppo]\nkl_coeff = 0.1\n"), &[]),
        "run.toml: [ppo] has no key \"kl_coeff\"; did you mean \"kl_coef\"?"
    );
    refuses("[sft]\nlearnign_rate = 1e-4", "[sft] has no key \"learnign_rate\"; did you mean \"learning_rate\"?");
    refuses("[data]\npath = \"x\"\nmaxrows = 3", "did you mean \"max_rows\"?");
}

#[test]
fn all_unknown_keys_are_told_at_once_in_the_files_order_and_those_of_set_behind() {
    let text = format!(
        "zeta = 1\n{BASE}[sft]\nwd = 0.1\nlearning_rate = 1e-4\nlr = 1e-4\n[modle]\npath = \"x\"\n[ppo]\n\
         [[ppo.reward]]\nkind = \"length\"\nmax_tokens = 8\nwieght = 2\n[[ppo.reward]]\nkind = \"length\"\nmax_tokens = 9\n\
         weigth = 2\n"
    );
    let found = message(&text, &["sft.warmup=3", "lora.r=4", "lora.alpha=8"]);
    let lines: Vec<&str> = found.lines().map(str::trim).collect();
    let all = [
        "run.toml: there is no key \"zeta\" outside the sections; ",
        "run.toml: [sft] has no key \"wd\"; it is [sft] weight_decay here",
        "run.toml: [sft] has no key \"lr\"; it is [sft] learning_rate here",
        "run.toml: there is no section [modle]; ",
        "run.toml: [[ppo.reward]] has no key \"wieght\"; did you mean \"weight\"?",
        "run.toml: [[ppo.reward]] has no key \"weigth\"; did you mean \"weight\"?",
        "--set sft.warmup=3: [sft] has no key \"warmup\"; ",
        "--set lora.alpha=8: [lora] has no key \"alpha\"; ",
    ];
    let lines = &lines[lines.len() - all.len()..];
    for (line, want) in lines.iter().zip(all) {
        assert!(line.contains(want), "{want}\n{found}");
    }
    let whole = load(&text, &["sft.warmup=3", "lora.alpha=8"]).unwrap_err().to_string();
    assert!(whole.starts_with("8 keys or sections are unknown:\n  "), "{whole}");
    // What is wrong with a value is told once the keys are known.
    let found = message(&format!("{BASE}[sft]\nlr = 1\nwarmup_steps = \"x\"\nwd = 1\n"), &[]);
    assert!(found.contains("\"lr\"") && found.contains("\"wd\"") && !found.contains("whole number"), "{found}");
    let found = message(&format!("{BASE}[sft]\nwarmup_steps = \"x\"\n"), &[]);
    assert!(found.contains("[sft] warmup_steps must be a whole number"), "{found}");
}

#[test]
fn a_revision_outside_the_sections_is_sent_to_the_base_before_the_data() {
    let found = message(&format!("revision = \"main\"\n{BASE}[sft]\n"), &[]);
    let says = "; in [base]: a model's revision is a part of its path: path = \"owner/name@revision\"; [data] has it, for records";
    assert!(found.ends_with(says), "{found}");
    let found = message(&format!("{BASE}[sft]\nrevision = \"main\"\n"), &[]);
    assert!(found.ends_with(says), "{found}");
}

#[test]
fn deepspeed_chats_lora_has_no_place_for_other_scales_and_starts() {
    let dschat = |more: &str| format!("[lora]\ncompat = \"dschat\"\n{more}");
    for (more, key) in [
        ("lora_alpha = 32", "lora_alpha"),
        ("init_lora_weights = \"pissa\"", "init_lora_weights"),
        ("use_rslora = true", "use_rslora"),
        ("use_dora = true", "use_dora"),
        ("alpha_pattern = { q_proj = 4.0 }", "alpha_pattern"),
    ] {
        refuses(
            &dschat(more),
            &format!("[lora] compat = \"dschat\" means a scale of 1/r and DeepSpeed-Chat's start, beside which {key}"),
        );
    }
    for fine in ["r = 4", "lora_alpha = 1", "init_lora_weights = \"dschat\""] {
        let config = load(&format!("{BASE}{}", dschat(fine)), &[]).unwrap();
        assert_eq!(config.lora.alpha(), 1.0, "{fine}");
    }
}

#[test]
fn an_unknown_section_names_the_nearest_section() {
    refuses("[rewards]\ncenter = true", "there is no section [rewards]; did you mean \"reward\"?");
    refuses("[zzz]\na = 1", "there is no section [zzz]; there are \"base\", ");
}

#[test]
fn a_key_in_the_wrong_section_or_of_another_trainer_is_pointed_home() {
    refuses("[ppo]\nmax_length = 3", "[data] has it");
    refuses("[sft]\nseed = 3", "seed stands at the top of the file");
    let here = |section: &str, key: &str, ours: &str| {
        refuses(&format!("[{section}]\n{key} = 3"), &format!("[{section}] has no key {key:?}; it is {ours} here"));
    };
    for (section, key, ours) in [
        ("lora", "lora_rank", "[lora] r"),
        ("lora", "alpha", "[lora] lora_alpha"),
        ("sft", "lora_target", "[lora] target_modules"),
        ("sft", "cutoff_len", "[data] max_length"),
        ("dpo", "max_seq_length", "[data] max_length"),
        ("ppo", "model", "[base] path"),
        ("sft", "model_name_or_path", "[base] path"),
        ("sft", "dataset", "[data] path"),
        ("sft", "lr", "[sft] learning_rate"),
        ("sft", "batch_size", "[sft] per_device_train_batch_size"),
        ("sft", "grad_clip", "[sft] max_grad_norm"),
        ("sft", "out", "output_dir"),
        ("ppo", "bs", "[ppo] batch_size"),
        ("ppo", "per_device_train_batch_size", "[ppo] micro_batch_size"),
        ("ppo", "kl", "[ppo] kl_coef"),
        ("ppo", "beta", "[ppo] kl_coef"),
        ("ppo", "init_kl_coef", "[ppo] kl_coef"),
        ("ppo", "clip_ratio", "[ppo] cliprange"),
        ("ppo", "ppo_epochs", "[ppo] num_ppo_epochs"),
        ("ppo", "critic_lr", "[ppo] critic_learning_rate"),
        ("ppo", "ptx_coef", "[ppo.ptx] coef"),
        ("ppo", "actor", "[ppo] adapter"),
        ("ppo", "ACTOR", "[ppo] adapter"),
        ("grpo", "actor", "[grpo] adapter"),
        ("grpo", "reward_model", "[grpo] reward_adapter"),
        ("grpo", "init_kl_coef", "[grpo] beta"),
        ("distill", "student", "[distill] adapter"),
        ("distill", "teacher", "[teacher] path"),
    ] {
        here(section, key, ours);
    }
    refuses("[ppo]\nKL_Coef = 0.1", "did you mean \"kl_coef\"?");
    refuses("[ppo]\nkl-coef = 0.1", "did you mean \"kl_coef\"?");
    let base = message("[base]\nfiles = 3", &[]);
    assert_eq!(base, "run.toml: [base] has no key \"files\"; it is [base] path here");
    let others = "it belongs into another section: [dpo], [kto], [distill], [grpo], [rloo] beta; [ppo] kl_coef";
    refuses("[sft]\nbeta = 0.1", others);
    refuses("[dpo]\nkl = 0.1", "it belongs into another section: [ppo] kl_coef; [grpo], [rloo] beta");
    let found = message("kl_coef = 0.1\n[base]\npath = \"m\"", &[]);
    assert!(found.contains("there is no key \"kl_coef\" outside the sections; it is [ppo] kl_coef; [grpo], [rloo]"));
    let found = message("bf16 = true\n[base]\npath = \"m\"", &[]);
    assert!(found.contains("outside the sections; products are computed in [base] compute_dtype"), "{found}");
}

#[test]
fn a_key_that_stands_for_nothing_here_is_refused_with_the_reason() {
    for (section, key, said) in [
        ("ppo", "critic_adapter", "[ppo] critic = \"reward\", \"actor\" or \"own\" says what it starts as"),
        ("grpo", "critic_adapter", "a group method has no critic"),
        ("ppo", "kl_penalty", "kl_coef is the weight of the KL penalty"),
        ("ppo", "gradient_accumulation_steps", "an optimizer step batch_size / num_mini_batches"),
        ("ppo", "num_train_epochs", "total_episodes says how long a run is"),
        ("ppo", "reward_funcs", "[[ppo.reward]]"),
        ("ppo", "logging_steps", "every iteration is logged"),
        ("dpo", "ref_model", "the reference is what training starts from: the section's adapter over [base]"),
        ("sft", "max_steps", "num_train_epochs says how long a run is"),
        ("sft", "packing", "sequences are packed"),
        ("sft", "bf16", "[base] compute_dtype"),
        ("sft", "load_in_4bit", "[base] quantize = \"nf4\""),
        ("sft", "val_size", "[data] eval_fraction or eval_rows"),
        ("sft", "resume_from_checkpoint", "`--resume`"),
        ("sft", "overwrite_output_dir", "`--overwrite`"),
        ("lora", "lora_dropout", "adapters have no dropout here"),
        ("lora", "modules_to_save", "nothing of the base itself is trained"),
    ] {
        refuses(&format!("[{section}]\n{key} = 3"), said);
    }
    for (section, said) in [("model", "the model is in [base]"), ("peft", "[lora]"), ("trainer", "in its own section")]
    {
        refuses(&format!("[{section}]\na = 1"), said);
    }
}

#[test]
fn a_key_is_not_sent_back_to_the_section_that_it_is_in_or_to_a_key_of_another_meaning() {
    for (section, key, said) in [
        ("sft", "save_strategy", "; [checkpoint] save_steps says after how many optimizer steps"),
        ("checkpoint", "save_strategy", "; [checkpoint] save_steps says"),
        ("sft", "save_only_model", "; a checkpoint has the optimizer's state"),
        ("sft", "save_safetensors", "; adapters are always saved as safetensors"),
        ("base", "trust_remote_code", "; no code of a model's folder is run; remove the key"),
        ("base", "model_init_kwargs", "; [base] path, quantize, compute_dtype and device describe the model"),
        ("base", "revision", "; a model's revision is a part of its path: path = \"owner/name@revision\""),
        ("teacher", "revision", "; a model's revision is a part of its path"),
        ("ppo", "adv_estimator", "; it is [ppo] advantage_estimator here"),
        ("ppo", "micro_rollout_batch_size", "; it is [ppo] local_rollout_forward_batch_size here"),
        ("grpo", "micro_rollout_batch_size", "; it is [grpo] local_rollout_forward_batch_size here"),
        ("ppo", "freezing_actor_steps", "; it is [ppo] critic_warmup here"),
        ("grpo", "freezing_actor_steps", "; a group method has no critic"),
        ("grpo", "adv_estimator", "; the section itself names the estimator, and [ppo] advantage_estimator has others"),
        ("ppo", "reward_clip_range", "; it is score_clip here: one number c"),
        ("dpo", "max_completion_length", "; [data] max_length bounds prompt and response together"),
        ("distill", "max_completion_length", "; it is [distill] max_new_tokens here"),
        ("sft", "warmup_ratio", "is a number of optimizer steps, not a share of them"),
        ("ppo", "adam_offload", "; adapters and the optimizer's moments are always in the host's memory"),
        ("sft", "use_remove_padding", "; sequences are packed and have no pads"),
        ("sft", "eval_packing", "; sequences are packed and have no pads"),
        ("sft", "packing_samples", "; sequences are packed and have no pads"),
        ("lora", "lora_bias", "; the branches have no biases"),
        ("lora", "target_parameters", "[lora] target_modules names, not of single parameters"),
        ("lora", "use_qalora", "; QA-LoRA is not here"),
        ("lora", "fan_in_fan_out", "; the base's files say which way round a matrix is stored"),
        ("ppo", "reward_model_type", "; a reward model is an adapter, reward_adapter of the stage's section"),
        ("ppo", "remote_rm_url", "kind = \"http\" and url"),
        (
            "sft",
            "lr_scheduler_kwargs",
            "; the courses of lr_scheduler_type (linear, cosine, constant) have no parameters",
        ),
        ("sft", "disable_tqdm", "; `--quiet` on the command line"),
        ("sft", "eval_batch_size", "; it is [sft] per_device_eval_batch_size here"),
        ("grpo", "per_device_eval_batch_size", "; local_rollout_forward_batch_size says how many prompts are answered"),
        ("sft", "train_on_prompt", "; [sft] completion_only_loss = false learns the prompts, too"),
        ("sft", "mask_history", "; SFT learns every response of a dialogue"),
        ("sft", "load_best_model_at_end", "; the result is the adapter after the last step"),
        ("dpo", "reference_free", "; every preference loss here compares with the reference"),
    ] {
        let found = message(&format!("[{section}]\n{key} = 3"), &[]);
        assert!(found.contains(said), "[{section}] {key}: {found}");
    }
    for (section, said) in [
        ("deepspeed", "`mpirun` starts them"),
        ("quantization", "[base] quantize = \"nf4\""),
        ("wandb", "`wandb sync` reads"),
    ] {
        refuses(&format!("[{section}]\na = 1"), &format!("there is no section [{section}]; "));
        refuses(&format!("[{section}]\na = 1"), said);
    }
}

#[test]
fn a_key_of_a_stage_outside_the_sections_gets_the_hint_of_that_stage() {
    let flat = |key: &str, stage: &str| message(&format!("{key} = 3\n[{stage}]\n{BASE}"), &[]);
    for (stage, key, said) in [
        ("ppo", "num_episodes", "outside the sections; in [ppo]: total_episodes says how long a run is"),
        ("grpo", "num_episodes", "; in [grpo]: num_train_epochs or max_steps says"),
        ("ppo", "use_vllm", "; in [ppo]: responses are sampled by this program, or by a vLLM server"),
        ("rloo", "stop_token", "; in [rloo]: a response ends at the end tokens"),
        ("sft", "eval_strategy", "; in [sft]: eval_steps says"),
        ("ppo", "eval_strategy", "; in [ppo]: eval_prompts and eval_every say"),
        ("ppo", "kl_penalty", "; in [ppo]: kl_coef is the weight of the KL penalty"),
        ("grpo", "kl_penalty", "; in [grpo]: it is beta here"),
        ("ppo", "mini_batch_size", "; in [ppo]: a rollout has batch_size responses"),
        ("ppo", "min_p", "; in [ppo]: sampling has temperature, top_k and top_p"),
        ("ppo", "repetition_penalty", "; in [ppo]: sampling has temperature, top_k and top_p"),
        ("grpo", "log_completions", "; in [grpo]: save_samples says"),
        ("ppo", "max_epochs", "; in [ppo]: total_episodes says how long a run is"),
        ("sft", "max_epochs", "num_train_epochs"),
        ("ppo", "rollout_batch_size", "[ppo] batch_size"),
        ("grpo", "rollout_batch_size", "; in [grpo]: a rollout has per_device_train_batch_size"),
    ] {
        let found = flat(key, stage);
        assert!(found.contains(said), "{key} beside [{stage}]: {found}");
    }
    // Without a stage's section, what each stage makes of it.
    let found = message(&format!("eval_strategy = \"steps\"\n{BASE}"), &[]);
    assert!(found.contains("; in [sft], [reward], [dpo], [kto], [distill]: eval_steps says"), "{found}");
    assert!(found.contains("; in [ppo], [grpo], [rloo]: eval_prompts and eval_every say"), "{found}");
    let found = message(&format!("reward_adapters = [\"a\"]\n{BASE}"), &[]);
    assert!(found.contains("; it is [ppo], [grpo], [rloo] reward_adapter here"), "{found}");
}

#[test]
fn the_values_of_other_trainers_are_pointed_to_ours() {
    for (section, line, said) in [
        ("ppo", "advantage_estimator = \"reinforce++\"", "; did you mean \"reinforce_plus_plus\"?"),
        ("ppo", "advantage_estimator = \"REINFORCE++-baseline\"", "; did you mean \"reinforce_plus_plus_baseline\"?"),
        ("ppo", "advantage_estimator = \"reinforce_baseline\"", "; did you mean \"reinforce_plus_plus_baseline\"?"),
        ("base", "compute_dtype = \"bfloat16\"", "; did you mean \"bf16\"?"),
        ("base", "compute_dtype = \"float16\"", "; did you mean \"f16\"?"),
        ("base", "compute_dtype = \"float32\"", "; did you mean \"f32\"?"),
        (
            "dpo",
            "loss_type = \"simpo\"",
            "\"hinge\"; that loss has no reference, and every loss here compares with one",
        ),
        ("dpo", "loss_type = \"kto_pair\"", "\"hinge\"; KTO is a stage of its own, `fourfold kto`"),
        ("dpo", "loss_type = \"exo_pair\"", "\"hinge\"; that loss is not here"),
        ("dpo", "loss_type = \"sigmoidd\"", "; did you mean \"sigmoid\"?"),
    ] {
        let found = message(&format!("[{section}]\n{line}"), &[]);
        assert!(found.contains(said), "{line}: {found}");
    }
}

#[test]
fn a_key_below_a_table_of_its_section_may_be_the_tables_own_misspelt() {
    let of = |key: &str| format!("[ppo]\n[[ppo.reward]]\nkind = \"adapter\"\n{key} = \"a\"");
    refuses(&of("adapter"), "so write adapter above, before the first such table; or did you mean \"adapters\"?");
    refuses(&of("path"), "[[ppo.reward]] has no key \"path\"; it is adapters here");
    refuses(&of("type"), "it is kind here");
    refuses("[ppo.rollout]\nbase_url = \"a\"", "[ppo.rollout] has no key \"base_url\"; it is urls here");
    refuses("[data.columns]\noutput = \"a\"", "[data.columns] has no key \"output\"; it is completion here");
    refuses("[data.columns]\nchosn = \"a\"", "[data.columns] has no key \"chosn\"; did you mean \"chosen\"?");
    refuses("[checkpoint]\nevery = 3", "it is save_steps here");
    refuses("[memory]\ngpu = \"1GiB\"", "it is device_limit here");
    refuses(&of("max_tokenz"), "[[ppo.reward]] has no key \"max_tokenz\"; did you mean \"max_tokens\"?");
}

#[test]
fn a_part_of_one_keys_name_is_a_hint_at_that_key() {
    refuses("[sft]\naccumulation = 3", "did you mean \"gradient_accumulation_steps\"?");
    refuses("[ppo]\nmini_batches = 3", "did you mean \"num_mini_batches\"?");
    // Several keys have the part.
    refuses("[ppo]\ncoef = 3", "there are \"compat\"");
}

#[test]
fn an_unknown_enum_value_lists_the_values_and_names_the_nearest() {
    assert_eq!(
        message(&format!("{BASE}[sft]\nlr_scheduler_type = \"cosin\"\n"), &[]),
        "run.toml: [sft] lr_scheduler_type = \"cosin\" is not one of \"linear\", \"cosine\", \"constant\"; \
         did you mean \"cosine\"?"
    );
    refuses("[data]\npath = \"x\"\nformat = \"prefs\"", "did you mean \"preference\"?");
    refuses("[ppo]\nkl_estimator = 1", "[ppo] kl_estimator must be one of \"k1\", \"k2\", \"k3\", \"exact\", not 1");
}

#[test]
fn a_wrong_type_names_the_key_in_the_users_words() {
    refuses("[ppo]\nkl_coef = \"high\"", "[ppo] kl_coef must be a number, not the string \"high\"");
    refuses("[ppo]\nbatch_size = -1", "[ppo] batch_size must be a whole number, 0 or more, not integer -1");
    refuses("[ppo]\nbatch_size = 1.5", "[ppo] batch_size must be a whole number, 0 or more, not floating point 1.5");
    refuses("[reward]\ncenter = \"yes\"", "[reward] center must be true or false");
    refuses("[data]\npath = 3", "[data] path must be a path or a list of paths");
    refuses("[lora]\ntarget_modules = 3", "[lora] target_modules must be \"all-linear\", a list of module names");
    assert_eq!(message("base = 3", &[]), "run.toml: base must be a section of keys, not integer 3");
    assert!(message("seed = -1\n[base]\npath = \"m\"", &[]).starts_with("run.toml: seed must be a whole number"));
}

#[test]
fn missing_files_syntax_errors_and_missing_keys_are_named() {
    let error = config::load(Path::new("/nowhere/run.toml"), &[]).unwrap_err();
    assert!(error.to_string().starts_with("/nowhere/run.toml: ") && exit_code(&error) == 2, "{error}");
    let found = message("[base\npath = 1", &[]);
    assert!(found.contains("line 1"), "{found}");
    assert!(message("seed = 1", &[]).contains("the section [base] is missing"));
    assert_eq!(message("[base]\n", &[]), "run.toml: [base] needs the key \"path\"");
    refuses("[ppo]\n", "[ppo] needs reward_adapter");
    refuses("[data]\n", "[data] needs path");
    let bare = load(BASE, &[]).unwrap();
    assert!(bare.ppo().unwrap_err().to_string().contains("[ppo] is missing"));
    assert!(bare.data().unwrap_err().to_string().contains("[data] is missing"));
}

#[test]
fn values_out_of_range_come_with_a_remedy() {
    let ppo = "[ppo]\nreward_adapter = \"rm\"\n";
    for (lines, expected) in [
        (
            "batch_size = 50\nnum_mini_batches = 4",
            "batch_size = 50 is not a multiple of num_mini_batches = 4; try 48 or 52",
        ),
        ("total_episodes = 10", "total_episodes = 10 is not a multiple of batch_size = 8; try 8 or 16"),
        ("total_episodes = 3", "total_episodes = 3 is not a multiple of batch_size = 8; try 8"),
        ("batch_size = 0", "batch_size = 0 does nothing; use 1 or more"),
        ("cliprange = 1.5", "cliprange = 1.5 is out of range; use a number between 0 and 1, usually 0.2"),
        ("gamma = 1.01", "gamma = 1.01 is out of range"),
        ("temperature = -0.5", "temperature = -0.5 is out of range"),
        ("top_p = 0", "top_p = 0 is out of range"),
        ("kl_coef = nan", "kl_coef = NaN is out of range"),
        ("learning_rate = 3", "learning_rate = 3 is out of range; use a number above 0 and below 1"),
        ("critic_learning_rate = 0", "critic_learning_rate = 0 is out of range"),
        ("adam_beta2 = 1.0", "adam_beta2 = 1 is out of range"),
        ("max_grad_norm = -1", "max_grad_norm = -1 is out of range"),
        ("num_generations = 3", "batch_size = 8 is not a multiple of num_generations = 3; try 6 or 9"),
        ("advantage_estimator = \"rloo\"", "num_generations = 1 leaves nothing to compare a response with"),
        (
            "advantage_estimator = \"grpo\"\nnum_generations = 2\ncritic_warmup = 1",
            "critic_warmup = 1 without a critic",
        ),
        ("kl_in = \"loss\"", "kl_in = \"loss\" with kl_estimator = \"k1\": its gradient is 0 on average"),
        ("adap_kl_ctrl = true\nkl_coef = 0", "adap_kl_ctrl = true multiplies kl_coef"),
        ("policy_loss = \"kl_penalty\"", "policy_loss = \"kl_penalty\" with a single step a rollout"),
        ("overlong_buffer_len = 65", "overlong_buffer_len = 65 is more than response_length = 64"),
        ("use_score_norm = true", "use_score_norm = true works with use_score_scaling = true only"),
        ("dual_clip = 1.0", "dual_clip = 1 is out of range"),
        ("ema_decay = 1.5", "ema_decay = 1.5 is out of range"),
        ("target = 0.0", "target = 0 is out of range"),
        ("temperature = 0\nnum_generations = 2", "temperature = 0 gives a prompt the same response"),
        ("compat = \"dschat\"\ntemperature = 1\nnum_generations = 2", "compat = \"dschat\" drops responses"),
        ("compat = \"dschat\"\nadvantage_estimator = \"a2c\"", "compat = \"dschat\" drops responses"),
    ] {
        refuses(&format!("{ppo}{lines}"), &format!("[ppo] {expected}"));
    }
    for (section, expected) in [
        ("[lora]\nr = 0", "[lora] r = 0 does nothing"),
        ("[lora]\ntarget_modules = []", "[lora] target_modules has no names"),
        ("[lora]\ntarget_modules = \"q_(proj\"", "neither \"all-linear\" nor a regular expression"),
        ("[lora]\nlayers_to_transform = []", "leaves no block"),
        ("[data]\npath = []", "[data] needs path"),
        ("[data]\npath = \"x\"\nmax_length = 1", "[data] max_length = 1 leaves no room"),
        ("[data]\npath = \"x\"\neval_fraction = 1.0", "[data] eval_fraction = 1 is out of range"),
        ("[data]\npath = \"x\"\neval_fraction = 0.1\neval_rows = 4", "keep one of them"),
        ("[data]\npath = \"x\"\nmax_rows = 0", "max_rows = 0 reads nothing"),
        ("[sft]\nlogging_steps = 0", "[sft] logging_steps = 0 does nothing"),
        ("[sft]\nmax_tokens_per_batch = 0", "[sft] max_tokens_per_batch = 0 does nothing"),
        ("[reward]\nmax_tokens_per_batch = 0", "[reward] max_tokens_per_batch = 0 does nothing"),
        ("[reward]\ncompat = \"dschat\"\nloss = \"last_token\"", "has the loss \"divergence_to_end\" only"),
        ("[reward]\nnum_padding_at_beginning = 1", "counts pads, and rows have none"),
        ("[reward]\nlearning_rate = 0.0", "[reward] learning_rate = 0 is out of range"),
    ] {
        refuses(section, expected);
    }
}

#[test]
fn an_unset_variable_in_a_path_is_named_with_its_key() {
    refuses(
        "[data]\npath = \"$FOURFOLD_TEST_UNSET/x\"",
        "[data] path: the path \"$FOURFOLD_TEST_UNSET/x\" uses $FOURFOLD_TEST_UNSET, which is not set",
    );
    let home = std::env::var("HOME").unwrap();
    let config = load(&format!("{BASE}[data]\npath = [\"~/a\", \"${{HOME}}/b\", \"c/d\"]"), &[]).unwrap();
    let expected = [format!("{home}/a"), format!("{home}/b"), "c/d".to_owned()].map(Into::into).to_vec();
    assert_eq!(config.data().unwrap().path, Paths::List(expected));
}

#[test]
fn an_override_wins_over_the_file_and_its_errors_name_it() {
    let text = format!("seed = 1\n{BASE}[ppo]\nreward_adapter = \"rm\"\nkl_coef = 0.2\n");
    let config = load(&text, &["ppo.kl_coef=0.3", "seed=7", "data.path=d.jsonl"]).unwrap();
    assert_eq!((config.seed, config.ppo().unwrap().kl_coef), (7, 0.3));
    assert_eq!(config.data().unwrap().path, Paths::One("d.jsonl".into()));
    let found = message(&text, &["ppo.kl_coeff=0.3"]);
    assert_eq!(found, "--set ppo.kl_coeff=0.3: [ppo] has no key \"kl_coeff\"; did you mean \"kl_coef\"?");
    let found = message(&text, &["ppo.kl_coef=high"]);
    assert_eq!(found, "--set ppo.kl_coef=high: [ppo] kl_coef must be a number, not the string \"high\"");
    let found = message(&text, &["lroa.r=3"]);
    assert_eq!(found, "--set lroa.r=3: there is no section [lroa]; did you mean \"lora\"?");
    assert!(message("seed = 1", &["lora.r=3"]).starts_with("run.toml: the section [base] is missing"));
    assert_eq!(message("seed = 1\n[base]\n", &[]), "run.toml: [base] needs the key \"path\"");
    // An override of one key does not take the blame for another.
    assert!(message(&format!("{text}gama = 1"), &["ppo.lam=0.9"]).starts_with("run.toml: [ppo] has no key \"gama\""));
}

#[test]
fn the_resolved_config_holds_every_default_and_reads_back_equal() {
    let text = format!(
        "{BASE}[reward_base]\npath = \"r\"\n[lora]\nr = 4\ntarget_modules = [\"q_proj\"]\nlayers_to_transform = [1, 2]\n\
         [data]\npath = \"d\"\neval_rows = 3\n[sft]\nlr_scheduler_type = \"cosine\"\n[reward]\nloss = \"divergence_to_end\"\n\
         [ppo]\nreward_adapter = \"rm\"\ncheckpoint = \"block\"\nlearning_rate = 1\n",
    )
    .replace("learning_rate = 1\n", "learning_rate = 1e-5\n");
    let config = load(&text, &[]).unwrap();
    assert_eq!(config.data().unwrap().eval_size(), EvalSize::Rows(3));
    assert_eq!(config.lora.target_modules, TargetModules::List(vec!["q_proj".into()]));
    assert_eq!(config.sft().lr_scheduler_type, LrScheduler::Cosine);
    assert_eq!(config.reward().loss, RewardLoss::DivergenceToEnd);
    assert_eq!(config.ppo().unwrap().checkpoint, RecomputeSetting::Block);
    assert_eq!(config.ppo().unwrap().critic_learning_rate(), 1e-5);
    assert_eq!(config.output_dir(Stage::Reward), Path::new("runs/reward"));
    let resolved = config.to_toml().unwrap();
    assert!(resolved.contains("adam_beta2 = 0.999") && resolved.contains("truncation = \"drop\""), "{resolved}");
    assert_eq!(load(&resolved, &[]).unwrap(), config, "{resolved}");
}

#[test]
fn the_shipped_configs_load() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/smollm2-135m");
    for stage in [Stage::Sft, Stage::Reward, Stage::Ppo] {
        let file = folder.join(format!("{}.toml", stage.name()));
        let config = config::load(&file, &["base.path=m.gguf".into(), "data.path=d.json".into()]).unwrap();
        let has = [config.sft.is_some(), config.reward.is_some(), config.ppo.is_some()];
        assert_eq!(has, [stage == Stage::Sft, stage == Stage::Reward, stage == Stage::Ppo], "{}", file.display());
        // Without the --set both are variables, and the message says which to set.
        if std::env::var_os("FOURFOLD_SMOLLM2_GGUF").is_none() {
            let error = config::load(&file, &[]).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("[base] path: ") && error.contains("$FOURFOLD_SMOLLM2_GGUF"), "{error}");
        }
    }
}

#[test]
fn a_size_without_a_unit_that_is_too_small_to_be_meant_asks_for_the_unit() {
    let p = crate::told::place();
    let says = "limit without a unit is 10 bytes; did you mean \"10GiB\"?";
    crate::told::refused(&p, "grpo grpo.toml --out o --set memory.limit=10", &[says]);
    crate::told::refused(&p, "plan grpo.toml --memory 8192", &["did you mean \"8192MiB\"?"]);
    crate::told::refused(
        &p,
        "merge --base base --adapter a --out m --max-shard-size 500",
        &["did you mean \"500GiB\"?"],
    );
}

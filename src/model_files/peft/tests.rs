//! Tests of whole adapter directories, valid and damaged, against PEFT's own files.

use half::{bf16, f16};
use safetensors::Dtype;

use super::*;
use crate::error::exit_code;
use crate::model::adapter::{HEAD_WEIGHT, LoraConfig, TargetModules};

/// The shapes of tests/golden/peft_tiny.py.
const TINY: LinearShapes = LinearShapes::llama(2, 32, 32, 16, 48);

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/peft_tiny")
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// A copy of the golden reward model's directory, to be damaged.
struct Spoilt(tempfile::TempDir);

impl Spoilt {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for file in [CONFIG_FILE, TENSORS_FILE] {
            fs::copy(golden().join("rm").join(file), dir.path().join(file)).unwrap();
        }
        Self(dir)
    }

    fn with(self, key: &str, value: Value) -> Self {
        let path = self.0.path().join(CONFIG_FILE);
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        self
    }

    fn refusal(&self, shapes: LinearShapes) -> String {
        let error = Adapter::load(self.0.path(), shapes).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    }
}

#[test]
fn what_peft_saved_loads_with_every_number() {
    let want: Value = serde_json::from_slice(&fs::read(golden().join("values.json")).unwrap()).unwrap();
    for name in ["lm", "rm"] {
        let adapter = Adapter::load(&golden().join(name), TINY).unwrap();
        let named = adapter.named_tensors();
        assert_eq!(named.len(), want[name].as_object().unwrap().len());
        for (key, tensor) in named {
            let want = &want[name][&key];
            assert_eq!(json!(tensor.dims()), want["shape"], "{key}");
            let sum: f64 = values(tensor).iter().map(|&x| f64::from(x)).sum();
            assert!((sum - want["sum"].as_f64().unwrap()).abs() < 1e-9, "{key}: both sums are of exact f64 terms");
            assert_eq!(*values(tensor).last().unwrap(), want["last"].as_f64().unwrap() as f32, "{key}");
        }
    }
}

#[test]
fn settings_of_peft_are_honoured() {
    let lm = Adapter::load(&golden().join("lm"), TINY).unwrap();
    assert_eq!(lm.pair(1, 6).unwrap().scale, 3.0, "rslora: 6 / sqrt(4)");
    assert!(lm.pair(0, 6).is_none() && lm.pair(1, 1).is_none() && lm.head().is_none());
    let rm = Adapter::load(&golden().join("rm"), TINY).unwrap();
    assert_eq!(rm.pair(0, 1).unwrap().scale, 1.5);
    assert_eq!(rm.head().unwrap().bias, 0.0);
}

#[test]
fn saved_adapters_are_read_back_equal_and_have_equal_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let head = ScoreHead { weight: Tensor::full(0.25f32, (1, 32), &Device::Cpu).unwrap(), bias: -1.5 };
    let config = LoraConfig {
        r: 3,
        lora_alpha: 4.5,
        use_rslora: true,
        target_modules: TargetModules::Regex(r".*\.(k|up)_proj".into()),
        layers_to_transform: Some(vec![1]),
        ..LoraConfig::default()
    };
    let origin = Provenance { base_model: Some("a/base".into()), base_fingerprint: Some("sha256:ab".into()) };
    let start = Adapter::init(config, TINY, 9).unwrap().with_provenance(origin).with_score_head(Some(head)).unwrap();
    let bytes = |dir: &Path| [CONFIG_FILE, TENSORS_FILE].map(|f| fs::read(dir.join(f)).unwrap());
    let (one, two) = (dir.path().join("deep/one"), dir.path().join("two"));
    start.save(&one).unwrap();
    start.save(&two).unwrap();
    assert_eq!(bytes(&one), bytes(&two));

    let back = Adapter::load(&one, TINY).unwrap();
    assert_eq!(back.provenance(), start.provenance());
    assert_eq!((back.config().scaling(), back.head().unwrap().bias), (start.config().scaling(), -1.5));
    let (a, b) = (start.named_tensors(), back.named_tensors());
    assert_eq!((a.len(), b.len()), (5, 5));
    for ((name, tensor), (other_name, other)) in a.into_iter().zip(b) {
        assert_eq!((name, values(tensor)), (other_name, values(other)));
    }
    Adapter::load(&golden().join("rm"), TINY).unwrap().save(&one).unwrap();
    assert_eq!(Adapter::load(&one, TINY).unwrap().config().r, 2, "an adapter's directory is replaced");
    let left: Vec<_> = fs::read_dir(dir.path().join("deep")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["one"], "no temporary file is left");
}

#[test]
fn without_bias_and_fingerprint_the_file_has_pefts_tensors_only() {
    let dir = tempfile::tempdir().unwrap();
    Adapter::load(&golden().join("rm"), TINY).unwrap().save(&dir.path().join("rm")).unwrap();
    let ours = fs::read(dir.path().join("rm").join(TENSORS_FILE)).unwrap();
    let theirs = fs::read(golden().join("rm").join(TENSORS_FILE)).unwrap();
    let names = |bytes: &[u8]| {
        let mut names: Vec<String> =
            SafeTensors::deserialize(bytes).unwrap().names().into_iter().map(Into::into).collect();
        names.sort();
        names
    };
    assert_eq!(names(&ours), names(&theirs));
}

#[test]
fn saving_over_other_files_is_refused_and_keeps_them() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = Adapter::load(&golden().join("lm"), TINY).unwrap();
    let thesis = dir.path().join("thesis.txt");
    fs::write(&thesis, "years").unwrap();
    for target in [dir.path(), thesis.as_path()] {
        let error = adapter.save(target).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
    }
    assert_eq!(fs::read_to_string(&thesis).unwrap(), "years");
}

#[test]
fn settings_that_would_change_the_model_are_refused_by_name() {
    for (key, value) in [
        ("use_dora", json!("yes")),
        ("rank_pattern", json!({"q_proj": "many"})),
        ("alpha_pattern", json!({"q_proj": null})),
        ("rank_pattern", json!(["q_proj"])),
        ("bias", json!("all")),
        ("modules_to_save", json!(["score", "embed_tokens"])),
        ("init_lora_weights", json!("pissa")),
        ("layer_replication", json!([[0, 1]])),
        ("a_setting_of_next_year", json!(7)),
        ("peft_type", json!("LOHA")),
        ("task_type", json!("TOKEN_CLS")),
        ("r", json!(-2)),
        ("lora_alpha", json!("much")),
        ("target_modules", json!(null)),
        ("layers_to_transform", json!(["first"])),
    ] {
        let message = Spoilt::new().with(key, value).refusal(TINY);
        assert!(message.contains(&format!("{key} = ")) && message.contains(CONFIG_FILE), "{message}");
    }
}

#[test]
fn an_adapter_of_another_base_is_refused_with_both_shapes() {
    let message = Spoilt::new().refusal(LinearShapes::llama(2, 32, 32, 16, 64));
    assert!(message.contains("gate_proj.lora_B.weight is [48, 2]") && message.contains("needs [64, 2]"), "{message}");
    // Shallower base: the second layer's targets match nothing. Wider rank than the base: bounded.
    assert!(Spoilt::new().refusal(LinearShapes::llama(1, 32, 32, 16, 48)).contains("layers.1."));
    assert!(Spoilt::new().with("r", json!(1u64 << 60)).refusal(TINY).contains("rank"));
    let list = json!(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
    let message = Spoilt::new().with("target_modules", list.clone()).refusal(LinearShapes::llama(1, 32, 32, 16, 48));
    assert!(message.contains("layers.1.") && message.contains("another base"), "{message}");
    let message = Spoilt::new().with("target_modules", list).refusal(LinearShapes::llama(3, 32, 32, 16, 48));
    assert!(message.contains("layers.2.") && message.contains("missing"), "{message}");
}

#[test]
fn heads_are_read_under_every_name_of_peft_and_trl() {
    let source = fs::read(golden().join("rm").join(TENSORS_FILE)).unwrap();
    let file = SafeTensors::deserialize(&source).unwrap();
    let want = values(&Adapter::load(&golden().join("rm"), TINY).unwrap().head().unwrap().weight);
    for (listed, name) in [
        (json!(["score"]), "score"),
        (json!(["classifier", "score"]), "score"),
        (json!(["classifier", "score"]), "classifier"),
        (json!(["classifier"]), "classifier"),
        (json!(["v_head"]), "v_head.summary"),
        (json!(["v_head"]), "v_head"),
    ] {
        let spoilt = Spoilt::new().with("modules_to_save", listed);
        let renamed: Vec<(String, _)> = file
            .tensors()
            .into_iter()
            .map(|(key, view)| (key.replace("model.score.", &format!("model.{name}.")), view))
            .collect();
        let bytes = safetensors::serialize(renamed, None).unwrap();
        fs::write(spoilt.0.path().join(TENSORS_FILE), bytes).unwrap();
        let adapter = Adapter::load(spoilt.0.path(), TINY).unwrap();
        assert_eq!(values(&adapter.head().unwrap().weight), want, "{name}");
    }
    let message = Spoilt::new().with("modules_to_save", json!(["lm_head"])).refusal(TINY);
    assert!(message.contains("target_modules") && message.contains("score, classifier"), "{message}");
}

#[test]
fn heads_missing_from_the_config_or_the_file_are_refused() {
    let message = Spoilt::new().with("modules_to_save", Value::Null).refusal(TINY);
    assert!(message.contains(HEAD_WEIGHT), "{message}");
    let lm = Spoilt::new();
    fs::copy(golden().join("lm").join(TENSORS_FILE), lm.0.path().join(TENSORS_FILE)).unwrap();
    assert!(lm.refusal(TINY).contains("missing"));
}

#[test]
fn truncated_files_and_nan_are_refused() {
    let spoilt = Spoilt::new();
    let path = spoilt.0.path().join(TENSORS_FILE);
    let whole = fs::read(&path).unwrap();
    for keep in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..keep]).unwrap();
        assert!(spoilt.refusal(TINY).contains("truncated or damaged"), "{keep}");
    }
    let mut nan = whole.clone();
    let end = nan.len();
    nan[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, &nan).unwrap();
    assert!(spoilt.refusal(TINY).contains("holds NaN"));
    fs::remove_file(&path).unwrap();
    assert!(spoilt.refusal(TINY).contains(TENSORS_FILE));
    fs::write(spoilt.0.path().join(CONFIG_FILE), "{").unwrap();
    fs::write(&path, &whole).unwrap();
    assert!(spoilt.refusal(TINY).contains("JSON"));
}

#[test]
fn half_precision_files_are_read_as_f32() {
    let spoilt = Spoilt::new();
    let path = spoilt.0.path().join(TENSORS_FILE);
    let whole = fs::read(&path).unwrap();
    let source = SafeTensors::deserialize(&whole).unwrap();
    let exact = Adapter::load(spoilt.0.path(), TINY).unwrap();
    for (dtype, relative) in [(Dtype::F16, 1e-3f32), (Dtype::BF16, 8e-3)] {
        let halves: Vec<(String, Vec<usize>, Vec<u8>)> = source
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let floats = view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b));
                let bytes = floats.flat_map(|x| match dtype {
                    Dtype::F16 => f16::from_f32(x).to_le_bytes(),
                    _ => bf16::from_f32(x).to_le_bytes(),
                });
                (name, view.shape().to_vec(), bytes.collect())
            })
            .collect();
        let views = halves.iter().map(|(name, shape, bytes)| {
            (name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let half = Adapter::load(spoilt.0.path(), TINY).unwrap();
        for ((name, full), (_, read)) in exact.named_tensors().into_iter().zip(half.named_tensors()) {
            for (x, y) in values(full).into_iter().zip(values(read)) {
                // Half a unit in the last place of f16 (2^-11) and bf16 (2^-8), and f16's subnormal step.
                assert!((x - y).abs() <= relative * x.abs() + 6e-8, "{name}: {x} {y}");
            }
        }
    }
}

/// `PEFT_OUT=dir cargo test --release --lib -- --ignored writes_adapters_for_python`, then
/// `python tests/golden/check_peft_loads_ours.py dir/*`.
#[test]
#[ignore = "writes files for tests/golden/check_peft_loads_ours.py into $PEFT_OUT"]
fn writes_adapters_for_python() {
    let out = PathBuf::from(std::env::var("PEFT_OUT").expect("PEFT_OUT names a directory"));
    for (name, targets, layers) in [
        ("lm", TargetModules::Regex(r".*\.(q|gate)_proj".into()), Some(vec![1])),
        ("rm", TargetModules::AllLinear, None),
        ("rm_bias", TargetModules::List(vec!["mlp.up_proj".into()]), Some(vec![0])),
    ] {
        let config = LoraConfig {
            r: 4,
            lora_alpha: 6.0,
            use_rslora: true,
            target_modules: targets,
            layers_to_transform: layers,
            ..LoraConfig::default()
        };
        let mut learner = Adapter::init(config, TINY, 11).unwrap().to_trainable();
        let moved = learner.parameters().unwrap().iter().map(|t| (t + 0.125).unwrap()).collect();
        learner.replace(moved).unwrap();
        let adapter = learner.snapshot();
        let adapter = if name == "lm" { adapter } else { adapter.with_head(3).unwrap() };
        let head = adapter.head().map(|h| ScoreHead { bias: if name == "rm" { 0.0 } else { 2.5 }, ..h.clone() });
        let adapter = adapter.with_score_head(head).unwrap();
        adapter.save(&out.join(name)).unwrap();
    }
}

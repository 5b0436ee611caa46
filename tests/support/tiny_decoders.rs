//! Tiny random decoders whose weights are made from their tensors' names, here and in tests/golden/families.py alike.
//! It asserts no claim; training/families.rs and training/lora_targets.rs do.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fourfold::model::base::Base;
use fourfold::model_files::ModelFiles;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::{Value, json};

/// What a script printed of one decoder.
#[derive(Deserialize)]
pub struct Golden {
    /// Its config.json.
    pub config: Value,
    /// Its tensors.
    pub shapes: BTreeMap<String, Vec<usize>>,
    /// What it read.
    pub sequences: Vec<Vec<u32>>,
    /// What it went on with.
    #[serde(default)]
    pub greedy: Vec<Vec<u32>>,
    /// All numbers, by name.
    #[serde(skip)]
    pub numbers: BTreeMap<String, Vec<f32>>,
}

/// A file of tests/golden.
pub fn golden(path: &str) -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path);
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let text = header.metadata().as_ref().unwrap()["golden"].clone();
    let mut golden: Golden = serde_json::from_str(&text).unwrap();
    for (key, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let numbers = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        golden.numbers.insert(key, numbers);
    }
    golden
}

/// Uniform in [-1, 1): SplitMix64's finaliser of FNV-1a(name) + index; the other half is in families.py.
fn values(name: &str, count: usize) -> Vec<f32> {
    let fnv = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3);
    let start = name.bytes().fold(0xCBF2_9CE4_8422_2325, fnv);
    (0..count as u64)
        .map(|i| {
            let mut z = start.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
            ((z >> 40) as f64 / f64::from(1 << 23) - 1.0) as f32
        })
        .collect()
}

fn weight(name: &str, shape: &[usize]) -> Vec<f32> {
    let shift = if shape.len() == 1 && name.ends_with(".weight") { 1.0 } else { 0.0 };
    values(name, shape.iter().product()).iter().map(|u| shift + 0.25 * u).collect()
}

/// Tensors of these names and shapes, with their numbers.
pub fn save(path: &Path, tensors: &BTreeMap<String, Vec<usize>>) {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(n, s)| (n.clone(), s.clone(), weight(n, s).iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize_to_file(views, Some(metadata), path).unwrap();
}

/// A decoder in a folder of its own, with what is known of it.
pub struct Opened {
    /// What a script printed.
    pub golden: Golden,
    /// Files and tokenizer.
    pub checkpoint: ModelFiles,
    /// Weights.
    pub base: Base,
    /// The folder.
    pub dir: tempfile::TempDir,
}

/// Makes the decoder of a golden file and opens it.
pub fn open(path: &str) -> Opened {
    let (golden, dir) = (golden(path), tempfile::tempdir().unwrap());
    let write = |file: &str, text: String| fs::write(dir.path().join(file), text).unwrap();
    write("config.json", golden.config.to_string());
    // Bytes without a merge, of a kind that a GGUF file has a name for.
    let vocab: serde_json::Map<String, Value> = ('!'..='`').zip(0..).map(|(c, i)| (c.to_string(), json!(i))).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let model = json!({"type": "BPE", "vocab": vocab, "merges": []});
    write(
        "tokenizer.json",
        json!({"version": "1.0", "pre_tokenizer": bytes, "decoder": bytes, "model": model}).to_string(),
    );
    save(&dir.path().join("model.safetensors"), &golden.shapes);
    let checkpoint = ModelFiles::open(dir.path()).unwrap_or_else(|e| panic!("{path}: {e:#}"));
    let base = checkpoint.base().unwrap_or_else(|e| panic!("{path}: {e:#}"));
    Opened { golden, checkpoint, base, dir }
}

/// The largest difference of two lists.
pub fn furthest(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    // NaN must not pass as the smaller one.
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d <= m { m } else { d })
}

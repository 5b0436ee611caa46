//! A file whose lm_head differs from the embedding although its configuration ties them, and other tensors that nothing reads:
//! used as transformers uses them, reported, or refused. tests/golden/tied_head.py printed the numbers.

use std::fs;

use fourfold::model::batch::{Batch, Targets};
use fourfold::model::roles::Policy;
use fourfold::run::Model;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::support::Place;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/tied_head.json")).unwrap()
}

type Tensors = Vec<(String, Vec<usize>, Vec<u8>)>;

/// The embedded base as a folder, its tensors changed.
fn changed(change: impl FnOnce(&mut Tensors)) -> Place {
    let place = Place::new();
    place.write_base("base");
    let path = place.path("base/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Tensors =
        file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec())).collect();
    change(&mut tensors);
    let views =
        tensors.iter().map(|(name, shape, data)| (name, TensorView::new(Dtype::BF16, shape.clone(), data).unwrap()));
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    place
}

fn embedding(tensors: &Tensors) -> (Vec<usize>, Vec<u8>) {
    let (_, shape, data) = tensors.iter().find(|(name, ..)| name == EMBEDDING).unwrap();
    (shape.clone(), data.clone())
}

/// 2 x the embedding, its rows rolled by one: the exponent of each bf16 number is one higher.
fn other_head(tensors: &mut Tensors) {
    let (shape, mut data) = embedding(tensors);
    data.rotate_right(2 * shape[1]);
    for number in data.as_chunks_mut::<2>().0 {
        let bits = u16::from_le_bytes(*number);
        *number = (if bits & 0x7F80 == 0 { bits } else { bits + 0x80 }).to_le_bytes();
    }
    tensors.push((HEAD.into(), shape, data));
}

fn furthest(place: &Place, base: &str, case: &str) -> f64 {
    let golden = golden();
    let ids: Vec<u32> = golden["ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
    let model = Model::open(&place.path(base)).unwrap();
    let batch = Batch::new(std::slice::from_ref(&ids)).unwrap();
    let targets = Targets::responses(&batch, &[ids.len() - 1]).unwrap();
    let got = Policy::new(&model.base, None).logprobs(&batch, &targets, 1.0).unwrap().logprobs;
    let want = golden[case]["logprobs"].as_array().unwrap();
    got.iter().zip(want).map(|(&a, b)| (f64::from(a) - b.as_f64().unwrap()).abs()).fold(0.0, f64::max)
}

#[test]
fn the_files_own_head_is_used_where_it_differs_and_every_export_keeps_it() {
    let place = changed(other_head);
    assert_eq!(golden()["other"]["tied"], false);
    assert!(furthest(&place, "base", "other") < 2e-4);
    let described: Value = serde_json::from_str(&place.run("inspect base --json").stdout).unwrap();
    assert_eq!(described["dimensions"]["tie_word_embeddings"], false);
    assert!(
        described["notes"][0].as_str().unwrap().contains(HEAD) && described["unread_tensors"] == serde_json::json!({})
    );
    let ran = place.run("sft run.toml --out out/sft");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stderr.contains("ties lm_head and embedding"), "{}", ran.stderr);
    // With B = 0, exports are the base itself.
    let adapter = place.path("out/sft/adapter/adapter_model.safetensors");
    let bytes = fs::read(&adapter).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let zeroed = file.tensors().into_iter().map(|(name, view)| {
        let data = if name.contains("lora_B") { vec![0; view.data().len()] } else { view.data().to_vec() };
        (name, view.shape().to_vec(), data)
    });
    let zeroed: Tensors = zeroed.collect();
    let views =
        zeroed.iter().map(|(name, shape, data)| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    fs::write(&adapter, safetensors::serialize(views, None).unwrap()).unwrap();
    for (out, format) in [("merged", "safetensors"), ("m.gguf", "gguf"), ("split.gguf", "gguf --max-shard-size 300KB")]
    {
        let ran = place.run(&format!(
            "merge --base base --adapter out/sft/adapter --dtype f32 --out {out} --format {format} --json"
        ));
        assert_eq!(ran.code, 0, "{out}: {}", ran.stderr);
        let made: Value = serde_json::from_str(&ran.stdout).unwrap();
        let made = made["merged"].as_str().unwrap();
        assert!(furthest(&place, made, "other") < 2e-4, "{out}");
        if out == "split.gguf" {
            assert!(made.ends_with(".gguf") && made.contains("split-00001-of-"), "{made}");
            let parts = fs::read_dir(place.path(""))
                .unwrap()
                .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("split-0"));
            assert!(parts.count() > 3);
            assert!(!place.path("split.gguf").exists() && place.path("split.gguf.md").exists());
            let again = place
                .run(&format!("merge --base base --adapter out/sft/adapter --dtype f32 --out {out} --format {format}"));
            assert!(again.code == 2 && again.stderr.contains("already exists"), "{}", again.stderr);
        }
    }
    let config: Value = serde_json::from_slice(&fs::read(place.path("merged/config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
}

#[test]
fn a_head_that_is_the_embedding_is_tied_and_may_stand_for_it() {
    let same = changed(|tensors| {
        let (shape, data) = embedding(tensors);
        tensors.push((HEAD.into(), shape, data));
    });
    assert!(furthest(&same, "base", "same") < 2e-4);
    let described: Value = serde_json::from_str(&same.run("inspect base --json").stdout).unwrap();
    assert_eq!(described["dimensions"]["tie_word_embeddings"], true);
    assert!(described["unread_tensors"][HEAD].as_str().unwrap().contains("copy of the embedding"));
    let alone = changed(|tensors| {
        for tensor in tensors.iter_mut().filter(|(name, ..)| name == EMBEDDING) {
            tensor.0 = HEAD.into();
        }
    });
    assert!(furthest(&alone, "base", "alone") < 2e-4);
}

#[test]
fn tensors_that_nothing_reads_are_listed_reported_or_refused() {
    let more = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        changed(move |tensors| tensors.extend(names.into_iter().map(|name| (name, vec![2], vec![0; 4]))))
    };
    let place =
        more(&["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.4.mlp.up_proj.weight", "vision.weight"]);
    let described: Value = serde_json::from_str(&place.run("inspect base --json").stdout).unwrap();
    let unread = described["unread_tensors"].as_object().unwrap();
    assert_eq!(unread.len(), 3);
    assert!(unread["model.layers.4.mlp.up_proj.weight"].as_str().unwrap().contains("beyond num_hidden_layers"));
    assert!(unread["vision.weight"].as_str().unwrap().contains("of no part of the decoder"));
    let ran = place.run("generate --base base --prompt x --max-new-tokens 1");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for said in ["not read: vision.weight", "not read: model.layers.4"] {
        assert!(ran.stderr.contains(said), "{}", ran.stderr);
    }
    assert!(
        !ran.stderr.contains("inv_freq"),
        "what follows from the configuration is not worth a line: {}",
        ran.stderr
    );
    let place = more(&["model.layers.1.self_attn.q_norm.weight"]);
    let ran = place.run("generate --base base --prompt x --max-new-tokens 1");
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains("model.layers.1.self_attn.q_norm.weight lies inside a block"), "{}", ran.stderr);
}

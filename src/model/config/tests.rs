//! Tests of reading config.json: equivalent spellings, and configurations that must be refused.

use super::hf::object;
use super::*;
use serde_json::{Value, json};

const SMOL: &str = r#"{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 8192, "_name_or_path": "HuggingFaceTB/SmolLM2-135M"}"#;

fn edited(edit: &[(&str, Value)]) -> String {
    let mut map = object(SMOL, "test").unwrap();
    for (key, value) in edit {
        map.insert((*key).to_owned(), value.clone());
    }
    Value::Object(map).to_string()
}

fn refusal(edit: &[(&str, Value)]) -> String {
    DecoderConfig::from_hf(&edited(edit), None, "m").unwrap_err().to_string()
}

#[test]
fn old_and_new_rope_keys_are_equivalent_and_survive_a_round_trip() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let mut new = scaling.clone();
    new["rope_theta"] = json!(500000.0);
    let old = edited(&[("rope_theta", json!(500000.0)), ("rope_scaling", scaling)]);
    // A rope_theta outside of rope_parameters is ignored: transformers 5 does not read it.
    let new = edited(&[("rope_theta", json!(3.0)), ("rope_parameters", new)]);
    let a = DecoderConfig::from_hf(&old, None, "m").unwrap();
    assert_eq!(a, DecoderConfig::from_hf(&new, None, "m").unwrap());
    assert_eq!(a.rope_theta, 500000.0);
    assert_eq!(DecoderConfig::from_hf(&a.to_hf_json().unwrap(), None, "m").unwrap(), a);
    assert_eq!((a.head_dim, a.model_name.as_str()), (64, "SmolLM2-135M"));
}

#[test]
fn gpt_neos_kinds_of_attention_are_read_and_survive_a_round_trip_and_wrong_ones_are_refused() {
    let neo = |types: Value| {
        json!({"model_type": "gpt_neo", "vocab_size": 64, "hidden_size": 16, "num_layers": 3, "num_heads": 4,
            "max_position_embeddings": 40, "window_size": 5, "attention_types": types})
        .to_string()
    };
    let c = DecoderConfig::from_hf(&neo(json!([[["local", "global"], 1], [["local"], 1]])), None, "m").unwrap();
    assert_eq!(c.layers.iter().map(|l| l.window).collect::<Vec<_>>(), [Some(5), None, Some(5)]);
    assert_eq!((c.attention_multiplier, c.intermediate_size, c.tie_word_embeddings), (1.0, 64, true));
    let again = DecoderConfig::from_hf(&c.to_hf_json().unwrap(), None, "m").unwrap();
    assert_eq!((again.layers, again.biases, again.norm_eps), (c.layers, c.biases, c.norm_eps));
    for wrong in [json!([[["global"], 2]]), json!([[["global", "far"], 1], [["local"], 1]]), json!("local")] {
        let error = DecoderConfig::from_hf(&neo(wrong), None, "m").unwrap_err().to_string();
        assert!(error.contains("attention_types") && error.contains("3 layers"), "{error}");
    }
}

#[test]
fn end_of_sequence_tokens_are_collected_from_both_files() {
    let both =
        DecoderConfig::from_hf(&edited(&[("eos_token_id", json!([2, 7]))]), Some(r#"{"eos_token_id": [9, 2]}"#), "m");
    assert_eq!(both.unwrap().eos_token_ids, [9, 2, 7]);
    let none = DecoderConfig::from_hf(&edited(&[("eos_token_id", Value::Null)]), Some("{}"), "m").unwrap();
    assert!(none.eos_token_ids.is_empty());
}

#[test]
fn unsupported_settings_are_refused_by_name() {
    for (key, value, says) in [
        ("model_type", json!("mamba"), "mamba"),
        ("attention_bias", json!("yes"), "attention_bias"),
        ("hidden_act", json!("quick_gelu"), "quick_gelu"),
        ("quantization_config", json!({"bits": 4}), "quantization_config"),
        ("rope_scaling", json!({"type": "yarn", "factor": 2.0, "mscale": 1.0}), "mscale"),
        ("rope_scaling", json!({"type": "dynamic", "factor": 2.0}), "dynamic"),
        ("rope_scaling", json!({"type": "linear"}), "factor"),
        ("rope_scaling", json!({"type": "linear", "factor": 0.0}), "positive"),
        ("num_key_value_heads", json!(4), "evenly"),
        ("num_attention_heads", json!(0), "0 attention heads"),
        ("num_attention_heads", json!(-1), "not a positive integer"),
        ("hidden_size", json!(577), "577"),
        ("hidden_size", json!(u64::MAX), "hidden size"),
        ("head_dim", json!(63), "rotate pairs"),
        ("num_hidden_layers", json!(1e9), "num_hidden_layers"),
        ("vocab_size", json!(0), "vocab_size"),
        ("eos_token_id", json!(49152), "49152"),
        ("eos_token_id", json!("x"), "token id"),
        ("rms_norm_eps", json!(0), "epsilon"),
        ("rope_theta", json!("x"), "rope_theta"),
    ] {
        let message = refusal(&[(key, value.clone())]);
        assert!(message.contains(says), "{key} = {value}: {message}");
    }
    let said = |source: &str| DecoderConfig::from_hf("[1]", None, source).unwrap_err().to_string();
    assert_eq!(said("m"), "m/config.json is not a JSON object");
    assert_eq!(said("shapes/7b.json"), "shapes/7b.json is not a JSON object", "a file that stands alone");
    assert!(DecoderConfig::from_hf("{", None, "m").is_err());
    // null means no window; a missing key means transformers' default.
    for (edit, window) in [(vec![("sliding_window", Value::Null)], None), (vec![], Some(4096))] {
        let mistral = edited(&[&[("model_type", json!("mistral"))][..], &edit[..]].concat());
        assert_eq!(DecoderConfig::from_hf(&mistral, None, "m").unwrap().layers[0].window, window);
    }
}

/// Printed by tests/golden/rope_inv_freq.py.
#[test]
fn inverse_frequencies_match_transformers_golden() {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/rope_inv_freq.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for case in cases {
        let config = DecoderConfig::from_hf(&case["config"].to_string(), None, "m").unwrap();
        let got = config.inv_freq();
        let want: Vec<f64> = serde_json::from_value(case["inv_freq"].clone()).unwrap();
        assert_eq!(got.len(), want.len());
        for (i, (&g, w)) in got.iter().zip(&want).enumerate() {
            // transformers works in f32: a power and, where blended, four more roundings of 6e-8 each.
            assert!((f64::from(g) - w).abs() <= 1e-6 * w, "{} at {i}: {g} is not {w}", case["name"]);
        }
    }
}

//! The real commands on the emulated machine: a run that is interrupted on the CPU and resumed on a device.

use std::fs;

use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::fault_world::{finish, interrupted, line, place, run_all, signal, start, wait_for_lines};
use crate::stages::assert_same_figures;
use crate::support::Place;
use crate::world::{emulated, say, timed};

fn figures(place: &Place, stage: &str) -> Vec<Value> {
    let text = fs::read_to_string(place.path(&format!("out/{stage}/metrics.jsonl"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_command_that_was_interrupted_on_the_cpu_goes_on_on_a_device() {
    if emulated().is_none() {
        return;
    }
    let _time = timed("commands that move");
    let (stayed, moved) = (place(), place());
    run_all(&stayed, &["sft", "reward", "ppo"]);
    run_all(&moved, &["sft", "reward"]);
    fs::remove_dir_all(moved.path("out/sft")).unwrap();
    for stage in ["sft", "ppo"] {
        let ran = interrupted(&moved, stage, 1, libc::SIGTERM);
        assert_eq!(ran.code, 130, "{stage}: {}", ran.stderr);
        let ran = moved.run(&format!("{} --resume --device emulated", line(stage)));
        assert_eq!(ran.code, 0, "{stage}: {}", ran.stderr);
        assert!(ran.stderr.contains("emulated"), "{stage}: the machine is named: {}", ran.stderr);
        let worst = assert_same_figures(stage, &figures(&moved, stage), &figures(&stayed, stage), 1e-4);
        say(&format!("fourfold {stage}, begun on the CPU and resumed on a device: figures within {worst:.1e}"));
        if stage == "sft" {
            // What follows starts from the adapter that the inputs' digests know.
            fs::remove_dir_all(moved.path("out/sft")).unwrap();
            run_all(&moved, &["sft"]);
        }
    }
}

/// Multiplies the activations of the first MLP of the base, which its down projection reads, by `factor`.
fn amplified(place: &Place, factor: f32) {
    let path = place.path("base/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    let (_, dtype, _, data) = tensors.iter_mut().find(|t| t.0.ends_with("layers.0.mlp.up_proj.weight")).unwrap();
    assert_eq!(*dtype, Dtype::BF16);
    for pair in data.chunks_exact_mut(2) {
        let value = bf16::from_le_bytes([pair[0], pair[1]]).to_f32() * factor;
        pair.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
    }
    let views = tensors.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    let views: Vec<_> = views.collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn a_base_that_overflows_f16_runs_in_bf16_unless_f16_was_asked_for() {
    if emulated().is_none() {
        return;
    }
    let _time = timed("a base that overflows f16");
    let place = place();
    let sft = format!("{} --device emulated", line("sft"));
    let dtype = |place: &Place| {
        let text = fs::read_to_string(place.path("out/sft/config.toml")).unwrap();
        text.lines().find(|l| l.starts_with("compute_dtype")).unwrap().to_owned()
    };
    let ran = place.run(&sft);
    assert!(ran.code == 0 && dtype(&place) == "compute_dtype = \"f16\"", "{}", ran.stderr);
    fs::remove_dir_all(place.path("out")).unwrap();
    amplified(&place, 1e6);
    let ran = place.run(&format!("{sft} --set base.compute_dtype=\"f16\""));
    assert!(ran.code == 2 && ran.stderr.contains("65,504; set compute_dtype = \"bf16\""), "{}", ran.stderr);
    assert!(!place.path("out/sft").exists());
    let ran = place.run(&sft);
    assert!(ran.code == 0 && ran.stderr.contains("products in bf16"), "{}", ran.stderr);
    assert_eq!(dtype(&place), "compute_dtype = \"bf16\"");
    let ran = place.run("logprobs --base base --tokens tokens.json --device emulated");
    assert!(ran.code == 2 && ran.stderr.contains("tokens.json"), "{}", ran.stderr);
    place.write("tokens.json", r#"{"input_ids": [[5, 6, 7, 8]]}"#);
    let ran = place.run("logprobs --base base --tokens tokens.json --device emulated --json");
    assert!(ran.code == 0 && ran.stderr.contains("products in bf16"), "{}", ran.stderr);
}

#[test]
fn a_run_in_f16_that_moves_to_the_cpu_goes_on_in_f32() {
    if emulated().is_none() {
        return;
    }
    let place = place();
    let child = start(&place, &format!("{} --device emulated", line("sft")));
    wait_for_lines(&place.path("out/sft/metrics.jsonl"), 1);
    signal(&child, libc::SIGTERM);
    let ran = finish(child);
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    let ran = place.run(&format!("{} --resume --device cpu", line("sft")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let text = fs::read_to_string(place.path("out/sft/config.toml")).unwrap();
    assert!(text.contains("compute_dtype = \"f32\""), "{text}");
}

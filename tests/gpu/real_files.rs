//! Real quantised files on the emulated machine: log-probabilities of a short text against the host in f32. The files are
//! named by FOURFOLD_SMOLLM2_GGUF and FOURFOLD_GEMMA3_GGUF; a file that is not named is skipped with a line.

use std::path::Path;

use fourfold::model::batch::{Batch, Targets};
use fourfold::model::roles::Policy;
use fourfold::model_files::ModelFiles;
use fourfold::ops::weight::ComputeDtype;
use fourfold::tokenizer::SpecialTokens;

use crate::world::*;

#[test]
fn log_probabilities_of_real_files_are_the_hosts() {
    let Some(device) = emulated() else { return };
    let _time = timed("real files");
    for variable in ["FOURFOLD_SMOLLM2_GGUF", "FOURFOLD_GEMMA3_GGUF"] {
        let Ok(path) = std::env::var(variable) else {
            say(&format!("SKIPPED: {variable} is not set"));
            continue;
        };
        let files = ModelFiles::open(Path::new(&path)).unwrap_or_else(|e| panic!("{path}: {e:#}"));
        let text = "The capital of France is Paris, and its river is the";
        let mut tokens = files.tokenizer().encode(text, SpecialTokens::Add).unwrap();
        tokens.truncate(12);
        let batch = Batch::new(&[&tokens]).unwrap();
        let targets = Targets::responses(&batch, &[tokens.len() - 1]).unwrap();
        let host = files.base().unwrap();
        let want = Policy::new(&host, None).logprobs(&batch, &targets, 1.0).unwrap();
        drop(host);
        let there = on(files.base().unwrap(), &device);
        let got = Policy::new(&there, None).logprobs(&batch, &targets, 1.0).unwrap();
        let furthest = |got: &[f32], want: &[f32]| {
            got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0f32, |m, d| if d <= m { m } else { d })
        };
        let (e, h) = (furthest(&got.logprobs, &want.logprobs), furthest(&got.entropy, &want.entropy));
        say(&format!("{variable}: log-probabilities within {e:.1e}, entropies within {h:.1e}"));
        assert!(e < 1e-3 && h < 1e-3, "{path}: {e} and {h}: {:?} {:?}", got.logprobs, want.logprobs);
        drop(there);
        // Measured: 2.2e-2 and 1.8e-3 on SmolLM2, 1.4e-2 and 1.9e-3 on Gemma 3.
        for (compute, bound) in [(ComputeDtype::Bf16, 0.06), (ComputeDtype::F16, 0.006)] {
            let there = on(files.base().unwrap().computing_in(compute), &device);
            let got = Policy::new(&there, None).logprobs(&batch, &targets, 1.0).unwrap();
            let off: Vec<f64> = got.logprobs.iter().zip(&want.logprobs).map(|(a, b)| f64::from(a - b)).collect();
            let rms = (off.iter().map(|d| d * d).sum::<f64>() / off.len() as f64).sqrt();
            say(&format!("{variable} in {}: log-probabilities {rms:.1e} nats from f32 (rms)", compute.name()));
            assert!(rms < bound, "{path} in {}: {rms}", compute.name());
        }
    }
}

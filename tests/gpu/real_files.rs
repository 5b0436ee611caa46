//! Real quantised files on the emulated machine: log-probabilities of a short text against the host in f32. The files are
//! named by FOURFOLD_SMOLLM2_GGUF and FOURFOLD_GEMMA3_GGUF; the test is ignored unless it is asked for.

use fourfold::model::batch::{Batch, Targets};
use fourfold::model::roles::Policy;
use fourfold::model_files::ModelFiles;
use fourfold::ops::weight::ComputeDtype;
use fourfold::tokenizer::SpecialTokens;

use crate::files::{gemma3, smollm2};
use crate::world::*;

#[test]
#[ignore = "needs both models of tests/fetch: export FOURFOLD_SMOLLM2_GGUF and FOURFOLD_GEMMA3_GGUF; cargo test --release --test gpu -- --ignored"]
fn log_probabilities_of_real_files_are_the_hosts() {
    let Some(device) = emulated() else { return };
    let _time = timed("real files");
    for path in [smollm2(), gemma3()] {
        let name = path.display().to_string();
        let files = ModelFiles::open(&path).unwrap_or_else(|e| panic!("{name}: {e:#}"));
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
        say(&format!("{name}: log-probabilities within {e:.1e}, entropies within {h:.1e}"));
        assert!(e < 1e-3 && h < 1e-3, "{name}: {e} and {h}: {:?} {:?}", got.logprobs, want.logprobs);
        drop(there);
        // Measured: 2.2e-2 and 1.8e-3 on SmolLM2, 1.4e-2 and 1.9e-3 on Gemma 3.
        for (compute, bound) in [(ComputeDtype::Bf16, 0.06), (ComputeDtype::F16, 0.006)] {
            let there = on(files.base().unwrap().computing_in(compute), &device);
            let got = Policy::new(&there, None).logprobs(&batch, &targets, 1.0).unwrap();
            let off: Vec<f64> = got.logprobs.iter().zip(&want.logprobs).map(|(a, b)| f64::from(a - b)).collect();
            let rms = (off.iter().map(|d| d * d).sum::<f64>() / off.len() as f64).sqrt();
            say(&format!("{name} in {}: log-probabilities {rms:.1e} nats from f32 (rms)", compute.name()));
            assert!(rms < bound, "{name} in {}: {rms}", compute.name());
        }
    }
}

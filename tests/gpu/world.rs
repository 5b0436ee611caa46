//! Machines, bases and adapters for the other files, and comparisons of numbers. It makes no claim.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use candle_core::Tensor;
use fourfold::device::emulated::Emulated;
use fourfold::device::{Device, testing};
use fourfold::model::adapter::{Adapter, Gradients, LoraConfig, TargetModules};
use fourfold::model::base::Base;
use fourfold::model_files::ModelFiles;
use fourfold::quickstart::base::BASE;
use fourfold::rng::SplitMix64;

/// A line on the terminal, also where the test harness captures output.
pub fn say(line: &str) {
    writeln!(std::io::stderr(), "gpu: {line}").ok();
}

/// Prints how long a test took when it ends.
pub struct Timed(&'static str, Instant);

pub fn timed(what: &'static str) -> Timed {
    Timed(what, Instant::now())
}

impl Drop for Timed {
    fn drop(&mut self) {
        say(&format!("{} took {:.1} s", self.0, self.1.elapsed().as_secs_f64()));
    }
}

/// An emulated machine of its own, for tests of faults and of memory; `None` where there is no C++ compiler.
pub fn machine() -> Option<(Arc<Emulated>, Device)> {
    if !testing::can_emulate() {
        say("SKIPPED: there is no C++ compiler for the emulated machine");
        return None;
    }
    let machine = Arc::new(Emulated::open().unwrap_or_else(|e| panic!("the emulated machine: {e:#}")));
    let device = Device::new(machine.clone());
    Some((machine, device))
}

/// The emulated machine that tests without faults and ledgers share.
pub fn emulated() -> Option<Device> {
    let shared = testing::emulated();
    if shared.is_none() {
        say("SKIPPED: there is no C++ compiler for the emulated machine");
    }
    shared
}

/// A base on a device.
pub fn on(base: Base, device: &Device) -> Base {
    base.on(Some(device.clone()), |_, _| {}).unwrap_or_else(|e| panic!("{e:#}"))
}

/// The quickstart's base with its first `layers` blocks.
pub fn embedded(layers: usize) -> ModelFiles {
    let config = BASE.config.replace("\"num_hidden_layers\": 4", &format!("\"num_hidden_layers\": {layers}"));
    let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
    ModelFiles::from_embedded(&config, parts.0, parts.1, parts.2, parts.3).unwrap()
}

/// An adapter of these targets whose every number is drawn: none of its branches is zero.
pub fn adapter(base: &Base, targets: TargetModules, r: usize, seed: u64) -> Adapter {
    let config = LoraConfig { r, lora_alpha: 1.5 * r as f64, target_modules: targets, ..LoraConfig::default() };
    drawn(&Adapter::init(config, base.shapes(), seed).unwrap(), seed)
}

/// The same adapter with drawn factors, uniform within ±0.1, and magnitudes within 10% of theirs.
pub fn drawn(adapter: &Adapter, seed: u64) -> Adapter {
    let mut rng = SplitMix64::new(seed ^ 0xD1CE);
    let mut learner = adapter.to_trainable();
    let names = learner.names();
    let parameters = learner.parameters().unwrap();
    let new = names.iter().zip(&parameters).map(|(name, old)| {
        let relative = name.contains("magnitude");
        let old_values = values(old);
        let made = old_values.iter().map(|&v| {
            let draw = (rng.uniform() as f32 - 0.5) * 0.2;
            if relative { v * (1.0 + draw) } else { draw }
        });
        Tensor::from_vec(made.collect::<Vec<f32>>(), old.dims(), old.device()).unwrap()
    });
    let new: Vec<Tensor> = new.collect();
    learner.replace(new).unwrap();
    learner.snapshot()
}

pub fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Names and numbers of all gradients of an adapter.
pub fn named(adapter: &Adapter, gradients: &Gradients) -> Vec<(String, Vec<f32>)> {
    let (learner, gradients) = (adapter.to_trainable(), gradients.clone().to_host().unwrap());
    let flat = learner.flat_gradients(&gradients).unwrap_or_else(|e| panic!("{e:#}"));
    learner.names().into_iter().zip(flat).map(|(name, g)| (name, values(g))).collect()
}

/// The largest difference relative to the largest of `want`. NaN is infinitely far.
pub fn relative(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let top = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let apart = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0f32, |m, d| if d <= m { m } else { d });
    if apart.is_nan() {
        return f32::INFINITY;
    }
    if apart == 0.0 { 0.0 } else { apart / top.max(f32::MIN_POSITIVE) }
}

/// [`relative`] over all gradients, with the name of the furthest. A tensor whose largest is below a thousandth of the
/// largest of all is compared with that thousandth: it is a difference of larger numbers.
pub fn furthest(got: &[(String, Vec<f32>)], want: &[(String, Vec<f32>)]) -> (f32, String) {
    let top = want.iter().flat_map(|(_, v)| v).fold(0f32, |m, v| m.max(v.abs()));
    let mut worst = (0f32, String::new());
    assert_eq!(got.len(), want.len());
    for ((name, got), (other, want)) in got.iter().zip(want) {
        assert_eq!((name, got.len()), (other, want.len()));
        let own = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        let e = relative(got, want);
        let e = if own < 1e-3 * top { e * own / (1e-3 * top) } else { e };
        if e > worst.0 {
            worst = (e, name.clone());
        }
    }
    worst
}

//! Interpolation between adapters: the exponential moving average (EMA) of the actor, and a reference that follows the
//! actor. It does not depend on the training loop. Read `state.rs` for where it is applied.

use anyhow::{Result, ensure};

use crate::model::adapter::Adapter;
use crate::ops::cpu;

/// `from + weight (to - from)` for each LoRA factor; exactly `from` at 0 and exactly `to` at 1. The product B A of averaged
/// factors is the average of the products only to first order, so both adapters must have been trained from the same
/// initial adapter.
///
/// # Errors
/// If the adapters differ in shape.
pub fn lerp(from: &Adapter, to: &Adapter, weight: f64) -> Result<Adapter> {
    if weight == 0.0 {
        return Ok(from.clone());
    }
    if weight == 1.0 {
        return Ok(to.clone());
    }
    let (mut average, target) = (from.to_trainable(), to.to_trainable());
    ensure!(average.names() == target.names(), "adapters of different shape have no average");
    let mut mixed = vec![];
    for (from, to) in average.parameters()?.into_iter().zip(target.parameters()?) {
        ensure!(from.dims() == to.dims(), "adapters of different rank have no average");
        let values = {
            let (from, to) = (cpu::view(&from)?, cpu::view(&to)?);
            // The formula of torch.lerp, which returns `from` exactly if both are equal.
            from.iter().zip(to.iter()).map(|(f, t)| f + weight as f32 * (t - f)).collect()
        };
        mixed.push(cpu::tensor(values, from.shape())?);
    }
    average.replace(mixed)?;
    Ok(average.snapshot())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::{LinearShapes, LoraConfig, TargetModules};

    fn adapter(seed: u64, r: usize) -> Adapter {
        let shapes = LinearShapes::llama(2, 8, 8, 4, 12);
        let target_modules = TargetModules::List(vec!["q_proj".into(), "down_proj".into()]);
        let config = LoraConfig {
            r,
            lora_alpha: 4.0,
            use_rslora: false,
            target_modules,
            layers_to_transform: None,
            ..LoraConfig::default()
        };
        Adapter::init(config, shapes, seed).unwrap()
    }

    fn values(adapter: &Adapter) -> Vec<f32> {
        let flat = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        adapter.named_tensors().iter().flat_map(|(_, t)| flat(t)).collect()
    }

    #[test]
    fn interpolating_equal_adapters_changes_nothing_and_others_are_averaged() {
        let (a, b) = (adapter(1, 2), adapter(2, 2));
        for weight in [0.0, 0.008, 0.5, 1.0] {
            assert_eq!(values(&lerp(&a, &a, weight).unwrap()), values(&a));
        }
        assert_eq!(values(&lerp(&a, &b, 0.0).unwrap()), values(&a));
        assert_eq!(values(&lerp(&a, &b, 1.0).unwrap()), values(&b));
        let some = values(&lerp(&a, &b, 0.25).unwrap());
        for ((m, a), b) in some.iter().zip(values(&a)).zip(values(&b)) {
            assert!((m - (0.75 * a + 0.25 * b)).abs() < 1e-7);
        }
        assert!(lerp(&a, &adapter(1, 3), 0.5).is_err());
    }
}

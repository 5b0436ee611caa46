//! Averages of adapters: the actor's moving average, and a reference that follows the actor. Knows no loop.

use anyhow::{Result, ensure};

use crate::model::adapter::Adapter;
use crate::ops::cpu;

/// `from + weight (to - from)`, factor by factor; `from` itself at 0 and `to` itself at 1, bit for bit. The product B A of
/// averaged factors is the average of the products only to first order; both adapters must have grown from the same
/// start, as an actor and its average or reference have.
///
/// # Errors
/// If the adapters differ in shape.
pub fn towards(from: &Adapter, to: &Adapter, weight: f64) -> Result<Adapter> {
    if weight == 0.0 {
        return Ok(from.clone());
    }
    if weight == 1.0 {
        return Ok(to.clone());
    }
    let (mut average, goal) = (from.to_trainable(), to.to_trainable());
    ensure!(average.names() == goal.names(), "adapters of different shape have no average");
    let mut mixed = vec![];
    for (from, to) in average.parameters()?.into_iter().zip(goal.parameters()?) {
        ensure!(from.dims() == to.dims(), "adapters of different rank have no average");
        let values = {
            let (from, to) = (cpu::view(&from)?, cpu::view(&to)?);
            // In the form of torch's lerp, which returns `from` exactly where both are equal.
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
    fn the_average_of_equal_adapters_is_the_adapter_and_of_others_lies_between() {
        let (a, b) = (adapter(1, 2), adapter(2, 2));
        for weight in [0.0, 0.008, 0.5, 1.0] {
            assert_eq!(values(&towards(&a, &a, weight).unwrap()), values(&a));
        }
        assert_eq!(values(&towards(&a, &b, 0.0).unwrap()), values(&a));
        assert_eq!(values(&towards(&a, &b, 1.0).unwrap()), values(&b));
        let some = values(&towards(&a, &b, 0.25).unwrap());
        for ((m, a), b) in some.iter().zip(values(&a)).zip(values(&b)) {
            assert!((m - (0.75 * a + 0.25 * b)).abs() < 1e-7);
        }
        assert!(towards(&a, &adapter(1, 3), 0.5).is_err());
    }
}

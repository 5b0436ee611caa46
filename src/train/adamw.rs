//! AdamW with PyTorch's arithmetic, and gradient clipping.
//!
//! A step replaces each parameter by a new tensor, so a snapshot taken before the step keeps its values. [`AdamW`]
//! itself works on a flat list of named tensors; [`AdamW::for_adapter`] and [`clipped_norm`] read that list from an
//! adapter of `model/adapter`. It does not depend on a stage or a config. Read `schedule.rs` next.

use std::ops::Deref;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Tensor};

use crate::diverged;
use crate::model::adapter::{Gradients, TrainableAdapter};
use crate::ops::cpu::{View, parallel, vectorised, view};

/// The hyperparameters, without the learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the square root, after the bias correction.
    pub eps: f64,
    /// Decoupled: each step shrinks a parameter by the factor `1 - lr * weight_decay`, whatever its gradient.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    /// (0.9, 0.999), 1e-8, no decay.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The moments of one parameter, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// The parameter's name.
    pub name: String,
    /// First moment: running mean of the gradients.
    pub m: Vec<f32>,
    /// Second moment: running mean of the squared gradients.
    pub v: Vec<f32>,
}

/// The optimizer's state, as a checkpoint holds it, in the order of the parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamWState {
    /// Steps taken.
    pub step: u64,
    /// One entry per parameter.
    pub moments: Vec<Moments>,
}

/// The optimizer of one list of parameters.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    state: AdamWState,
}

impl AdamW {
    /// A new optimizer for parameters of these names and element counts.
    pub fn new(config: AdamWConfig, parameters: impl IntoIterator<Item = (String, usize)>) -> Self {
        let fresh = |(name, len)| Moments { name, m: vec![0.0; len], v: vec![0.0; len] };
        Self { config, state: AdamWState { step: 0, moments: parameters.into_iter().map(fresh).collect() } }
    }

    /// A new optimizer for the parameters of an adapter.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn for_adapter(config: AdamWConfig, learner: &TrainableAdapter) -> Result<Self> {
        let lens = learner.parameters()?.into_iter().map(|t| t.elem_count());
        Ok(Self::new(config, learner.names().into_iter().zip(lens)))
    }

    /// The optimizer of a checkpoint.
    ///
    /// # Errors
    /// If the moments of a parameter differ in length, are NaN or infinite, or `v` is negative.
    pub fn from_state(config: AdamWConfig, state: AdamWState) -> Result<Self> {
        for Moments { name, m, v } in &state.moments {
            ensure!(m.len() == v.len(), "optimizer state of {name}: {} and {} numbers", m.len(), v.len());
            let possible = m.iter().all(|x| x.is_finite()) && v.iter().all(|x| x.is_finite() && *x >= 0.0);
            ensure!(
                possible,
                "optimizer state of {name}: contains NaN, infinite or negative second moments; the checkpoint is damaged"
            );
        }
        Ok(Self { config, state })
    }

    /// The hyperparameters.
    pub fn config(&self) -> AdamWConfig {
        self.config
    }

    /// The state to save.
    pub fn state(&self) -> &AdamWState {
        &self.state
    }

    /// One step: with `g` the gradient and t the number of this step (from 1),
    /// `p -= lr*wd*p; m += (1-b1)(g-m); v = b2*v + (1-b2)g²; p -= lr/(1-b1^t) * m / (sqrt(v/(1-b2^t)) + eps)`.
    /// Elementwise in f32, as torch. Source: arXiv:1711.05101, torch.optim.AdamW. Every check precedes every change.
    ///
    /// # Errors
    /// If the lists do not match this optimizer's parameters one to one, a shape or type differs, the rate is
    /// NaN, infinite or negative, or a gradient is NaN or infinite; the message names the tensor.
    pub fn step(&mut self, parameters: Vec<&mut Tensor>, gradients: &[&Tensor], lr: f64) -> Result<()> {
        self.step_with(parameters, gradients, 1.0, |_| lr)
    }

    /// As [`AdamW::step`], with gradients multiplied by `factor` (see [`clip_factor`]) and a learning rate per parameter,
    /// chosen by its name.
    ///
    /// # Errors
    /// As for [`AdamW::step`].
    pub fn step_with(
        &mut self,
        parameters: Vec<&mut Tensor>,
        gradients: &[&Tensor],
        factor: f64,
        rate: impl Fn(&str) -> f64,
    ) -> Result<()> {
        let stepped = {
            let parameters: Vec<&Tensor> = parameters.iter().map(|parameter| &**parameter).collect();
            let inputs = Inputs::of(&self.state, &parameters, gradients, rate)?;
            inputs.step(&self.config, &mut self.state, factor)?
        };
        for (parameter, stepped) in parameters.into_iter().zip(stepped) {
            *parameter = stepped;
        }
        Ok(())
    }

    /// What [`AdamW::step_with`] would make of the parameters and of this optimizer's state, to the same bits: new parameters, and
    /// a new state beside this one, which stays. [`AdamW::replace_state`] takes it over.
    ///
    /// # Errors
    /// As for [`AdamW::step`].
    pub fn stepped(
        &self,
        parameters: &[Tensor],
        gradients: &[&Tensor],
        factor: f64,
        rate: impl Fn(&str) -> f64,
    ) -> Result<(Vec<Tensor>, AdamWState)> {
        let parameters: Vec<&Tensor> = parameters.iter().collect();
        let inputs = Inputs::of(&self.state, &parameters, gradients, rate)?;
        let moments = in_parallel(&self.state.moments, |moments| Some(moments.clone())).into_iter().flatten().collect();
        let mut state = AdamWState { step: self.state.step, moments };
        let stepped = inputs.step(&self.config, &mut state, factor)?;
        Ok((stepped, state))
    }

    /// Checks that [`AdamW::stepped`] made a state of this optimizer's own, which has not stepped since.
    ///
    /// # Errors
    /// If it did not.
    pub(super) fn check_next(&self, state: &AdamWState) -> Result<()> {
        let names = |state: &AdamWState| state.moments.iter().map(|m| (m.name.clone(), m.m.len())).collect::<Vec<_>>();
        ensure!(
            state.step == self.state.step + 1 && names(state) == names(&self.state),
            "a state of step {} is not the next one of an optimizer after {} steps, or it is of other parameters",
            state.step,
            self.state.step
        );
        Ok(())
    }

    /// Takes over the state of [`AdamW::stepped`], after [`AdamW::check_next`].
    pub(super) fn replace_state(&mut self, state: AdamWState) {
        self.state = state;
    }
}

/// Parameters and gradients that match an optimizer's state, and the learning rate of each.
struct Inputs<'t> {
    parameters: &'t [&'t Tensor],
    gradients: Vec<Values<'t>>,
    rates: Vec<f64>,
}

impl<'t> Inputs<'t> {
    /// Every check of a step.
    fn of(
        state: &AdamWState,
        parameters: &'t [&'t Tensor],
        gradients: &[&'t Tensor],
        rate: impl Fn(&str) -> f64,
    ) -> Result<Self> {
        let known = state.moments.len();
        ensure!(
            parameters.len() == known && gradients.len() == known,
            "{} parameters and {} gradients for an optimizer of {known}",
            parameters.len(),
            gradients.len()
        );
        let rates: Vec<f64> = state.moments.iter().map(|m| rate(&m.name)).collect();
        if let Some(lr) = rates.iter().find(|lr| !(lr.is_finite() && **lr >= 0.0)) {
            bail!("the learning rate is {lr}");
        }
        for ((parameter, gradient), moments) in parameters.iter().zip(gradients).zip(&state.moments) {
            check(moments, parameter, gradient)?;
        }
        let gradients = gradients.iter().map(|g| Values::of(g)).collect::<Result<Vec<_>>>()?;
        if let Some(bad) = in_parallel(&gradients, |g| !all_finite(g)).into_iter().position(|bad| bad) {
            let value = gradients[bad].iter().find(|g| !g.is_finite()).copied().unwrap_or(f32::NAN);
            let name = &state.moments[bad].name;
            return Err(diverged!("the gradient of {name} holds {value}; nothing was stepped"));
        }
        Ok(Self { parameters, gradients, rates })
    }

    /// Counts a step in `state`, whose moments become those after it, and returns the new parameters.
    fn step(&self, config: &AdamWConfig, state: &mut AdamWState, factor: f64) -> Result<Vec<Tensor>> {
        state.step += 1;
        let values = self.parameters.iter().map(|p| Values::of(p)).collect::<Result<Vec<_>>>()?;
        let all = values.iter().zip(&self.gradients).zip(&mut state.moments).zip(&self.rates);
        let items: Vec<_> = all
            .map(|(((values, gradient), moments), &lr)| {
                let numbers = Numbers::of(config, state.step, lr, factor);
                Mutex::new((&**values, &**gradient, moments, numbers))
            })
            .collect();
        let stepped = in_parallel(&items, |item| {
            let (values, gradient, moments, numbers) = &mut *item.lock().unwrap_or_else(PoisonError::into_inner);
            let mut next = values.to_vec();
            update(*numbers, &mut next, gradient, &mut moments.m, &mut moments.v);
            next
        });
        let made = stepped.into_iter().zip(self.parameters);
        made.map(|(values, like)| Ok(Tensor::from_vec(values, like.shape(), like.device())?)).collect()
    }
}

/// A tensor's numbers, row-major: where they lie, or copied if they lie otherwise.
enum Values<'t> {
    Lying(View<'t>),
    Copied(Vec<f32>),
}

impl<'t> Values<'t> {
    fn of(tensor: &'t Tensor) -> Result<Self> {
        Ok(match view(tensor) {
            Ok(view) => Self::Lying(view),
            Err(_) => Self::Copied(tensor.flatten_all()?.to_vec1::<f32>()?),
        })
    }
}

impl Deref for Values<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Self::Lying(view) => view,
            Self::Copied(values) => values,
        }
    }
}

/// `of` each item, on all cores: an item is one thread's, so results do not depend on the number of threads.
fn in_parallel<T: Sync, R: Send + Default>(items: &[T], of: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let results: Vec<Mutex<R>> = items.iter().map(|_| Mutex::default()).collect();
    parallel(items.len(), usize::MAX, |range| {
        for i in range {
            *results[i].lock().unwrap_or_else(PoisonError::into_inner) = of(&items[i]);
        }
    });
    results.into_iter().map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
}

fn check(moments: &Moments, parameter: &Tensor, gradient: &Tensor) -> Result<()> {
    let name = &moments.name;
    ensure!(
        parameter.elem_count() == moments.m.len(),
        "{name} has {} numbers, its optimizer state {}",
        parameter.elem_count(),
        moments.m.len()
    );
    ensure!(
        gradient.dims() == parameter.dims(),
        "{name} is {:?}, its gradient {:?}",
        parameter.dims(),
        gradient.dims()
    );
    ensure!(
        parameter.dtype() == DType::F32 && gradient.dtype() == DType::F32,
        "{name} is {:?} and its gradient {:?}; both must be F32",
        parameter.dtype(),
        gradient.dtype()
    );
    Ok(())
}

vectorised! {
    fn all_finite(values: &[f32]) -> bool {
        // The exponent's bits are all ones in NaN and in the infinities.
        values.iter().fold(true, |finite, v| finite & (v.to_bits() & 0x7f80_0000 != 0x7f80_0000))
    }
}

/// What every element of one parameter's step is computed with.
#[derive(Clone, Copy)]
struct Numbers {
    factor: f32,
    keep: f32,
    rate: f32,
    root: f32,
    take1: f32,
    beta2: f32,
    take2: f32,
    eps: f32,
}

impl Numbers {
    fn of(config: &AdamWConfig, step: u64, lr: f64, factor: f64) -> Self {
        let t = step as f64;
        Self {
            factor: factor as f32,
            keep: (1.0 - lr * config.weight_decay) as f32,
            rate: (lr / (1.0 - config.beta1.powf(t))) as f32,
            root: (1.0 - config.beta2.powf(t)).sqrt() as f32,
            take1: (1.0 - config.beta1) as f32,
            beta2: config.beta2 as f32,
            take2: (1.0 - config.beta2) as f32,
            eps: config.eps as f32,
        }
    }
}

vectorised! {
    fn update(numbers: Numbers, values: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]) {
        let Numbers { factor, keep, rate, root, take1, beta2, take2, eps } = numbers;
        for (((p, &g), m), v) in values.iter_mut().zip(gradient).zip(m).zip(v) {
            let g = g * factor;
            *m += take1 * (g - *m);
            *v = *v * beta2 + take2 * g * g;
            *p = *p * keep - rate * (*m / (v.sqrt() / root + eps));
        }
    }
}

/// The Euclidean norm of all gradients together, summed in f64 in the list's order.
///
/// # Errors
/// If a gradient is not f32.
pub fn grad_norm(gradients: &[&Tensor]) -> Result<f64> {
    let values = gradients.iter().map(|g| Values::of(g)).collect::<Result<Vec<_>>>()?;
    let squares = |g: &Values<'_>| g.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
    Ok(in_parallel(&values, squares).into_iter().sum::<f64>().sqrt())
}

/// The factor that brings a norm down to `max_norm`: `min(1, max_norm / (norm + 1e-6))`.
/// Source: torch.nn.utils.clip_grad_norm_.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

/// The norm of an adapter's gradients, and the factor that brings it down to `max_norm` where it exceeds that. The
/// gradient of a fixed bias does not count.
///
/// # Errors
/// Those of [`TrainableAdapter::flat_gradients`], or if the norm is not finite.
pub fn clipped_norm(learner: &TrainableAdapter, gradients: &Gradients, max_norm: f64) -> Result<(f64, f64)> {
    let norm = grad_norm(&learner.flat_gradients(gradients)?)?;
    ensure!(norm.is_finite(), diverged!("the gradient norm is {norm}: training diverged; lower the learning_rate"));
    Ok((norm, clip_factor(norm, max_norm)))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::Value;

    use super::*;
    use crate::model::adapter::{Adapter, LinearShapes, LoraConfig, TargetModules};

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/golden/adamw.json")).unwrap()
    }

    fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    }

    fn tensors(values: &Value, shapes: &Value) -> Vec<Tensor> {
        let pairs = values.as_array().unwrap().iter().zip(shapes.as_array().unwrap());
        pairs
            .map(|(v, s)| {
                let dims: Vec<usize> = s.as_array().unwrap().iter().map(|d| d.as_u64().unwrap() as usize).collect();
                Tensor::from_vec(floats(v), dims, &Device::Cpu).unwrap()
            })
            .collect()
    }

    fn assert_close(got: &[f32], want: &[f32], what: &str) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            // The same f32 operations; torch may fuse a multiply and an add, which moves the last bit.
            assert!((g - w).abs() <= 4.0 * f32::EPSILON * w.abs().max(1e-30), "{what}: {g} {w}");
        }
    }

    fn optimizer(run: &Value) -> AdamW {
        let number = |v: &Value| v.as_f64().unwrap();
        let config = AdamWConfig {
            beta1: number(&run["betas"][0]),
            beta2: number(&run["betas"][1]),
            eps: number(&run["eps"]),
            weight_decay: number(&run["weight_decay"]),
        };
        let starts = run["start"].as_array().unwrap().iter().enumerate();
        AdamW::new(config, starts.map(|(i, s)| (format!("p{i}"), s.as_array().unwrap().len())))
    }

    #[test]
    fn five_steps_match_torch_golden() {
        for run in golden()["runs"].as_array().unwrap() {
            let mut adamw = optimizer(run);
            let mut parameters = tensors(&run["start"], &run["shapes"]);
            for step in 0..5 {
                let gradients = tensors(&run["grads"][step], &run["shapes"]);
                let lr = run["lr"].as_f64().unwrap() * (1 + step) as f64;
                adamw.step(parameters.iter_mut().collect(), &gradients.iter().collect::<Vec<_>>(), lr).unwrap();
                for (i, parameter) in parameters.iter().enumerate() {
                    let what = format!("step {step} parameter {i}");
                    assert_close(&Values::of(parameter).unwrap(), &floats(&run["after"][step][i]), &what);
                }
            }
            for (i, moments) in adamw.state().moments.iter().enumerate() {
                assert_close(&moments.m, &floats(&run["m"][i]), "m");
                assert_close(&moments.v, &floats(&run["v"][i]), "v");
            }
        }
    }

    #[test]
    fn a_step_computed_beside_has_the_bits_of_one_in_place_and_leaves_the_optimizer_as_it_is() {
        for run in golden()["runs"].as_array().unwrap() {
            let (mut in_place, mut beside) = (optimizer(run), optimizer(run));
            let mut parameters = tensors(&run["start"], &run["shapes"]);
            let mut others = parameters.clone();
            let rate = |name: &str| if name == "p0" { 0.02 } else { 0.01 };
            for step in 0..5 {
                let gradients = tensors(&run["grads"][step], &run["shapes"]);
                let gradients: Vec<&Tensor> = gradients.iter().collect();
                let before = beside.state().clone();
                let (new, state) = beside.stepped(&others, &gradients, 0.75, rate).unwrap();
                assert_eq!(*beside.state(), before);
                beside.check_next(&state).unwrap();
                beside.replace_state(state);
                others = new;
                in_place.step_with(parameters.iter_mut().collect(), &gradients, 0.75, rate).unwrap();
                assert_eq!(beside.state(), in_place.state());
                assert!(beside.check_next(in_place.state()).is_err(), "it is no step further");
                for (a, b) in parameters.iter().zip(&others) {
                    assert_eq!(&*Values::of(a).unwrap(), &*Values::of(b).unwrap());
                }
            }
        }
    }

    #[test]
    fn a_resumed_optimizer_takes_the_same_steps_bit_for_bit() {
        let golden = golden();
        let run = &golden["runs"][0];
        let steps = |adamw: &mut AdamW, parameters: &mut [Tensor], range: std::ops::Range<usize>| {
            for step in range {
                let gradients = tensors(&run["grads"][step], &run["shapes"]);
                adamw.step(parameters.iter_mut().collect(), &gradients.iter().collect::<Vec<_>>(), 0.01).unwrap();
            }
        };
        let (mut whole, mut first) = (optimizer(run), optimizer(run));
        let (mut a, mut b) = (tensors(&run["start"], &run["shapes"]), tensors(&run["start"], &run["shapes"]));
        steps(&mut whole, &mut a, 0..5);
        steps(&mut first, &mut b, 0..2);
        let mut second = AdamW::from_state(first.config, first.state().clone()).unwrap();
        steps(&mut second, &mut b, 2..5);
        for (a, b) in a.iter().zip(&b) {
            assert_eq!(&*Values::of(a).unwrap(), &*Values::of(b).unwrap());
        }
        let mut broken = first.state().clone();
        broken.moments[1].v[0] = -1.0;
        assert!(AdamW::from_state(first.config, broken).unwrap_err().to_string().contains("p1"));
    }

    #[test]
    fn bad_gradients_are_named_and_no_parameter_changes() {
        let start = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let mut adamw = AdamW::new(AdamWConfig::default(), [("good".into(), 4), ("bad".into(), 4)]);
        let good = start.ones_like().unwrap();
        let nan = Tensor::new(&[[1f32, 2.0], [f32::NAN, 4.0]], &Device::Cpu).unwrap();
        let wrong = Tensor::new(&[1f32, 2.0, 3.0, 4.0], &Device::Cpu).unwrap();
        let half = good.to_dtype(DType::F16).unwrap();
        for (gradient, says) in [(&nan, "NaN"), (&wrong, "[4]"), (&half, "F16")] {
            let (mut one, mut two) = (start.clone(), start.clone());
            let message = adamw.step(vec![&mut one, &mut two], &[&good, gradient], 0.1).unwrap_err().to_string();
            assert!(message.contains("bad") && message.contains(says), "{message}");
            assert_eq!((&*Values::of(&one).unwrap(), adamw.state().step), (&*Values::of(&start).unwrap(), 0));
        }
        let (mut one, mut two) = (start.clone(), start.clone());
        assert!(adamw.step(vec![&mut one, &mut two], &[&good], 0.1).is_err(), "a gradient is missing");
        assert!(adamw.step(vec![&mut one, &mut two], &[&good, &good], f64::NAN).is_err());
        assert!(adamw.state().moments.iter().all(|m| m.m.iter().chain(&m.v).all(|&x| x == 0.0)));
    }

    #[test]
    fn clipping_matches_torch_and_steps_an_adapter() {
        let shapes = LinearShapes::llama(1, 4, 4, 4, 4);
        let config = LoraConfig {
            r: 2,
            lora_alpha: 2.0,
            use_rslora: false,
            target_modules: TargetModules::List(vec!["q_proj".into()]),
            layers_to_transform: None,
            ..LoraConfig::default()
        };
        let mut learner = Adapter::init(config, shapes, 1).unwrap().with_head(2).unwrap().to_trainable();
        let before = learner.snapshot();
        let mut adamw = AdamW::for_adapter(AdamWConfig::default(), &learner).unwrap();
        for case in golden()["clips"].as_array().unwrap() {
            let tensor = |key: &str, i: usize, dims: (usize, usize)| {
                Tensor::from_vec(floats(&case[key][i]), dims, &Device::Cpu).unwrap()
            };
            let mut gradients = Gradients::none(1);
            gradients.layers[0][0] = Some((tensor("grads", 0, (2, 4)), tensor("grads", 1, (4, 2))).into());
            gradients.head_weight = Some(tensor("grads", 2, (1, 4)));
            gradients.head_bias = Some(Tensor::new(&[1e6f32], &Device::Cpu).unwrap()); // fixed: must not count
            let (norm, factor) = clipped_norm(&learner, &gradients, case["max_norm"].as_f64().unwrap()).unwrap();
            let want = case["norm"].as_f64().unwrap();
            assert!((norm - want).abs() < 1e-6 * want, "torch sums in f32: {norm} {want}");
            let flat = learner.flat_gradients(&gradients).unwrap();
            for (i, gradient) in flat.iter().enumerate() {
                for (g, w) in Values::of(gradient).unwrap().iter().zip(floats(&case["clipped"][i])) {
                    let g = g * factor as f32;
                    assert!((g - w).abs() <= 1e-6 * w.abs(), "torch's factor is rounded to f32: {g} {w}");
                }
            }
            let mut parameters = learner.parameters().unwrap();
            adamw.step_with(parameters.iter_mut().collect(), &flat, factor, |_| 0.01).unwrap();
            learner.replace(parameters).unwrap();
        }
        for ((name, old), (_, new)) in before.named_tensors().into_iter().zip(learner.view().named_tensors()) {
            let (old, new) = (Values::of(old).unwrap(), Values::of(new).unwrap());
            assert!(old.iter().zip(&*new).all(|(a, b)| a != b), "{name}");
        }
    }
}

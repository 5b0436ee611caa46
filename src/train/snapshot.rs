//! A snapshot: everything that changes in a run, copied at one moment, as arrays by name and small values as JSON.
//!
//! A checkpoint is a snapshot on disk (`store.rs`); the guard keeps one in memory. It does not depend on a stage: each
//! stage puts in and takes out its own state.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::adamw::{AdamWState, Moments};
use super::learner::Learner;
use crate::model::adapter::Adapter;
use crate::ops::cpu;

/// The state that a run needs to resume as if it had not stopped. Tensors share their storage with the run's until it
/// steps.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    facts: Map<String, Value>,
    arrays: BTreeMap<String, Tensor>,
}

impl Snapshot {
    /// Puts in a small value. A NaN or infinite float is read back as `None` of an `Option`, and not as another type.
    ///
    /// # Errors
    /// If the value has no form in JSON.
    pub fn put(&mut self, name: &str, value: &impl Serialize) -> Result<()> {
        self.facts.insert(name.into(), serde_json::to_value(value).with_context(|| format!("keeping {name}"))?);
        Ok(())
    }

    /// Whether a small value was put in under that name.
    pub fn has(&self, name: &str) -> bool {
        self.facts.contains_key(name)
    }

    /// The small value under that name.
    ///
    /// # Errors
    /// If there is none, or it has another type.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = self.facts.get(name).with_context(|| format!("there is no {name} in the checkpoint"))?;
        T::deserialize(value).with_context(|| format!("{name} in the checkpoint"))
    }

    /// Puts in weights, moments and step count of a learner.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn put_learner(&mut self, name: &str, learner: &Learner) -> Result<()> {
        learner.settled()?;
        self.put_learner_at(name, learner, learner.weights().parameters()?)
    }

    /// The same with other weights of the learner, for example those before a step.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn put_learner_at(&mut self, name: &str, learner: &Learner, weights: Vec<Tensor>) -> Result<()> {
        self.put_parameters(name, learner.weights().names(), weights);
        let state = learner.optimizer_state();
        self.put(&format!("{name}.step"), &state.step)?;
        for Moments { name: of, m, v } in &state.moments {
            for (kind, values) in [("m", m), ("v", v)] {
                let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu)?;
                self.arrays.insert(format!("{name}.{kind}.{of}"), tensor);
            }
        }
        Ok(())
    }

    /// Restores a learner of the same shape.
    ///
    /// # Errors
    /// If something is missing or does not fit; the learner is then unchanged.
    pub fn restore_learner(&self, name: &str, learner: &mut Learner) -> Result<()> {
        let names = learner.weights().names();
        let parameters = self.parameters(name, &names)?;
        let moments = |kind: &str, of: &str| -> Result<Vec<f32>> {
            Ok(self.array(&format!("{name}.{kind}.{of}"))?.flatten_all()?.to_vec1()?)
        };
        let moments = names
            .iter()
            .map(|of| Ok(Moments { name: of.clone(), m: moments("m", of)?, v: moments("v", of)? }))
            .collect::<Result<_>>()?;
        learner.restore(parameters, AdamWState { step: self.get(&format!("{name}.step"))?, moments })
    }

    /// Puts in the weights of a frozen adapter.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn put_adapter(&mut self, name: &str, adapter: &Adapter) -> Result<()> {
        let weights = adapter.to_trainable();
        self.put_parameters(name, weights.names(), weights.parameters()?);
        Ok(())
    }

    /// The adapter under that name; everything but its weights is that of `like`.
    ///
    /// # Errors
    /// If something is missing or does not fit.
    pub fn adapter(&self, name: &str, like: &Adapter) -> Result<Adapter> {
        let mut weights = like.to_trainable();
        weights.replace(self.parameters(name, &weights.names())?)?;
        Ok(weights.snapshot())
    }

    /// Puts in rows of any length.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn put_rows(&mut self, name: &str, rows: &[Vec<f32>]) -> Result<()> {
        self.put(&format!("{name}.lengths"), &rows.iter().map(Vec::len).collect::<Vec<_>>())?;
        let flat = rows.concat();
        let n = flat.len();
        self.arrays.insert(name.into(), Tensor::from_vec(flat, n, &Device::Cpu)?);
        Ok(())
    }

    /// Takes them out again.
    ///
    /// # Errors
    /// If they are not there, or their lengths do not add up.
    pub fn rows(&self, name: &str) -> Result<Vec<Vec<f32>>> {
        let lengths: Vec<usize> = self.get(&format!("{name}.lengths"))?;
        let mut rest = &self.array(name)?.flatten_all()?.to_vec1::<f32>()?[..];
        let mut row = |n: usize| {
            let (row, after) =
                rest.split_at_checked(n).with_context(|| format!("{name} in the checkpoint is short"))?;
            rest = after;
            Ok(row.to_vec())
        };
        lengths.into_iter().map(&mut row).collect()
    }

    /// Puts another's content in, every name behind `prefix`.
    pub fn put_all(&mut self, prefix: &str, other: &Snapshot) {
        self.facts.extend(other.facts.iter().map(|(k, v)| (format!("{prefix}/{k}"), v.clone())));
        self.arrays.extend(other.arrays.iter().map(|(k, v)| (format!("{prefix}/{k}"), v.clone())));
    }

    /// What [`Snapshot::put_all`] put in; `None` where nothing was.
    pub fn all(&self, prefix: &str) -> Option<Snapshot> {
        let prefix = format!("{prefix}/");
        let facts = self.facts.iter().filter_map(|(k, v)| Some((k.strip_prefix(&prefix)?.into(), v.clone()))).collect();
        let arrays = self.arrays.iter().filter_map(|(k, v)| Some((k.strip_prefix(&prefix)?.into(), v.clone())));
        let found = Self { facts, arrays: arrays.collect() };
        (!found.facts.is_empty() || !found.arrays.is_empty()).then_some(found)
    }

    fn put_parameters(&mut self, name: &str, names: Vec<String>, parameters: Vec<Tensor>) {
        let named = names.into_iter().zip(parameters);
        self.arrays.extend(named.map(|(of, tensor)| (format!("{name}.weight.{of}"), tensor)));
    }

    fn parameters(&self, name: &str, names: &[String]) -> Result<Vec<Tensor>> {
        names.iter().map(|of| self.array(&format!("{name}.weight.{of}")).cloned()).collect()
    }

    fn array(&self, name: &str) -> Result<&Tensor> {
        self.arrays.get(name).with_context(|| format!("there is no {name} in the checkpoint"))
    }

    /// The small things as JSON text.
    ///
    /// # Errors
    /// None in practice.
    pub fn facts_bytes(&self) -> Result<Vec<u8>> {
        let facts: Map<String, Value> = self.facts.iter().map(|(k, v)| (k.clone(), exact(v))).collect();
        Ok(serde_json::to_vec_pretty(&facts)?)
    }

    /// Writes the arrays as a safetensors file, one at a time: no second copy of all of them is ever held.
    ///
    /// # Errors
    /// If an array is not f32, or `to` refuses.
    pub fn write_arrays(&self, to: &mut impl Write) -> Result<()> {
        let (mut header, mut end) = (Map::new(), 0);
        for (name, tensor) in &self.arrays {
            ensure!(tensor.dtype() == DType::F32, "{name} is {:?}, not F32", tensor.dtype());
            let start = end;
            end += tensor.elem_count() * size_of::<f32>();
            header.insert(name.clone(), json!({"dtype": "F32", "shape": tensor.dims(), "data_offsets": [start, end]}));
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        to.write_all(&(header.len() as u64).to_le_bytes())?;
        to.write_all(&header)?;
        for tensor in self.arrays.values() {
            let tensor = tensor.contiguous()?;
            let values = cpu::view(&tensor)?;
            let mut bytes = Vec::with_capacity(size_of_val(&values[..]));
            values.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()));
            to.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Both, in memory.
    ///
    /// # Errors
    /// As for [`Snapshot::write_arrays`].
    pub fn to_bytes(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        let mut arrays = vec![];
        self.write_arrays(&mut arrays)?;
        Ok((self.facts_bytes()?, arrays))
    }

    /// Reads both back.
    ///
    /// # Errors
    /// If they are not what this wrote.
    pub fn from_bytes(facts: &[u8], arrays: &[u8]) -> Result<Self> {
        let facts: Map<String, Value> = serde_json::from_slice(facts).context("the facts of a checkpoint")?;
        let facts = facts.into_iter().map(|(k, v)| (k, inexact(v))).collect();
        let file = SafeTensors::deserialize(arrays).context("the arrays of a checkpoint")?;
        let mut arrays = BTreeMap::new();
        for (name, view) in file.tensors() {
            ensure!(view.dtype() == Dtype::F32, "{name} is {:?}, not F32", view.dtype());
            let values = view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            arrays.insert(name, Tensor::from_vec::<_, f32>(values, view.shape(), &Device::Cpu)?);
        }
        Ok(Self { facts, arrays })
    }
}

/// Before the bits of a float, and before a text that begins with it.
const BITS: char = '~';

/// Floats as their bits: JSON's reader may miss the last one.
fn exact(value: &Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => {
            Value::String(format!("{BITS}{:016x}", number.as_f64().unwrap_or(f64::NAN).to_bits()))
        }
        Value::String(text) if text.starts_with(BITS) => Value::String(format!("{BITS}{text}")),
        Value::Array(items) => items.iter().map(exact).collect(),
        Value::Object(entries) => Value::Object(entries.iter().map(|(k, v)| (k.clone(), exact(v))).collect()),
        other => other.clone(),
    }
}

/// The way back.
fn inexact(value: Value) -> Value {
    match value {
        Value::String(text) => match text.strip_prefix(BITS) {
            Some(plain) if plain.starts_with(BITS) => Value::String(plain.into()),
            Some(bits) => u64::from_str_radix(bits, 16).map_or(Value::Null, |b| f64::from_bits(b).into()),
            None => Value::String(text),
        },
        Value::Array(items) => items.into_iter().map(inexact).collect(),
        Value::Object(entries) => Value::Object(entries.into_iter().map(|(k, v)| (k, inexact(v))).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::{Gradients, LinearShapes, LoraConfig, TargetModules};
    use crate::train::adamw::AdamWConfig;

    fn arrays(snapshot: &Snapshot) -> Vec<u8> {
        let mut bytes = vec![];
        snapshot.write_arrays(&mut bytes).unwrap();
        bytes
    }

    fn learner(seed: u64) -> Learner {
        let shapes = LinearShapes::llama(1, 4, 4, 4, 8);
        let target_modules = TargetModules::List(vec!["q_proj".into()]);
        let config = LoraConfig { r: 2, lora_alpha: 4.0, target_modules, ..LoraConfig::default() };
        let adapter = Adapter::init(config, shapes, seed).unwrap().with_head(seed).unwrap();
        Learner::new(adapter.to_trainable(), AdamWConfig::default(), 0.0).unwrap()
    }

    fn step(learner: &mut Learner, by: f64) {
        let weights = learner.weights().parameters().unwrap();
        let mut gradients = Gradients::none(1);
        let like = |t: &Tensor| ((t * 0.5).unwrap() + by).unwrap();
        gradients.layers[0][0] = Some((like(&weights[0]), like(&weights[1])).into());
        gradients.head_weight = Some(like(&weights[2]));
        learner.step(gradients, 0.01).unwrap();
    }

    fn bytes(learner: &Learner) -> Vec<u8> {
        let mut all = Snapshot::default();
        all.put_learner("x", learner).unwrap();
        [all.facts_bytes().unwrap(), arrays(&all)].concat()
    }

    #[test]
    fn a_learner_that_was_written_and_read_steps_on_to_the_same_bits() {
        let mut whole = learner(1);
        step(&mut whole, 0.25);
        let mut snapshot = Snapshot::default();
        snapshot.put_learner("actor", &whole).unwrap();
        let (facts, arrays) = (snapshot.facts_bytes().unwrap(), arrays(&snapshot));
        step(&mut whole, 0.75);
        let mut other = learner(2);
        Snapshot::from_bytes(&facts, &arrays).unwrap().restore_learner("actor", &mut other).unwrap();
        assert_ne!(bytes(&other), bytes(&whole), "the snapshot must not follow the learner");
        step(&mut other, 0.75);
        assert_eq!(bytes(&other), bytes(&whole));
    }

    #[test]
    fn what_is_missing_or_of_another_shape_is_named_and_changes_nothing() {
        let mut learner = learner(1);
        let before = bytes(&learner);
        let mut snapshot = Snapshot::default();
        snapshot.put_learner("actor", &learner).unwrap();
        snapshot.arrays.retain(|name, _| !name.starts_with("actor.v"));
        let error = snapshot.restore_learner("actor", &mut learner).unwrap_err();
        assert!(error.to_string().contains("actor.v."), "{error}");
        assert!(snapshot.restore_learner("critic", &mut learner).is_err());
        assert_eq!(bytes(&learner), before);
    }

    #[test]
    fn every_double_and_every_text_is_read_back_equal() {
        let mut snapshot = Snapshot::default();
        let values: Vec<f64> = (1..2000).map(|i| (f64::from(i) * 0.737).sin() * 10f64.powi(i % 60 - 30)).collect();
        snapshot.put("values", &values).unwrap();
        snapshot.put("texts", &["~", "~~x", "", "~3ff0000000000000"]).unwrap();
        let read = Snapshot::from_bytes(&snapshot.facts_bytes().unwrap(), &arrays(&snapshot)).unwrap();
        let back: Vec<f64> = read.get("values").unwrap();
        assert!(values.iter().zip(&back).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!(read.get::<Vec<String>>("texts").unwrap(), ["~", "~~x", "", "~3ff0000000000000"]);
    }
}

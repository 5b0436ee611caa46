//! An opened base with its tokenizer, and the adapters over it with their provenance.
//!
//! It does not depend on a stage. Read `model_files/mod.rs` for the files.

use std::path::Path;

use anyhow::{Context, Error, Result};

use crate::config;
use crate::config::{Data, DeviceChoice, InitLoraWeights, Lora};
use crate::error::F16Overflow;
use crate::invalid;
use crate::model::adapter::{Adapter, Init, LoraConfig, Provenance, TargetModules};
use crate::model::base::Base;
use crate::model::batch::Batch;
use crate::model::config::Family;
use crate::model::init::dora::with_magnitudes;
use crate::model::init::pissa_olora::{Principal, principal};
use crate::model_files::ModelFiles;
use crate::model_files::peft::base_tables;
use crate::ops::cpu;
use crate::ops::weight::ComputeDtype;
use crate::rng::derive;
use crate::run::hints::{Wanted, check_adapter_path, check_base_path};
use crate::run::placement::{instead_of_f16, place, settle};
use crate::train::settings;
use crate::warning;

/// An opened base with its tokenizer.
pub struct Model {
    /// Files, tokenizer, configuration.
    pub checkpoint: ModelFiles,
    /// The frozen weights.
    pub base: Base,
}

impl Model {
    /// Opens a Hugging Face directory, a GGUF file or, by its id, a model of the hub.
    ///
    /// # Errors
    /// If it is no model that can be used; the message names file and tensor.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(ModelFiles::open(path)?)
    }

    /// Opens what `[base]` or `[reward_base]` names, as it says.
    ///
    /// # Errors
    /// As for [`Model::open`].
    pub fn of_section(base: &config::Base) -> Result<Self> {
        check_base_path(&base.path)?;
        let files = ModelFiles::open(&base.path)?;
        for remark in files.remarks()? {
            warning!("{remark}");
        }
        Self::of_opened(files, base)
    }

    /// Opens a model on the machine that `--device` names, to generate with it if `kv_cache_type` is given.
    ///
    /// # Errors
    /// As for [`Model::of_section`].
    pub fn open_on(
        path: &Path,
        device: Option<DeviceChoice>,
        kv_cache_type: Option<config::KvCacheType>,
    ) -> Result<Self> {
        Self::of_section(&config::Base { device, kv_cache_type, ..config::Base::at(path) })
    }

    /// The same, of files that are open.
    ///
    /// # Errors
    /// As for [`Model::open`]; if the section's machine cannot be used, or the base does not fit there.
    pub fn of_opened(checkpoint: ModelFiles, base: &config::Base) -> Result<Self> {
        let (mut section, open) = (base.clone(), base.compute_dtype.is_none());
        let device = settle(&mut section)?;
        let checkpoint = checkpoint.quantised(section.quantize.map(config::Quantize::stored));
        let Some(device) = device else { return Ok(Self::of(checkpoint)?.computing_in(section.compute_dtype())) };
        let checkpoint = checkpoint.for_device(true);
        let base = checkpoint.base()?.computing_in(section.compute_dtype());
        let base = place(base.caching_in(section.kv_cache_type())?, &device, section.offload().layers())?;
        let model = Self { checkpoint, base };
        match model.check_finite() {
            Err(error) if open && error.is::<F16Overflow>() => {
                let model = model.computing_in(instead_of_f16(&device, &error));
                model.check_finite()?;
                Ok(model)
            }
            checked => checked.map(|()| model),
        }
    }

    /// The same model, its products with frozen matrices computed in `compute`.
    #[must_use]
    pub fn computing_in(self, compute: ComputeDtype) -> Self {
        Self { base: self.base.computing_in(compute), ..self }
    }

    /// Over an opened checkpoint.
    ///
    /// # Errors
    /// As for [`Model::open`].
    pub fn of(checkpoint: ModelFiles) -> Result<Self> {
        let base = checkpoint.base()?;
        let model = Self { checkpoint, base };
        model.check_finite()?;
        Ok(model)
    }

    /// One token goes through the network: a NaN in any matrix or norm reaches the logits. Only then are the tensors
    /// read one by one to name it, so that opening stays a matter of mapping. Where products are in f16, a row of tokens
    /// from all over the vocabulary goes through, so that activations which exceed it are found.
    fn check_finite(&self) -> Result<()> {
        let in_f16 = self.base.lm_head(None).weight.compute() == ComputeDtype::F16;
        let config = self.base.config();
        let (vocab, length) = (config.vocab_size, config.max_position_embeddings.min(if in_f16 { 64 } else { 1 }));
        let tokens: Vec<u32> = (0..length).map(|i| (i * vocab / length) as u32).collect();
        let logits = self.base.logits(&self.base.hidden(&Batch::new(&[tokens])?, None)?, None)?;
        if cpu::view(&logits)?.iter().all(|l| l.is_finite()) {
            return Ok(());
        }
        let is_bad = |values: &[f32]| values.iter().any(|v| !v.is_finite());
        let norm = self.base.vectors().into_iter().find(|(_, n)| is_bad(n)).map(|(name, _)| name);
        let name = norm.or_else(|| Some(self.base.weights().into_iter().find(|(_, w)| is_bad(&w.to_f32()))?.0));
        let model = self.checkpoint.path().map_or_else(|| "the embedded model".into(), |p| p.display().to_string());
        Err(match name {
            Some(name) => invalid!("{model}: tensor {name} holds NaN or infinite numbers; fetch the model again"),
            None if in_f16 => Error::new(F16Overflow(format!(
                "{model}: its logits are not finite in f16, whose largest number is 65,504; set compute_dtype = \"bf16\" or \
                 \"f32\""
            ))),
            None => {
                invalid!("{model}: its logits are not finite: the weights are too large for f32; use another model")
            }
        })
    }

    /// An adapter from a PEFT folder that fits this base.
    ///
    /// # Errors
    /// If it does not, or was trained over other weights of the same shape.
    pub fn adapter(&self, path: &Path) -> Result<Adapter> {
        self.adapter_for(Wanted::Any, path)
    }

    /// The same; where the path is that of a folder with adapters in it, the message names those that are wanted.
    ///
    /// # Errors
    /// Those of [`Self::adapter`].
    pub(super) fn adapter_for(&self, wanted: Wanted, path: &Path) -> Result<Adapter> {
        check_adapter_path(path, wanted)?;
        let adapter = Adapter::load(path, self.base.shapes())?;
        self.check_tables(path, &adapter)?;
        match &adapter.provenance().base_fingerprint {
            Some(theirs) if theirs != self.base.fingerprint() => Err(invalid!(
                "{}: this adapter was trained over another base ({}): the shapes agree, the weights do not; give that \
                 base, or train the adapter anew over this one",
                path.display(),
                adapter.provenance().base_model.as_deref().unwrap_or("its name is not recorded")
            )),
            _ => Ok(adapter),
        }
    }

    /// As [`Self::adapter`], of a policy: what generates text, and what SFT, DPO, KTO and PPO start from.
    ///
    /// # Errors
    /// Those of [`Self::adapter`]; if the adapter has a score head, as a reward model's and a critic's have.
    pub fn policy_adapter(&self, path: &Path) -> Result<Adapter> {
        let adapter = self.adapter_for(Wanted::Policy, path)?;
        match adapter.head() {
            Some(_) => Err(has_score_head(path)),
            None => Ok(adapter),
        }
    }

    /// What an adapter of this base says of its origin.
    pub fn provenance(&self) -> Provenance {
        Provenance {
            base_model: Some(match (self.checkpoint.id(), self.checkpoint.path()) {
                (Some(id), _) => id.to_owned(),
                (None, Some(path)) => path.display().to_string(),
                (None, None) => self.base.config().model_name.clone(),
            }),
            base_fingerprint: Some(self.base.fingerprint().to_string()),
        }
    }

    /// The token that DeepSpeed-Chat pads rows with: the one that `[data]` names, a Llama's own, or the end token.
    ///
    /// # Errors
    /// If the tokenizer knows no such token, or none that ends a response.
    pub fn pad_id(&self, data: &Data) -> Result<u32> {
        let tokenizer = self.checkpoint.tokenizer();
        if let Some(token) = &data.pad_token {
            let named = tokenizer.id(token);
            return named.ok_or_else(|| invalid!("[data] pad_token = {token:?} is no token of this model's tokenizer"));
        }
        let own = tokenizer.pad_id().filter(|_| self.base.config().family == Family::Llama);
        own.or(tokenizer.eos_id()).ok_or_else(|| {
            invalid!(
                "compat = \"dschat\" pads rows, and this tokenizer has neither pad nor end token; set [data] pad_token"
            )
        })
    }

    /// A fresh adapter shaped by `[lora]`.
    ///
    /// # Errors
    /// If `[lora]` selects nothing of this base.
    pub fn fresh_adapter(&self, lora: &Lora, seed: u64) -> Result<Adapter> {
        let init = match lora.init() {
            InitLoraWeights::Gaussian => Init::Gaussian,
            InitLoraWeights::Dschat => Init::DeepSpeedChat,
            InitLoraWeights::Default | InitLoraWeights::Pissa | InitLoraWeights::Olora => Init::KaimingUniform,
        };
        let wanted = lora_config(lora);
        wanted.check_names(&self.base.shapes()).context("[lora]")?;
        let fresh = Adapter::init_as(wanted, self.base.shapes(), derive(seed, &[settings::INIT]), init)?;
        let started = match lora.init() {
            InitLoraWeights::Pissa => principal(&fresh, &self.base, Principal::Pissa)?,
            InitLoraWeights::Olora => principal(&fresh, &self.base, Principal::Olora)?,
            _ => fresh,
        };
        if lora.use_dora { with_magnitudes(&started, &self.base) } else { Ok(started) }
    }

    /// # Errors
    /// If a table that PEFT saved below the adapter's branches is not this base's.
    fn check_tables(&self, path: &Path, adapter: &Adapter) -> Result<()> {
        for (slot, theirs) in base_tables(path, adapter)? {
            let Some(ours) = self.base.matrix(slot) else { continue };
            let theirs = cpu::view(&theirs)?;
            let (mut apart, mut size, mut row) = (0f64, 0f64, vec![0f32; ours.cols()]);
            for (i, theirs) in theirs.chunks_exact(ours.cols()).enumerate() {
                ours.row(i, &mut row);
                for (a, b) in row.iter().zip(theirs) {
                    apart += f64::from(a - b).powi(2);
                    size += f64::from(*b).powi(2);
                }
            }
            // A table that was rounded, to bfloat16 or to blocks of four bits, is still the same one.
            let allowed = if ours.dtype().block().0 == 1 { 0.01 } else { 0.25 };
            if apart.sqrt() > allowed * size.sqrt() {
                return Err(invalid!(
                    "{}: it was trained over another base: the {} saved with it is not this one's; give that base",
                    path.display(),
                    self.base.shapes().path(slot)
                ));
            }
        }
        Ok(())
    }
}

/// What is said of an adapter with a score head where a policy's is wanted.
pub(super) fn has_score_head(path: &Path) -> Error {
    invalid!(
        "{}: this adapter has a score head, so it is a reward model's or a critic's and was not trained to write text; give the \
         adapter of an SFT, DPO or KTO run, or a PPO run's actor (`fourfold score` scores with this one)",
        path.display()
    )
}

/// `[lora]` as the model has it.
pub fn lora_config(lora: &Lora) -> LoraConfig {
    LoraConfig {
        r: lora.r,
        lora_alpha: lora.alpha(),
        use_rslora: lora.use_rslora,
        target_modules: targets(&lora.target_modules),
        exclude_modules: lora.exclude_modules.as_ref().map(targets),
        layers_to_transform: lora.layers_to_transform.clone(),
        layers_pattern: vec![],
        rank_pattern: lora.rank_pattern.iter().map(|(key, &r)| (key.clone(), r)).collect(),
        // The magnitudes are the base's to give.
        use_dora: false,
        loraplus_lr_ratio: lora.loraplus_lr_ratio,
        alpha_pattern: lora.alpha_pattern.iter().map(|(key, &alpha)| (key.clone(), alpha)).collect(),
    }
}

fn targets(named: &config::TargetModules) -> TargetModules {
    match named {
        all if all.is_all_linear() => TargetModules::AllLinear,
        config::TargetModules::One(pattern) => TargetModules::Regex(pattern.clone()),
        config::TargetModules::List(names) => TargetModules::List(names.clone()),
    }
}

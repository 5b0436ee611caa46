//! The sections that every stage shares: `[base]`, `[reward_base]`, `[teacher]`, `[lora]` and `[data]`. Read `stages.rs` next.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ColumnNames, MixStrategy, Paths, Preset, Source, Tags};
pub use crate::device::DeviceChoice;
pub use crate::ops::attention::KvCacheType;
pub use crate::ops::linear::gpu::Dequantising;
pub use crate::ops::weight::ComputeDtype;
use crate::ops::weight::StorageDType;

/// `[base]`, `[reward_base]`, `[teacher]`: a frozen checkpoint.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// A Hugging Face folder (`config.json`, `*.safetensors`, `tokenizer.json`) or one `.gguf` file; in a build with
    /// the feature `hub` also a model of the hub, `owner/name` or `hf://owner/name[@revision][/file.gguf]`. Required.
    pub path: PathBuf,
    /// Quantises a dense checkpoint as it is opened, matrix by matrix, so that it never lies dense in memory: `"q8_0"`,
    /// `"q4_k"` (ggml's blocks) or `"nf4"` (QLoRA's). The vocabulary's tables become q8_0. Absent = as stored; a file
    /// that is quantised already stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantize>,
    /// What products with the frozen matrices are computed in: `"f32"`, or `"bf16"`, which rounds both factors to
    /// bfloat16 and sums in f32: several times faster on cards from sm_80 on and on CPUs with AMX or AVX-512 BF16, and
    /// log-probabilities move by about 0.02; or, on cards only, `"f16"`, which rounds them to half precision and moves
    /// log-probabilities by about 0.002, for numbers up to 65,504. Generation, scoring and training use the same. Absent =
    /// `"f32"` on the CPU; on a card `"f16"`, or `"bf16"` (`"f32"` before sm_80) for a base whose activations overflow
    /// f16. A resumed run keeps what it began with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute_dtype: Option<ComputeDtype>,
    /// Where the frozen weights lie and passes run: `"cpu"`, `"cuda"` (which is `"cuda:0"`), `"cuda:N"`, or `"auto"`:
    /// the first card if the NVIDIA driver, NVRTC and cuBLAS are there, else the CPU. `"emulated"` runs the card's
    /// kernels on the CPU, slowly: it is for tests. Whatever trains stays on the host, and a resumed run may move to
    /// another machine. Default `"auto"`; in `[reward_base]` and `[teacher]` what
    /// `[base]` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub device: Option<DeviceChoice>,
    /// How many layers a card does not keep: they lie in pinned memory of the host and are copied while the layers before
    /// them compute. `"none"`, a number, or `"auto"`: as few as let the planned run fit, none where it fits without. The numbers
    /// are the same either way. Passes of some thousand tokens hide the copies; decoding runs at the speed of the link
    /// whatever the number of sequences, so generate all at once. On the CPU it has no effect. Default `"none"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<WrittenOffload>")]
    pub offload: Option<Offload>,
    /// What the keys and values of text under generation are kept as on a card: `"auto"` is the type of the products, and `"q8_0"`
    /// ggml's blocks of 32 signed bytes with a scale, along a head, in 34/64 of f16's memory. Log-probabilities of sampled tokens
    /// move by some 0.003 nats (on average, measured on a small base), those of scoring and training do not: where PPO, GRPO or
    /// RLOO take the old ones from the sampler, the ratio begins off 1 by that, which `sampling/sampling_logp_difference` shows and
    /// `importance_sampling_correction` weights. It needs heads of a multiple of 32 numbers, and is refused on the CPU, whose cache
    /// is f32, and in `[reward_base]`, which generates nothing, unless it is what `[base]` says of the same path. Default `"auto"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache_type: Option<KvCacheType>,
    /// How a card dequantises the weights that products of more than 64 rows read, for weights of another type than the products:
    /// `"in_turn"` each before its product; `"ahead"` the next one on a second stream while a product runs, with memory for two;
    /// `"kept"` so, and a backward with `checkpoint = "block"` or `"mlp"` keeps what the recomputation dequantised, with memory
    /// for most of a layer in 16 bits; or `"auto"`: the last of these for which the planned run has room. The numbers are the
    /// same bits, and on the CPU it has no effect. Default `"auto"`; in `[reward_base]` and `[teacher]` what `[base]` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dequantise: Option<Dequantising>,
}

/// `offload`: the layers that a card does not keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "WrittenOffload", into = "WrittenOffload")]
pub enum Offload {
    /// `"none"`: it keeps all.
    #[default]
    None,
    /// `"auto"`: as few as let the run fit.
    Auto,
    /// `"auto"`, for which a plan has chosen this many.
    Chosen(usize),
    /// This many.
    Layers(usize),
}

impl Offload {
    /// Is it `"auto"`, chosen or not?
    pub const fn is_auto(self) -> bool {
        matches!(self, Self::Auto | Self::Chosen(_))
    }

    /// The number of layers; `"auto"` counts as none until a plan has chosen.
    pub const fn layers(self) -> usize {
        match self {
            Self::None | Self::Auto => 0,
            Self::Chosen(layers) | Self::Layers(layers) => layers,
        }
    }
}

/// `offload` as written: a word or a number.
#[derive(Deserialize, JsonSchema, Serialize)]
#[serde(untagged, expecting = "must be \"auto\", \"none\" or a number of layers")]
enum WrittenOffload {
    /// `"auto"` or `"none"`.
    Word(String),
    /// A number of layers.
    Layers(usize),
}

impl TryFrom<WrittenOffload> for Offload {
    type Error = String;

    fn try_from(written: WrittenOffload) -> Result<Self, String> {
        match written {
            WrittenOffload::Layers(layers) => Ok(Self::Layers(layers)),
            WrittenOffload::Word(word) => match word.as_str() {
                "none" => Ok(Self::None),
                "auto" => Ok(Self::Auto),
                _ => Err(format!("{word:?} is no offload; use \"auto\", \"none\" or a number of layers")),
            },
        }
    }
}

impl From<Offload> for WrittenOffload {
    fn from(offload: Offload) -> Self {
        match offload {
            Offload::None => Self::Word("none".into()),
            Offload::Auto | Offload::Chosen(_) => Self::Word("auto".into()),
            Offload::Layers(layers) => Self::Layers(layers),
        }
    }
}

/// The type of products on a card, unless `compute_dtype` names one or a base overflows it. The first probability ratio of
/// PPO, which is 1 where sampler and trainer agree, had a standard deviation of 0.0012 in f16 and of 0.010 in bf16.
pub const COMPUTE_DTYPE_ON_CARDS: ComputeDtype = ComputeDtype::F16;

impl Base {
    /// A model with every key at its default.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            quantize: None,
            compute_dtype: None,
            device: None,
            offload: None,
            kv_cache_type: None,
            dequantise: None,
        }
    }

    /// `device`, or its default.
    pub fn device(&self) -> DeviceChoice {
        self.device.unwrap_or_default()
    }

    /// `offload`, or its default.
    pub fn offload(&self) -> Offload {
        self.offload.unwrap_or_default()
    }

    /// `kv_cache_type`, or its default.
    pub fn kv_cache_type(&self) -> KvCacheType {
        self.kv_cache_type.unwrap_or_default()
    }

    /// Whether it has the cache of keys and values that `other` has, as one base for both.
    pub(super) fn is_generated_with_as(&self, other: &Self) -> bool {
        let of = |base: &Self| (base.path.clone(), base.device(), base.kv_cache_type());
        of(self) == of(other)
    }

    /// `dequantise`, or its default.
    pub fn dequantise(&self) -> Dequantising {
        self.dequantise.unwrap_or_default()
    }

    /// `compute_dtype`, or its default by `device` as it is written: `"auto"` counts as the CPU here, until the run has
    /// chosen a machine.
    pub fn compute_dtype(&self) -> ComputeDtype {
        self.compute_dtype.unwrap_or(match self.device() {
            DeviceChoice::Auto | DeviceChoice::Cpu => ComputeDtype::F32,
            DeviceChoice::Cuda(_) | DeviceChoice::Emulated => COMPUTE_DTYPE_ON_CARDS,
        })
    }
}

/// What `quantize` makes of dense weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[allow(non_camel_case_types)]
pub enum Quantize {
    /// 8.5 bits a number.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4.5 bits a number; q5_0 (5.5) where rows are no multiple of 256.
    #[serde(rename = "q4_k")]
    Q4K,
    /// 4.5 bits a number.
    #[serde(rename = "nf4")]
    Nf4,
}

impl Quantize {
    /// The stored type.
    pub const fn stored(self) -> StorageDType {
        match self {
            Self::Q8_0 => StorageDType::Q8_0,
            Self::Q4K => StorageDType::Q4K,
            Self::Nf4 => StorageDType::NF4,
        }
    }
}

/// `[lora]`: the shape of a new adapter. Keys and defaults are PEFT's `LoraConfig`, except `lora_alpha` (8 there) and
/// `target_modules`. Where a stage continues an adapter, that adapter's own shape counts and this section is not used.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// Rank of the two factors. Default 8 (PEFT).
    pub r: usize,
    /// Scale: the branch is multiplied by `lora_alpha / r`, with rsLoRA by `lora_alpha / sqrt(r)`. Default 16 (twice
    /// the rank, LLaMA-Factory's rule).
    pub lora_alpha: f64,
    /// Which layers get a branch: `"all-linear"` (all linear ones but the output head), a list of name endings such as
    /// `["q_proj", "v_proj"]`, among them `embed_tokens` and `lm_head` (by the family's names), or another string: a
    /// regular expression over the whole module name.
    /// Default `"all-linear"` (QLoRA's finding, arXiv:2305.14314 section 4).
    pub target_modules: TargetModules,
    /// Layers that get no branch although `target_modules` names them, in the same forms. Absent = none (PEFT).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Rank-stabilised scale, arXiv:2312.03732. Default false (PEFT).
    pub use_rslora: bool,
    /// Block numbers, from 0, that get adapters; absent = every block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Ranks of single layers: `{ q_proj = 16 }`. A key is a name ending or a regular expression; where several match a
    /// layer, the first in alphabetical order counts. Default none (PEFT).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of single layers, likewise. Default none (PEFT).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Whose behaviour to keep. `"dschat"`: DeepSpeed-Chat's scale of 1/r and its start, uniform in ±1/sqrt(r),
    /// whatever `lora_alpha` would be. Absent = PEFT's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
    /// How the two factors start. Default `"default"` (PEFT's `True`).
    pub init_lora_weights: InitLoraWeights,
    /// DoRA, arXiv:2402.09353: each row's length is a trained number of its own. Default false (PEFT).
    pub use_dora: bool,
    /// LoRA+, arXiv:2402.12354: the second factor learns with this many times the learning rate. Default 1, as without
    /// (PEFT's `create_loraplus_optimizer`; the paper's advice is 16).
    pub loraplus_lr_ratio: f64,
    /// The keys that the file has. They decide nothing: a message names them where an adapter's own shape counts.
    #[serde(skip)]
    pub given: Given,
}

/// Names of keys that a file has; two lists are equal whatever they hold, since a key that is written out with its default
/// means the same.
#[derive(Clone, Debug, Default)]
pub struct Given(pub Vec<String>);

impl PartialEq for Given {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// `init_lora_weights`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum InitLoraWeights {
    /// A kaiming-uniform, B zero.
    #[default]
    Default,
    /// A normal of deviation 1/r, B zero.
    Gaussian,
    /// The principal singular directions of each weight (arXiv:2404.02948).
    Pissa,
    /// The first directions of each weight's QR decomposition (arXiv:2406.01775).
    Olora,
    /// DeepSpeed-Chat's: A uniform in ±1/sqrt(r), B zero; its scale of 1/r is `lora_alpha = 1`.
    Dschat,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 16.0,
            target_modules: TargetModules::One("all-linear".to_owned()),
            exclude_modules: None,
            use_rslora: false,
            layers_to_transform: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            compat: None,
            init_lora_weights: InitLoraWeights::Default,
            use_dora: false,
            loraplus_lr_ratio: 1.0,
            given: Given::default(),
        }
    }
}

impl Lora {
    /// Numerator of the scale: `lora_alpha`, or 1 as DeepSpeed-Chat has it.
    pub fn alpha(&self) -> f64 {
        match self.compat {
            Some(Compat::Dschat) => 1.0,
            None => self.lora_alpha,
        }
    }

    /// The start of the factors: `init_lora_weights`, or DeepSpeed-Chat's.
    pub fn init(&self) -> InitLoraWeights {
        match self.compat {
            Some(Compat::Dschat) => InitLoraWeights::Dschat,
            None => self.init_lora_weights,
        }
    }
}

/// `target_modules` as written: a string or a list.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(
    untagged,
    expecting = "must be \"all-linear\", a list of module names such as [\"q_proj\"], or a regular expression"
)]
pub enum TargetModules {
    /// `"all-linear"`, or a regular expression that must match the whole module name.
    One(String),
    /// Module names: each matches a module of that name or one whose dotted name ends in it.
    List(Vec<String>),
}

impl TargetModules {
    /// Is it the shorthand for every linear layer of a block?
    pub fn is_all_linear(&self) -> bool {
        matches!(self, Self::One(text) if text == "all-linear")
    }
}

/// `[data]`: where the records come from and how they become token sequences.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// A file (JSON array, JSON lines, Parquet, CSV, TSV or text; all but Parquet also with `.gz`), a pattern such as
    /// `data/*.jsonl`, a folder (its readable files, those of its folders too, in the order of their names), or a list
    /// of these. Required by every training stage, unless `sources` are given.
    #[serde(skip_serializing_if = "Paths::is_empty")]
    pub path: Paths,
    /// What a record holds. Default `auto`: read off the keys of most of a file's first 16 records.
    pub format: Format,
    /// The name of a public data set, such as `"openai/webgpt_comparisons"`, whose columns are known by that name: the
    /// sixteen of DeepSpeed-Chat. Instead of `format` and `columns`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// Of a folder, only the files in whose name this is a word, such as `"train"`. Absent = all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// The branch, tag or commit of a data set on the hub. Absent = `main`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Are the records comparisons (LLaMA-Factory's `ranking`)? Absent: yes where there are `chosen` and `rejected`;
    /// false reads such records as if they had neither.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranking: Option<bool>,
    /// How a dialogue becomes text. Default: `chat` where the tokenizer brings a chat template or `chat_template` is
    /// given, else `plain`; `human_assistant` under `compat = "dschat"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
    /// A Jinja template to use instead of the tokenizer's own, as transformers reads it; TOML's `'''` holds one of
    /// several lines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// What SFT learns of a dialogue whose chat template renders a response differently once more turns follow (it drops the
    /// thoughts of earlier turns, as Qwen3's and DeepSeek-R1's do). Other dialogues learn every response, and a template's
    /// `{% generation %}` blocks take precedence. Default `last`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multi_turn: Option<MultiTurn>,
    /// Whose behaviour to keep. `"dschat"`: rows by `data_split` and numpy's shuffle, prompt and response tokenised in
    /// one piece and cut at the right, SFT on every token, long prompts filtered. Absent = none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
    /// Under `compat = "dschat"`, here or in `[reward]` or `[ppo]`: the token that rows are padded with. Absent = a
    /// Llama's own pad token, and the end token of all others (DeepSpeed-Chat).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_token: Option<String>,
    /// Under `compat = "dschat"`: how much of the records SFT, reward model and PPO get. Default `"2,4,4"`
    /// (DeepSpeed-Chat), that is 20%, 40% and 40%.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_split: Option<String>,
    /// Most tokens of a training sequence, prompt and response with its end token. Default 512 (DeepSpeed-Chat's
    /// `max_seq_len`).
    pub max_length: usize,
    /// Most tokens of a PPO prompt; longer ones are dropped and counted, never cut, since a cut prompt loses its
    /// template. Default 256 (DeepSpeed-Chat's `max_prompt_seq_len`).
    pub max_prompt_length: usize,
    /// What happens to a sequence longer than `max_length`. Default `drop`: a cut response loses its end token and
    /// teaches the model not to stop.
    pub truncation: Truncation,
    /// Share of the records held out for evaluation, in [0, 1). Default 0.05 unless `eval_rows` is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_fraction: Option<f64>,
    /// Number of records held out for evaluation, instead of `eval_fraction`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_rows: Option<usize>,
    /// Reads no more than this many records, over all files; absent = all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rows: Option<usize>,
    /// What a record that cannot be used does. Default `error`: stop and name it; `skip` drops and counts it.
    pub on_bad_record: OnBadRecord,
    /// Folder of tokenised data, made once and mapped into memory by every run that wants the same. Default
    /// `$XDG_CACHE_HOME/fourfold/tokens`, else `~/.cache/fourfold/tokens`, and only for files of 16 MiB or more in all:
    /// smaller ones are tokenised in memory, unless this key is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
    /// How several sources become one stream. Default: `concat`, or `interleave_under` where a source has a weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mix_strategy: Option<MixStrategy>,
    /// What the file calls its columns.
    #[serde(skip_serializing_if = "is_default")]
    pub columns: ColumnNames,
    /// How the turns of its conversations are written.
    #[serde(skip_serializing_if = "is_default")]
    pub tags: Tags,
    /// Several sources, instead of `path`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<Source>,
    /// The run's seed, by which sources are mixed: no key, set from the top of the file.
    #[serde(skip)]
    pub seed: u64,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for Data {
    fn default() -> Self {
        Self {
            path: Paths::default(),
            format: Format::Auto,
            template: None,
            chat_template: None,
            multi_turn: None,
            compat: None,
            pad_token: None,
            data_split: None,
            max_length: 512,
            max_prompt_length: 256,
            truncation: Truncation::Drop,
            eval_fraction: None,
            eval_rows: None,
            max_rows: None,
            on_bad_record: OnBadRecord::Error,
            cache_dir: None,
            preset: None,
            split: None,
            revision: None,
            ranking: None,
            mix_strategy: None,
            columns: ColumnNames::default(),
            tags: Tags::default(),
            sources: Vec::new(),
            seed: 0,
        }
    }
}

impl Data {
    /// The held-out part.
    pub fn eval_size(&self) -> EvalSize {
        match (self.eval_rows, self.eval_fraction) {
            (Some(rows), _) => EvalSize::Rows(rows),
            (None, fraction) => EvalSize::Fraction(fraction.unwrap_or(0.05)),
        }
    }
}

/// How much is held out for evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EvalSize {
    /// A share of all records.
    Fraction(f64),
    /// A number of records.
    Rows(usize),
}

/// What a record holds. The names are TRL's dataset types and LLaMA-Factory's formats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Read off the keys of most of a file's first 16 records.
    #[default]
    Auto,
    /// `text`, or `messages` as one conversation.
    LanguageModeling,
    /// `prompt` and `completion`, texts or message lists.
    PromptCompletion,
    /// `chosen` and `rejected`, with or without `prompt` (or ShareGPT's `conversations`).
    Preference,
    /// `prompt` and `responses`, best first, or with `scores`.
    Ranked,
    /// `prompt` and `completion`, or `messages`, with `label`.
    Unpaired,
    /// `prompt` alone.
    PromptOnly,
    /// `instruction`, `input`, `output`, with `system` and `history` where given.
    Alpaca,
    /// `conversations` of `{from, value}`.
    Sharegpt,
    /// `chosen` and `rejected` transcripts of `\n\nHuman:` and `\n\nAssistant:` turns.
    HhRlhf,
}

/// Whose behaviour to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compat {
    /// DeepSpeed-Chat's.
    Dschat,
}

/// How a dialogue becomes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// The tokenizer's own chat template.
    Chat,
    /// ` Human: … Assistant: …`, as in DeepSpeed-Chat.
    HumanAssistant,
    /// `\n\nHuman: …\n\nAssistant: …`, as in HH-RLHF.
    HhRlhf,
    /// Turns joined by a line break and nothing added.
    Plain,
}

/// What SFT learns of a dialogue whose earlier responses the chat template renders differently once more turns follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MultiTurn {
    /// The last response, after the dialogue as the template renders it there.
    #[default]
    Last,
    /// Every response, in a sequence of its own that ends with it.
    Each,
    /// Such a record is bad.
    Error,
}

/// What happens to a sequence that is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// The record is dropped and counted.
    #[default]
    Drop,
    /// The prompt loses its first tokens, the response stays whole; dropped where the response alone is too long.
    Left,
    /// The end is cut off, with its end token; dropped where nothing of a response is left.
    Right,
    /// `"keep_end"`: as `right`, and the last token left of a cut response becomes the end token.
    #[serde(rename = "keep_end")]
    KeepEnd,
}

/// What a record that cannot be used does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRecord {
    /// Ends the run with a message that names file, record and column.
    #[default]
    Error,
    /// Is dropped and counted.
    Skip,
}

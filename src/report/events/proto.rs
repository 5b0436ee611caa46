//! The messages of TensorBoard's event files, as far as they are written here. It does not depend on the file's form. Source:
//! TensorFlow, `event.proto`, `summary.proto`, `tensor.proto`, and TensorBoard, `plugins/hparams/plugin_data.proto`.

use std::collections::BTreeMap;

use prost::{Message, Oneof};
use serde_json::{Map, Value as Json};

/// `DataType.DT_STRING`.
const DT_STRING: i32 = 7;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Event {
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    #[prost(int64, tag = "2")]
    pub step: i64,
    #[prost(oneof = "What", tags = "3, 5")]
    pub what: Option<What>,
}

#[derive(Clone, PartialEq, Oneof)]
pub(super) enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 5, 8")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    Simple(f32),
    #[prost(message, tag = "5")]
    Histogram(Histogram),
    #[prost(message, tag = "8")]
    Tensor(Tensor),
}

#[derive(Clone, PartialEq, Message)]
struct Histogram {
    #[prost(double, tag = "1")]
    min: f64,
    #[prost(double, tag = "2")]
    max: f64,
    #[prost(double, tag = "3")]
    num: f64,
    #[prost(double, tag = "4")]
    sum: f64,
    #[prost(double, tag = "5")]
    sum_squares: f64,
    #[prost(double, repeated, tag = "6")]
    bucket_limit: Vec<f64>,
    #[prost(double, repeated, tag = "7")]
    bucket: Vec<f64>,
}

/// A tensor of one string and no dimension.
#[derive(Clone, PartialEq, Message)]
struct Tensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Shape {}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin: Option<Plugin>,
}

#[derive(Clone, PartialEq, Message)]
struct Plugin {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "vec", tag = "2")]
    content: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Hyperparameters {
    #[prost(message, optional, tag = "3")]
    start: Option<SessionStart>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionStart {
    #[prost(btree_map = "string, message", tag = "1")]
    hparams: BTreeMap<String, Value>,
    #[prost(double, tag = "5")]
    start_time_secs: f64,
}

/// `google.protobuf.Value`.
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(oneof = "Kind", tags = "2, 3, 4")]
    kind: Option<Kind>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Kind {
    #[prost(double, tag = "2")]
    Number(f64),
    #[prost(string, tag = "3")]
    Text(String),
    #[prost(bool, tag = "4")]
    Bool(bool),
}

impl Event {
    /// The first event of a file.
    pub(super) fn version() -> Self {
        Self { wall_time: 0.0, step: 0, what: Some(What::FileVersion("brain.Event:2".into())) }
    }

    pub(super) fn of(step: i64, summary: Summary) -> Self {
        Self { wall_time: 0.0, step, what: Some(What::Summary(summary)) }
    }
}

impl SummaryValue {
    pub(super) fn scalar(tag: String, value: f32) -> Self {
        Self { tag, metadata: None, content: Some(Content::Simple(value)) }
    }

    /// A distribution as metrics.jsonl has it; `None` if it is none.
    pub(super) fn histogram(tag: String, found: &Map<String, Json>) -> Option<Self> {
        let number = |key: &str| found.get(key).and_then(Json::as_f64);
        let bucket: Vec<f64> = found.get("counts")?.as_array()?.iter().filter_map(Json::as_f64).collect();
        let (min, max, bins) = (number("min")?, number("max")?, bucket.len());
        let limit = |i: usize| if i == bins { max } else { min + (max - min) * i as f64 / bins as f64 };
        let content = Histogram {
            min,
            max,
            num: number("num")?,
            sum: number("sum")?,
            sum_squares: number("sum_squares")?,
            bucket_limit: (1..=bins).map(limit).collect(),
            bucket,
        };
        Some(Self { tag, metadata: None, content: Some(Content::Histogram(content)) })
    }

    /// A text, which TensorBoard reads as markdown.
    pub(super) fn text(tag: String, text: &str) -> Self {
        let tensor = Tensor { dtype: DT_STRING, shape: Some(Shape {}), string: vec![text.as_bytes().to_vec()] };
        Self { tag, metadata: Some(Metadata::of("text", vec![])), content: Some(Content::Tensor(tensor)) }
    }

    /// The settings of the run as hyperparameters, by their paths.
    pub(super) fn hyperparameters(settings: &toml::Table, start_time_secs: f64) -> Self {
        let mut hparams = BTreeMap::new();
        flatten("", &toml::Value::Table(settings.clone()), &mut hparams);
        let start = Some(SessionStart { hparams, start_time_secs });
        let content = Hyperparameters { start }.encode_to_vec();
        let tag = "_hparams_/session_start_info".into();
        Self { tag, metadata: Some(Metadata::of("hparams", content)), content: None }
    }
}

impl Metadata {
    fn of(plugin: &str, content: Vec<u8>) -> Self {
        Self { plugin: Some(Plugin { name: plugin.into(), content }) }
    }
}

fn flatten(at: &str, value: &toml::Value, into: &mut BTreeMap<String, Value>) {
    let kind = match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                flatten(&if at.is_empty() { key.clone() } else { format!("{at}.{key}") }, value, into);
            }
            return;
        }
        toml::Value::Integer(i) => Kind::Number(*i as f64),
        toml::Value::Float(x) => Kind::Number(*x),
        toml::Value::Boolean(b) => Kind::Bool(*b),
        toml::Value::String(text) => Kind::Text(text.clone()),
        other => Kind::Text(other.to_string()),
    };
    into.insert(at.to_owned(), Value { kind: Some(kind) });
}

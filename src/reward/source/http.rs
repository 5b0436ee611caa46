//! A reward source that calls an HTTP service: one request per rollout, `POST {"prompts": […], "responses": […]}`, with the
//! reply `{"scores": […]}` in the same order. It does not depend on the model. Read `retry.rs` for how failures are
//! handled.
//!
//! Where the records are known, the request also has `"record_ids": […]` and `"columns": {"name": […], …}`: every column of
//! the records, one value per response as TRL's reward functions get them, null where a record lacks the column.
//! `https://` needs a build with the feature `hub`; otherwise run a local proxy that speaks TLS.

use std::cell::RefCell;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::endpoint::Endpoint;
use super::{RewardInputs, RewardSource};
use crate::data::stream::columns::{Columns, RecordColumns};
use crate::report::Metrics;
use crate::reward::source::retry::{Failure, RetryPolicy, Troubles, excerpt, score_of};

/// A reward endpoint.
pub struct HttpReward<'w> {
    endpoint: Endpoint,
    columns: Option<&'w Columns>,
    retry: RetryPolicy,
    troubles: RefCell<Troubles>,
}

impl<'w> HttpReward<'w> {
    /// Creates the client; the first request is sent with the first rollout. `key`: the bearer token of the
    /// `Authorization` header.
    pub fn new(url: String, key: Option<String>, columns: Option<&'w Columns>, retry: RetryPolicy) -> Self {
        Self { endpoint: Endpoint::new(url, key, retry.timeout), columns, retry, troubles: RefCell::default() }
    }

    /// Failures so far.
    pub fn troubles(&self) -> Troubles {
        *self.troubles.borrow()
    }

    fn ask(&self, body: &Value) -> Result<Vec<Option<f32>>, Failure> {
        let value = self.endpoint.post(body)?;
        match value.get("scores").and_then(Value::as_array) {
            Some(scores) => Ok(scores.iter().map(score_of).collect()),
            None => Err(Failure::Passing(format!("its reply has no list \"scores\": {}", excerpt(&value.to_string())))),
        }
    }
}

/// Ids and columns of the records, one value per response.
fn by_name(inputs: &RewardInputs<'_>, columns: &Columns) -> (Vec<Value>, Map<String, Value>) {
    let records: Vec<_> = (0..inputs.responses.len()).map(|i| inputs.record(columns, i)).collect();
    let ids = records.iter().map(|record| record.map_or(Value::Null, |record| record.id.clone())).collect();
    let mut all = Map::new();
    for name in records.iter().flatten().flat_map(|record| record.columns.keys()) {
        if !all.contains_key(name) {
            let value = |record: Option<&RecordColumns>| record.and_then(|r| r.columns.get(name)).cloned();
            all.insert(name.clone(), records.iter().map(|&record| value(record).unwrap_or_default()).collect());
        }
    }
    (ids, all)
}

impl RewardSource for HttpReward<'_> {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let prompts: Vec<String> = inputs.prompts.iter().map(|p| (inputs.decode)(p)).collect();
        let responses: Vec<String> = inputs.responses.iter().map(|r| inputs.text(r)).collect();
        let mut body = json!({ "prompts": prompts, "responses": responses });
        if let Some(columns) = self.columns {
            let (ids, columns) = by_name(inputs, columns);
            body["record_ids"] = ids.into();
            body["columns"] = columns.into();
        }
        let name = format!("reward endpoint {}", self.endpoint.url);
        let mut troubles = self.troubles.borrow_mut();
        self.retry.scores(&name, responses.len(), &mut troubles, || self.ask(&body))
    }

    fn metrics(&self) -> Metrics {
        self.troubles().metrics()
    }

    fn state(&self) -> Value {
        self.troubles().metrics().into()
    }

    fn restore(&self, state: &Value) {
        *self.troubles.borrow_mut() = Troubles::of(state);
    }
}

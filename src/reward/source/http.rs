//! A reward source that calls an HTTP service: one request per rollout, `POST {"prompts": […], "responses": […]}`, with the
//! reply `{"scores": […]}` in the same order. Plain http only: for a remote service, run a local proxy that speaks TLS. It
//! does not depend on the model. Read `retry.rs` for how failures are handled.

use std::cell::RefCell;

use anyhow::Result;
use serde_json::{Value, json};
use ureq::Agent;

use super::{RewardInputs, RewardSource};
use crate::report::Metrics;
use crate::reward::source::retry::{Failure, RetryPolicy, Troubles, excerpt, score_of};

/// Maximum size of a reply's body.
const LONGEST_BODY: u64 = 16 << 20;

/// A reward endpoint.
pub struct HttpReward {
    url: String,
    agent: Agent,
    retry: RetryPolicy,
    troubles: RefCell<Troubles>,
}

impl HttpReward {
    /// Creates the client; the first request is sent with the first rollout.
    pub fn new(url: String, retry: RetryPolicy) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(retry.timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .build();
        Self { url, agent: config.into(), retry, troubles: RefCell::default() }
    }

    /// Failures so far.
    pub fn troubles(&self) -> Troubles {
        *self.troubles.borrow()
    }

    fn ask(&self, body: &[u8]) -> Result<Vec<Option<f32>>, Failure> {
        let request = self.agent.post(&self.url).header("content-type", "application/json");
        let mut response = request.send(body).map_err(|error| Failure::Passing(error.to_string()))?;
        let status = response.status();
        let text = response.body_mut().with_config().limit(LONGEST_BODY).read_to_vec();
        let text = text.map_err(|error| Failure::Passing(format!("reading its reply: {error}")))?;
        let text = String::from_utf8_lossy(&text);
        if !status.is_success() {
            let fault = format!("HTTP status {status}: {}", excerpt(&text));
            // Server errors, time-outs and rate limits may pass; a wrong address does not.
            let passes = status.is_server_error() || [408, 425, 429].contains(&status.as_u16());
            return Err(if passes { Failure::Passing(fault) } else { Failure::Final(fault) });
        }
        let value: Value = serde_json::from_str(&text)
            .map_err(|_| Failure::Passing(format!("its reply is not JSON: {}", excerpt(&text))))?;
        match value.get("scores").and_then(Value::as_array) {
            Some(scores) => Ok(scores.iter().map(score_of).collect()),
            None => Err(Failure::Passing(format!("its reply has no list \"scores\": {}", excerpt(&text)))),
        }
    }
}

impl RewardSource for HttpReward {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let prompts: Vec<String> = inputs.prompts.iter().map(|p| (inputs.decode)(p)).collect();
        let responses: Vec<String> = inputs.responses.iter().map(|r| inputs.text(r)).collect();
        let body = json!({ "prompts": prompts, "responses": responses }).to_string();
        let name = format!("reward endpoint {}", self.url);
        let mut troubles = self.troubles.borrow_mut();
        self.retry.scores(&name, responses.len(), &mut troubles, || self.ask(body.as_bytes()))
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

//! A reward by a service: one request a rollout, `POST {"prompts": […], "responses": […]}`, answered by
//! `{"scores": […]}` in the same order. Plain http: a service further away than this machine or network belongs behind
//! a local proxy that speaks TLS. Read patience.rs for what happens when it fails.

use std::cell::RefCell;

use anyhow::Result;
use serde_json::{Value, json};
use ureq::Agent;

use super::{Answers, RewardSource};
use crate::report::Figures;
use crate::reward::source::retry::{Failure, Patience, Troubles, excerpt, score_of};

/// No body is read further than this.
const LONGEST_BODY: u64 = 16 << 20;

/// An endpoint that scores.
pub struct HttpReward {
    url: String,
    agent: Agent,
    patience: Patience,
    troubles: RefCell<Troubles>,
}

impl HttpReward {
    /// Nothing is sent before the first rollout.
    pub fn new(url: String, patience: Patience) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(patience.timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .build();
        Self { url, agent: config.into(), patience, troubles: RefCell::default() }
    }

    /// What went wrong so far.
    pub fn troubles(&self) -> Troubles {
        *self.troubles.borrow()
    }

    fn ask(&self, body: &[u8]) -> Result<Vec<Option<f32>>, Failure> {
        let request = self.agent.post(&self.url).header("content-type", "application/json");
        let mut response = request.send(body).map_err(|error| Failure::Passing(error.to_string()))?;
        let status = response.status();
        let text = response.body_mut().with_config().limit(LONGEST_BODY).read_to_vec();
        let text = text.map_err(|error| Failure::Passing(format!("reading its answer: {error}")))?;
        let text = String::from_utf8_lossy(&text);
        if !status.is_success() {
            let fault = format!("HTTP status {status}: {}", excerpt(&text));
            // Too many requests, a time-out there and a server's own trouble pass; a wrong address does not.
            let passes = status.is_server_error() || [408, 425, 429].contains(&status.as_u16());
            return Err(if passes { Failure::Passing(fault) } else { Failure::Final(fault) });
        }
        let value: Value = serde_json::from_str(&text)
            .map_err(|_| Failure::Passing(format!("it answered with something that is no JSON: {}", excerpt(&text))))?;
        match value.get("scores").and_then(Value::as_array) {
            Some(scores) => Ok(scores.iter().map(score_of).collect()),
            None => Err(Failure::Passing(format!("its answer has no list \"scores\": {}", excerpt(&text)))),
        }
    }
}

impl RewardSource for HttpReward {
    fn scores(&self, answers: &Answers<'_>) -> Result<Vec<f32>> {
        let prompts: Vec<String> = answers.prompts.iter().map(|p| (answers.decode)(p)).collect();
        let responses: Vec<String> = answers.responses.iter().map(|r| answers.text(r)).collect();
        let body = json!({ "prompts": prompts, "responses": responses }).to_string();
        let name = format!("reward endpoint {}", self.url);
        let mut troubles = self.troubles.borrow_mut();
        self.patience.scores(&name, responses.len(), &mut troubles, || self.ask(body.as_bytes()))
    }

    fn figures(&self) -> Figures {
        self.troubles().figures()
    }

    fn state(&self) -> Value {
        self.troubles().figures().into()
    }

    fn restore(&self, state: &Value) {
        *self.troubles.borrow_mut() = Troubles::of(state);
    }
}

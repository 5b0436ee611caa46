//! `POST` of a JSON object to an HTTP service, or `GET` from one, and which failures may pass. It does not depend on what is asked
//! or on the model. Read `http.rs`, `judge.rs`, `run/served_rollouts.rs` and `run/llama_cpp.rs` for its users.

use http::Response;
use serde_json::Value;
use ureq::{Agent, Body};

use super::reply::error_text;
use super::retry::{Failure, beginning, excerpt};

/// Maximum size of a reply's body.
const LONGEST_BODY: u64 = 16 << 20;
/// Characters of an error's own words: vLLM names the cause after a hundred.
const LONGEST_MESSAGE: usize = 400;

/// An address with its client.
pub struct Endpoint {
    /// The address.
    pub url: String,
    key: Option<String>,
    agent: Agent,
}

impl Endpoint {
    /// Creates the client; nothing is sent yet. `key`: the bearer token of the `Authorization` header.
    pub fn new(url: String, key: Option<String>, timeout: std::time::Duration) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .build();
        Self { url, key, agent: config.into() }
    }

    /// The JSON value that the service replies with.
    ///
    /// # Errors
    /// Those of [`Endpoint::send`]; if the reply is not JSON.
    pub fn post(&self, body: &Value) -> Result<Value, Failure> {
        let text = self.send(body)?;
        serde_json::from_str(&text).map_err(|_| Failure::Passing(format!("its reply is not JSON: {}", excerpt(&text))))
    }

    /// The text that the service replies with.
    ///
    /// # Errors
    /// If there is no reply in time, or its status is not a success.
    pub fn send(&self, body: &Value) -> Result<String, Failure> {
        let mut request = self.agent.post(&self.url).header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        Self::read(request.send(body.to_string().as_bytes()))
    }

    /// The text that the service replies with to a `GET`.
    ///
    /// # Errors
    /// Those of [`Endpoint::send`].
    pub fn get(&self) -> Result<String, Failure> {
        Self::read(self.agent.get(&self.url).call())
    }

    fn read(response: Result<Response<Body>, ureq::Error>) -> Result<String, Failure> {
        let mut response = response.map_err(|error| Failure::Passing(error.to_string()))?;
        let status = response.status();
        let text = response.body_mut().with_config().limit(LONGEST_BODY).read_to_vec();
        let text = text.map_err(|error| Failure::Passing(format!("reading its reply: {error}")))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        if !status.is_success() {
            let reply: Option<Value> = serde_json::from_str(&text).ok();
            let said = reply.as_ref().and_then(error_text);
            let said = said.map_or_else(|| excerpt(&text), |said| beginning(said, LONGEST_MESSAGE));
            let fault = format!("HTTP status {status}: {said}");
            // Server errors, time-outs and rate limits may pass; a wrong address or key does not.
            let passes = status.is_server_error() || [408, 425, 429].contains(&status.as_u16());
            return Err(if passes { Failure::Passing(fault) } else { Failure::Final(fault) });
        }
        Ok(text)
    }
}

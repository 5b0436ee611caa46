//! A request that cannot be answered as asked: HTTP status and the object that OpenAI's clients read. It does not depend on the
//! engine. Read `fields.rs` beside it for what is wrong with a body.

use serde_json::{Value, json};

use super::engine::Refused;
use crate::error::exit_code;

/// Why a request is not answered as asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// HTTP status.
    pub status: u16,
    /// What is wrong and what to do.
    pub message: String,
    /// The field of the body that is wrong.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
}

impl Fault {
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// 400.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(400, message)
    }

    /// 400 for one field.
    pub fn field(name: &str, message: impl Into<String>) -> Self {
        Self { param: Some(name.to_owned()), ..Self::bad(format!("{name}: {}", message.into())) }
    }

    /// 404 for a model that is not served.
    pub fn no_model(name: &str) -> Self {
        Self {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..Self::new(404, format!("The model `{name}` does not exist; GET /v1/models lists those that do."))
        }
    }

    /// An error of the program: 400 where the input is at fault, else 500.
    pub fn of(error: &anyhow::Error) -> Self {
        Self::new(if exit_code(error) == 2 { 400 } else { 500 }, format!("{error:#}"))
    }

    /// The body of the reply.
    pub fn body(&self) -> Value {
        let kind = match self.status {
            401 => "authentication_error",
            404 if self.code.is_some() => "not_found_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}

impl From<Refused> for Fault {
    fn from(refused: Refused) -> Self {
        Self::new(
            503,
            match refused {
                Refused::Full => {
                    "too many requests wait already; try again later, or start the server with a larger --max-queue"
                }
                Refused::Ended => "the server is ending",
            },
        )
    }
}

//! An HTTP server over one base and any number of adapters, which speaks OpenAI's and vLLM's requests: text by a policy, scores by
//! a reward adapter, adapters loaded and unloaded by name while requests run.
//!
//! - `engine.rs` generates: one thread that owns the model's work, where requests share decoding steps;
//! - `http.rs` and `answers.rs` are connections, paths and what each path does;
//! - `fields.rs`, `request.rs`, `prompt.rs`, `score.rs` and `tokens.rs` read bodies; `choice.rs` and `reply.rs` write replies;
//!   `fault.rs` is what a client is told when there is none; `adapters.rs` holds the names.
//!
//! It does not depend on stages. Read `engine.rs` next; `configs/serve.md` says what is supported.

mod adapters;
mod answers;
mod choice;
pub mod engine;
mod fault;
mod fields;
mod http;
mod prompt;
mod reply;
mod request;
mod score;
mod tokens;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use tokio::sync::watch;

use crate::invalid;
use crate::run::Model;
use adapters::{Adapters, now};
use engine::{Engine, Limits};

/// Threads that read requests.
const READERS: usize = 4;

/// How a server is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name of the base.
    pub name: String,
    /// The key that clients send, if they have to.
    pub key: Option<String>,
    /// How much is done at once.
    pub limits: Limits,
    /// Bytes of a request's body.
    pub max_body: usize,
    /// Whether log-probabilities are those before the temperature, whatever it is.
    pub raw_logprobs: bool,
}

/// How a server is asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// Not yet.
    No,
    /// Requests that are there are finished.
    Finish,
    /// Requests are given up.
    Cut,
}

/// What the threads of a server share.
struct State {
    model: Arc<Model>,
    /// The model's path.
    root: String,
    /// The model's tokens that end a response.
    ends: Vec<u32>,
    engine: Engine,
    adapters: Adapters,
    options: Options,
    requests: AtomicU64,
}

impl State {
    /// An id for a reply.
    fn id(&self, kind: &str) -> String {
        format!("{kind}-{:x}-{:x}", now(), self.requests.fetch_add(1, Ordering::Relaxed))
    }
}

/// A server that does not listen yet.
pub struct Server(Arc<State>);

impl Server {
    /// Starts the engine over a model.
    ///
    /// # Errors
    /// If there can be no further thread.
    pub fn new(model: Model, options: Options) -> Result<Self> {
        let model = Arc::new(model);
        let engine = Engine::start(model.clone(), options.limits)?;
        let root = match (model.checkpoint.id(), model.checkpoint.path()) {
            (Some(id), _) => id.to_owned(),
            (None, Some(path)) => path.display().to_string(),
            (None, None) => options.name.clone(),
        };
        let adapters = Adapters::new(options.name.clone());
        let ends = model.checkpoint.tokenizer().ends(None);
        Ok(Self(Arc::new(State { model, root, ends, engine, adapters, options, requests: AtomicU64::new(0) })))
    }

    /// Loads an adapter under a name.
    ///
    /// # Errors
    /// If the name is taken, or the adapter is not one of this base.
    pub fn load(&self, name: &str, path: &Path) -> Result<()> {
        self.0.adapters.load(&self.0.model, name, path, false).map_err(|fault| invalid!("{}", fault.message))
    }

    /// Serves until `stop` asks for the end; all requests are answered or given up then. Returns whether some were given up.
    ///
    /// # Errors
    /// If the listener cannot be used.
    pub fn run(self, listener: TcpListener, stop: watch::Receiver<Stop>) -> Result<bool> {
        self.run_beside(listener, stop, async {})
    }

    /// As [`Server::run`], beside something that waits for what asks for the end.
    ///
    /// # Errors
    /// As for [`Server::run`].
    pub fn run_beside(
        self,
        listener: TcpListener,
        stop: watch::Receiver<Stop>,
        beside: impl Future<Output = ()> + Send + 'static,
    ) -> Result<bool> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(READERS)
            .thread_name("reader")
            .build()
            .context("starting the server")?;
        let cut = runtime.block_on(async {
            tokio::spawn(beside);
            http::serve(self.0.clone(), listener, stop).await
        });
        // Connections that are left end with their tasks; the engine sees that their clients are gone.
        runtime.shutdown_background();
        let cut = cut?;
        self.0.engine.end(cut);
        Ok(cut)
    }

    /// Runs in a thread of its own, for tests and other programs.
    ///
    /// # Errors
    /// If the listener has no address, or there can be no further thread.
    pub fn spawn(self, listener: TcpListener) -> Result<Running> {
        let address = listener.local_addr().context("the server's address")?;
        let (stop, stopped) = watch::channel(Stop::No);
        let work = move || self.run(listener, stopped);
        let thread =
            thread::Builder::new().name("server".into()).spawn(work).context("starting the server's thread")?;
        Ok(Running { address, stop, thread: Some(thread) })
    }
}

/// A server in a thread of its own; it ends when this is dropped.
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    stop: watch::Sender<Stop>,
    thread: Option<JoinHandle<Result<bool>>>,
}

impl Running {
    /// Asks for the end and waits for it; returns whether requests were given up.
    ///
    /// # Errors
    /// The server's.
    pub fn end(mut self, how: Stop) -> Result<bool> {
        let _ = self.stop.send(how);
        let thread = self.thread.take().context("a server ends once")?;
        thread.join().map_err(|_| anyhow!("the server's thread has panicked"))?
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.stop.send(Stop::Cut);
            let _ = thread.join();
        }
    }
}

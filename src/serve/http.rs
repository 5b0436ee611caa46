//! Connections, paths, keys and bodies: HTTP/1.1 requests -> replies. One thread serves all connections; what takes longer (texts
//! to token ids, adapters from files) is done on others, and the model's work by the engine. It does not depend on operations. Read
//! `answers.rs` beside it for what the endpoints do.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::TcpListener;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Result;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{ALLOW, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::answers;
use super::engine::Cancel;
use super::fault::Fault;
use super::{State, Stop};
use crate::note;

/// Longest wait for a request's head on a connection, and for its body.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for running requests after the first signal.
const GRACE: Duration = Duration::from_secs(30);
/// Wait after a connection that could not be accepted: this process may have too many files open.
const AFTER_REFUSAL: Duration = Duration::from_millis(50);

/// The body of a reply.
pub(super) enum Reply {
    /// All of it.
    Whole(Option<Bytes>),
    /// Chunks as they come; dropping it ends the request's sequences, as when the client hangs up.
    Stream { chunks: mpsc::Receiver<Bytes>, _cancel: Cancel },
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream { chunks, .. } => {
                chunks.poll_recv(context).map(|chunk| chunk.map(|bytes| Ok(Frame::data(bytes))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Stream { .. } => SizeHint::default(),
        }
    }
}

fn whole(status: u16, kind: &'static str, bytes: impl Into<Bytes>) -> Response<Reply> {
    let mut reply = Response::new(Reply::Whole(Some(bytes.into())));
    *reply.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    reply
}

/// A JSON reply.
pub(super) fn json(status: u16, value: &Value) -> Response<Reply> {
    whole(status, "application/json", value.to_string())
}

/// A reply of a sentence.
pub(super) fn sentence(text: String) -> Response<Reply> {
    whole(200, "text/plain; charset=utf-8", text)
}

/// A reply of server-sent events.
pub(super) fn events(chunks: mpsc::Receiver<Bytes>, cancel: Cancel) -> Response<Reply> {
    let mut reply = Response::new(Reply::Stream { chunks, _cancel: cancel });
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    reply.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    reply
}

/// What a path asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Health,
    Models,
    Completion,
    Chat,
    Load,
    Unload,
    Score,
    Classify,
    Tokenize,
    Detokenize,
}

const PATHS: &[(&str, &str, Asked)] = &[
    ("GET", "/health", Asked::Health),
    ("GET", "/v1/models", Asked::Models),
    ("POST", "/v1/completions", Asked::Completion),
    ("POST", "/v1/chat/completions", Asked::Chat),
    ("POST", "/v1/load_lora_adapter", Asked::Load),
    ("POST", "/v1/unload_lora_adapter", Asked::Unload),
    ("POST", "/score", Asked::Score),
    ("POST", "/v1/score", Asked::Score),
    ("POST", "/classify", Asked::Classify),
    ("POST", "/tokenize", Asked::Tokenize),
    ("POST", "/detokenize", Asked::Detokenize),
];

/// Compares without a hint, in the time that it takes, at which byte two keys differ.
fn same_key(given: &[u8], key: &[u8]) -> bool {
    given.len() == key.len() && given.iter().zip(key).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

fn check_key(request: &Request<Incoming>, key: Option<&str>) -> Result<(), Fault> {
    let Some(key) = key else { return Ok(()) };
    let given = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let given =
        given.and_then(|value| value.split_at_checked(7)).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    match given {
        Some((_, given)) if same_key(given, key.as_bytes()) => Ok(()),
        Some(_) => Err(Fault { code: Some("invalid_api_key"), ..Fault::new(401, "the API key is not this server's") }),
        None => Err(Fault {
            code: Some("invalid_api_key"),
            ..Fault::new(401, "send the API key: Authorization: Bearer KEY")
        }),
    }
}

/// The body of a request, which is JSON.
async fn body_of(request: Request<Incoming>, most: usize) -> Result<Bytes, Fault> {
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Fault::new(415, format!("the Content-Type is {kind:?}; send application/json")));
    }
    let too_large = || Fault::new(413, format!("the body is larger than {most} bytes"));
    if request.body().size_hint().lower() > most as u64 {
        return Err(too_large());
    }
    match timeout(PATIENCE, Limited::new(request.into_body(), most).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Fault::bad(format!("the body does not arrive: {error}"))),
        Err(_) => Err(Fault::new(408, format!("the body did not arrive in {} s", PATIENCE.as_secs()))),
    }
}

async fn answer(state: &Arc<State>, request: Request<Incoming>) -> Result<Response<Reply>, Fault> {
    let path = request.uri().path().to_owned();
    let known: Vec<_> = PATHS.iter().filter(|(_, known, _)| *known == path).collect();
    // Whoever has no key learns nothing but that the server is there.
    if path != "/health" {
        check_key(&request, state.options.key.as_deref())?;
    }
    let Some(&(method, _, _)) = known.first() else {
        return Err(Fault::new(404, format!("there is nothing at {path:?}")));
    };
    let Some(&&(_, _, asked)) = known.iter().find(|(method, ..)| request.method().as_str() == *method) else {
        return Err(Fault { param: Some((*method).into()), ..Fault::new(405, format!("{path} is asked by {method}")) });
    };
    let body = match *request.method() == Method::POST {
        true => body_of(request, state.options.max_body).await?,
        false => Bytes::new(),
    };
    answers::of(state, asked, body).await
}

async fn reply(state: Arc<State>, request: Request<Incoming>) -> Result<Response<Reply>, Infallible> {
    Ok(match answer(&state, request).await {
        Ok(reply) => reply,
        Err(mut fault) => {
            let allowed = (fault.status == 405).then(|| fault.param.take()).flatten();
            let mut reply = json(fault.status, &fault.body());
            if fault.status == 401 {
                reply.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            if let Some(Ok(allowed)) = allowed.map(|method| HeaderValue::from_str(&method)) {
                reply.headers_mut().insert(ALLOW, allowed);
            }
            reply
        }
    })
}

/// The first of two that is ready.
enum First<A, B> {
    A(A),
    B(B),
}

async fn first<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> First<A, B> {
    let (mut a, mut b) = (pin!(a), pin!(b));
    poll_fn(|context| match (a.as_mut().poll(context), b.as_mut().poll(context)) {
        (Poll::Ready(a), _) => Poll::Ready(First::A(a)),
        (_, Poll::Ready(b)) => Poll::Ready(First::B(b)),
        _ => Poll::Pending,
    })
    .await
}

/// Waits until a stop of at least this kind is asked for.
async fn until(stop: &mut watch::Receiver<Stop>, kind: Stop) {
    // A sender that is gone asks for nothing.
    if stop.wait_for(|asked| *asked >= kind).await.is_err() {
        std::future::pending().await
    }
}

/// Serves until a stop is asked for; returns whether requests were cut.
///
/// # Errors
/// If the listener cannot be used.
pub(super) async fn serve(state: Arc<State>, listener: TcpListener, mut stop: watch::Receiver<Stop>) -> Result<bool> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    // Each connection has a sender; when all are gone, the receiver ends.
    let (alive, mut ended) = mpsc::channel::<Infallible>(1);
    loop {
        let stream = match first(listener.accept(), until(&mut stop, Stop::Finish)).await {
            First::A(Ok((stream, _))) => stream,
            First::A(Err(_)) => {
                sleep(AFTER_REFUSAL).await;
                continue;
            }
            First::B(()) => break,
        };
        let (state, alive, mut stop) = (state.clone(), alive.clone(), stop.clone());
        tokio::spawn(async move {
            // Small chunks are sent as they are written.
            let _ = stream.set_nodelay(true);
            let service = service_fn(move |request| reply(state.clone(), request));
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = pin!(connection);
            // What goes wrong on a connection is its client's affair.
            if let First::B(()) = first(connection.as_mut(), until(&mut stop, Stop::Finish)).await {
                connection.as_mut().graceful_shutdown();
                let _ = connection.await;
            }
            drop(alive);
        });
    }
    drop((listener, alive));
    let (running, waiting) = state.engine.load();
    if running + waiting > 0 {
        note!(
            "serve: ending; {} first (again to give up)",
            match running + waiting {
                1 => "the last request is finished".to_owned(),
                more => format!("{more} requests or less are finished"),
            }
        );
    }
    let cut = first(ended.recv(), first(sleep(GRACE), until(&mut stop, Stop::Cut))).await;
    Ok(matches!(cut, First::B(_)))
}

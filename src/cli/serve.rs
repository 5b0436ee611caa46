//! `serve`: an HTTP server over a base and adapters. It does not depend on any stage. Read `serve/mod.rs` for the server.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use tokio::sync::watch;

use crate::error::counted;
use crate::invalid;
use crate::run::{Model, Wanted, check_adapter_path, check_base_path, members};
use crate::serve::engine::Limits;
use crate::serve::{Options, Server, Stop};
use crate::{note, warning};

/// Bytes of a request's body.
const MAX_BODY: usize = 4 << 20;

#[derive(Args)]
pub(super) struct Serve {
    /// Model directory or .gguf file.
    #[arg(long)]
    base: PathBuf,
    /// PEFT adapter directory, of a policy or a reward model; its name for clients is NAME, else the directory's. Several times.
    #[arg(long, value_name = "[NAME=]PATH")]
    adapter: Vec<String>,
    /// The base's name for clients; else its path as given.
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Address to listen at; any but this machine's own loopback needs an API key.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen at; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// The environment variable with the key that clients have to send.
    #[arg(long, value_name = "VARIABLE")]
    api_key_env: Option<String>,
    /// Sequences that are generated together.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    max_batch: u16,
    /// Sequences that wait; beyond them, requests are refused with status 503.
    #[arg(long, default_value_t = 1024)]
    max_queue: usize,
    /// Which log-probabilities clients get.
    #[arg(long, value_enum, default_value = "raw_logprobs")]
    logprobs_mode: LogprobsMode,
    #[command(flatten)]
    on: super::OnDevice,
    #[command(flatten)]
    cache: super::KvCache,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogprobsMode {
    /// Those of the model, before the temperature.
    #[value(name = "raw_logprobs")]
    Raw,
    /// Those after the temperature, over the whole vocabulary, as PPO trains them.
    #[value(name = "processed_logprobs")]
    Processed,
}

/// The name and the path of `[NAME=]PATH`.
fn named(given: &str) -> Result<(String, PathBuf)> {
    // A path may hold `=`.
    if let Some((name, path)) = given.split_once('=').filter(|_| !Path::new(given).exists()) {
        return Ok((name.to_owned(), path.into()));
    }
    let name = Path::new(given).file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or_else(|| invalid!("--adapter {given}: this path has no name; give one: --adapter NAME={given}"))?;
    Ok((name.to_owned(), given.into()))
}

/// The addresses of a host, and whether all of them are this machine's own.
fn addresses(host: &str, port: u16) -> Result<(Vec<SocketAddr>, bool)> {
    let found = (host, port).to_socket_addrs().map_err(|error| invalid!("--host {host}: {error}"))?;
    let found: Vec<SocketAddr> = found.collect();
    let is_local = found.iter().all(|address| address.ip().is_loopback());
    Ok((found, is_local))
}

fn key(variable: &str) -> Result<String> {
    let key = std::env::var(variable).unwrap_or_default();
    match key.trim() {
        "" => Err(invalid!("--api-key-env {variable}: that variable is not set; `export {variable}=…` first")),
        key => Ok(key.to_owned()),
    }
}

/// Sends a stop per signal: the first finishes requests, the second gives them up.
async fn listen(stop: watch::Sender<Stop>) {
    #[cfg(unix)]
    {
        use std::task::Poll;
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            warning!("serve: warning: signals cannot be handled; one ends the server at once");
            return std::future::pending().await;
        };
        crate::train::stop::heard(false);
        for how in [Stop::Finish, Stop::Cut] {
            std::future::poll_fn(|context| {
                match interrupt.poll_recv(context).is_ready() || terminate.poll_recv(context).is_ready() {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                }
            })
            .await;
            let _ = stop.send(how);
        }
    }
    #[cfg(not(unix))]
    for how in [Stop::Finish, Stop::Cut] {
        let _ = tokio::signal::ctrl_c().await;
        let _ = stop.send(how);
    }
    std::future::pending().await
}

pub(super) fn serve(args: &Serve) -> Result<()> {
    let (addresses, is_local) = addresses(&args.host, args.port)?;
    let key = args.api_key_env.as_deref().map(key).transpose()?;
    if key.is_none() && !is_local {
        return Err(invalid!(
            "--host {} lets other machines in, which needs a key: export one in a variable and name it with --api-key-env",
            args.host
        ));
    }
    check_base_path(&args.base)?;
    let adapters = args.adapter.iter().map(|given| named(given)).collect::<Result<Vec<_>>>()?;
    let name = args.served_model_name.clone().unwrap_or_else(|| args.base.display().to_string());
    for (i, (known, path)) in adapters.iter().enumerate() {
        if let [first, .., last] = &members(path)?[..] {
            return Err(invalid!(
                "--adapter {}: this is the folder of an ensemble, and a request is answered by one adapter; give those that                  clients may name, from --adapter NAME={} to --adapter NAME={}",
                path.display(),
                first.display(),
                last.display()
            ));
        }
        check_adapter_path(path, Wanted::Any)?;
        if !path.exists() {
            return Err(invalid!("--adapter {}: there is no such folder", path.display()));
        }
        if *known == name || adapters[..i].iter().any(|(other, _)| other == known) {
            return Err(invalid!("--adapter {known}={}: that name is taken; give another", path.display()));
        }
    }
    let listener = TcpListener::bind(&addresses[..])
        .map_err(|error| invalid!("--host {} --port {}: {error}", args.host, args.port))?;
    let address = listener.local_addr().context("the server's address")?;
    let model = Model::open_on(&args.base, args.on.device, args.cache.kind())?;
    let device = model.base.place().map_or_else(|| "the CPU".to_owned(), |device| device.name());
    let limits = Limits { max_batch: args.max_batch.into(), max_queue: args.max_queue };
    let raw_logprobs = args.logprobs_mode == LogprobsMode::Raw;
    let server = Server::new(model, Options { name: name.clone(), key, limits, max_body: MAX_BODY, raw_logprobs })?;
    for (name, path) in &adapters {
        server.load(name, path)?;
    }
    let with = match &adapters[..] {
        [] => String::new(),
        some => {
            let names: Vec<&str> = some.iter().map(|(name, _)| name.as_str()).collect();
            format!(" with {} ({})", counted(some.len(), "adapter"), names.join(", "))
        }
    };
    note!("serve: http://{address} answers for {name}{with} on {device}; Ctrl-C ends it");
    let (stop, stopped) = watch::channel(Stop::No);
    let cut = server.run_beside(listener, stopped, listen(stop))?;
    note!("serve: ended{}", if cut { "; running requests were given up" } else { "" });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_the_names_that_are_given_or_their_folders() {
        let of = |given: &str| named(given).map(|(name, path)| (name, path.display().to_string())).unwrap();
        assert_eq!(of("actor=runs/ppo/actor"), ("actor".into(), "runs/ppo/actor".into()));
        assert_eq!(of("runs/ppo/actor/"), ("actor".into(), "runs/ppo/actor/".into()));
        assert_eq!(of("a=b=c"), ("a".into(), "b=c".into()));
        assert!(named("..").is_err());
    }

    #[test]
    fn loopback_is_known_by_its_address() {
        for (host, local) in
            [("127.0.0.1", true), ("localhost", true), ("::1", true), ("0.0.0.0", false), ("::", false)]
        {
            assert_eq!(addresses(host, 1).map(|(_, local)| local).ok(), Some(local), "{host}");
        }
        assert!(addresses("no such host", 1).is_err());
    }
}

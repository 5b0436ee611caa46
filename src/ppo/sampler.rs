//! What samples a rollout's responses outside this process, at once or in a thread, and how far its log-probabilities are from
//! the actor's. It does not depend on how a sampler is reached. Read `state.rs` for the caller, `ahead.rs` for the thread,
//! `correction.rs` for the weights of what differs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Error, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::kl::Estimator;
use super::rollout::Rollout;
use crate::diverged;
use crate::error::Interrupted;
use crate::model::adapter::Adapter;
use crate::model::batch::{Batch, Targets};
use crate::model::generate::{Response, SamplingParams};
use crate::model::roles::Policy;
use crate::train::stop;

/// Stands for a log-probability that a sampler did not report: a number, since ranks pass responses on as JSON, which has no NaN.
pub const UNREPORTED: f32 = f32::MAX;

/// How often a wait for responses looks whether the process was asked to stop.
const GLANCE: Duration = Duration::from_millis(100);

/// What a sampler is asked for: one response per prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// (B) number of each prompt's record.
    pub entries: Vec<usize>,
    /// (B) prompt ids.
    pub prompts: Vec<Vec<u32>>,
    /// (B) one seed per response.
    pub seeds: Vec<u64>,
    /// Sampling parameters of all.
    pub sampling: SamplingParams,
}

/// A sampler outside this process.
pub trait Sampler {
    /// Begins (B) one response per prompt, sampled from the policy `adapter`, with the sampler's own log-probabilities or
    /// [`UNREPORTED`]. Returns once the sampler has the adapter. `version` is another one whenever the adapter's weights are.
    /// `shown`: its progress is.
    ///
    /// # Errors
    /// If the sampler does not take the adapter, or no thread can be started.
    fn start(&self, adapter: &Adapter, version: usize, asked: Asked, shown: bool) -> Result<Started>;

    /// The largest mean difference of log-probabilities, nats per token, at which its samples are taken for the actor's.
    fn max_mismatch(&self) -> f64;

    /// What to check where its log-probabilities differ by more: "its base and …".
    fn to_check(&self) -> &'static str;
}

/// Responses that a thread is getting. Dropping it abandons them.
#[derive(Debug)]
pub struct Started {
    responses: Receiver<Result<Vec<Response>>>,
    abandoned: Arc<AtomicBool>,
}

impl Started {
    /// Starts a thread that gets the responses by `get`, which ought to end soon once its flag is set: nobody waits for it then.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn new(get: impl FnOnce(&AtomicBool) -> Result<Vec<Response>> + Send + 'static) -> Result<Self> {
        let abandoned = Arc::<AtomicBool>::default();
        let (flag, (send, responses)) = (abandoned.clone(), channel());
        // Nobody takes the responses of an abandoned thread.
        let work = move || drop(send.send(get(&flag)));
        thread::Builder::new().name("rollout".into()).spawn(work)?;
        Ok(Self { responses, abandoned })
    }

    /// Waits for the responses, and abandons them once the process is asked to stop.
    ///
    /// # Errors
    /// Those of the thread; that the process was asked to stop.
    pub fn wait(self) -> Result<Vec<Response>> {
        loop {
            match self.responses.recv_timeout(GLANCE) {
                Ok(responses) => return responses,
                Err(RecvTimeoutError::Timeout) if stop::requested() => {
                    return Err(Error::new(Interrupted("stopped while a rollout was sampled".into())));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the thread that samples a rollout panicked"),
            }
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }
}

/// How a rollout was sampled outside this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Served {
    /// Iterations of updates that the actor made after the version that was sampled from.
    pub lag: usize,
    /// Mean of `|log p of that version, computed here - log p of the sampler|` over the tokens, nats.
    pub mismatch: f64,
    /// Tokens whose log-probability the sampler did not report.
    #[serde(default)]
    pub unreported: usize,
}

impl Served {
    /// Adds another rollout to one of `tokens` tokens.
    pub fn add(&mut self, tokens: usize, more: Self, more_tokens: usize) {
        let (a, b) = (tokens as f64, more_tokens as f64);
        self.mismatch = (self.mismatch * a + more.mismatch * b) / (a + b).max(1.0);
        self.lag = self.lag.max(more.lag);
        self.unreported += more.unreported;
    }
}

/// KL(sampler || trainer) over a rollout's tokens by the k3 estimate, nats per token.
pub fn k3(rollout: &Rollout) -> f64 {
    mean(rollout, &|i| &rollout.responses[i].logprobs, |trainer, sampler| Estimator::K3.of(sampler, trainer))
}

/// The mean over a rollout's tokens of a function of the log-probability `here` (R,) of response i and of the sampler's.
fn mean<'r>(rollout: &'r Rollout, here: &dyn Fn(usize) -> &'r [f32], of: impl Fn(f64, f64) -> f64) -> f64 {
    let mut sum = 0.0;
    for i in 0..rollout.responses.len() {
        let both = here(i).iter().zip(rollout.sampler_logprobs(i));
        sum += both.map(|(&here, &sampler)| of(here.into(), sampler.into())).sum::<f64>();
    }
    sum / rollout.response_tokens().max(1) as f64
}

/// Has tokens of which the sampler reported no log-probability neither corrected nor checked: they get the one computed here under
/// the weights that the sampler was given. `version`: as in [`check`]. Returns how many they are.
///
/// # Errors
/// If the sampler reported none at all.
pub fn fill(rollout: &mut Rollout, version: Option<&[Vec<f32>]>) -> Result<usize> {
    let mut unreported = 0;
    for (i, reported) in rollout.sampler_logprobs.iter_mut().enumerate() {
        let here = version.map_or(&rollout.responses[i].logprobs, |version| &version[i]);
        for (reported, &here) in reported.iter_mut().zip(here).filter(|(reported, _)| **reported == UNREPORTED) {
            *reported = here;
            unreported += 1;
        }
    }
    ensure!(
        unreported == 0 || unreported < rollout.response_tokens(),
        "the rollout server reported no token's log-probability, by which its samples are checked"
    );
    Ok(unreported)
}

/// Checks that a rollout was sampled from the weights that the sampler was given. `version`: (B, R) the sampled tokens'
/// log-probabilities under them, where they are not the actor's, as computed here. Returns the mean of `|log p here - log p of the
/// sampler|`, nats per token.
///
/// # Errors
/// If that is more than `most`, or the sampler's log-probabilities are NaN, with what `to_check`; a divergence if those computed
/// here are.
pub fn check(rollout: &Rollout, version: Option<&[Vec<f32>]>, (most, to_check): (f64, &str)) -> Result<f64> {
    let actors = rollout.responses.iter().map(|response| &response.logprobs);
    let mut computed = actors.chain(version.into_iter().flatten()).flatten().copied();
    if let Some(bad) = computed.find(|logprob| !logprob.is_finite()) {
        return Err(diverged!("a sampled token has log-probability {bad} under the actor"));
    }
    let here = |i: usize| version.map_or(&rollout.responses[i].logprobs, |version| &version[i]).as_slice();
    let found = mean(rollout, &here, |here, sampler| (here - sampler).abs());
    // A NaN is no agreement either.
    if found.is_nan() || found > most {
        bail!(
            "the rollout server's log-probabilities differ from the actor's by {found:.3} nats per token on average, more than \
             max_mismatch = {most}: it sampled from another base or adapter, or by other rules; check {to_check}, or raise \
             max_mismatch of the rollout's section"
        );
    }
    Ok(found)
}

/// Why nothing was sampled: a divergence where the actor's own logits are NaN or infinite, for which each server has other words.
pub fn cause(error: Error, actor: Policy<'_>, prompts: &[Vec<u32>]) -> Error {
    let is_finite = || -> Result<bool> {
        let Some((prompt, &last)) = prompts.first().and_then(|prompt| Some((prompt, prompt.last()?))) else {
            return Ok(true);
        };
        let batch = Batch::new(&[[&prompt[..], &[last]].concat()])?;
        let stats = actor.logprobs(&batch, &Targets::responses(&batch, &[1])?, 1.0)?;
        Ok(stats.logprobs.iter().all(|logprob| logprob.is_finite()))
    };
    match is_finite() {
        Ok(false) => diverged!("the actor's log-probabilities are NaN or infinite, and so {error:#}"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::error::Diverged;
    use crate::model::adapter::LoraConfig;
    use crate::model::generate::FinishReason;
    use crate::model_files::ModelFiles;
    use crate::quickstart::base::BASE;

    #[test]
    fn a_failure_is_the_actors_where_its_logits_are_nan() {
        let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
        let files = ModelFiles::from_embedded(BASE.config, parts.0, parts.1, parts.2, parts.3).unwrap();
        let base = files.base().unwrap();
        let mut weights = Adapter::init(LoraConfig::default(), base.shapes(), 1).unwrap().to_trainable();
        let prompts = [vec![5, 6]];
        let of = |adapter: &Adapter| cause(anyhow!("HTTP status 500"), Policy::new(&base, Some(adapter)), &prompts);
        let found = of(weights.view());
        assert!(!found.is::<Diverged>() && found.to_string() == "HTTP status 500");
        let nan = weights.parameters().unwrap().iter().map(|t| (t * f64::NAN).unwrap()).collect();
        weights.replace(nan).unwrap();
        let found = of(weights.view());
        assert!(found.is::<Diverged>() && found.to_string().ends_with("and so HTTP status 500"), "{found}");
    }

    fn rollout(trainer: [f32; 2], sampler: [f32; 2]) -> Rollout {
        let response = Response { tokens: vec![1, 2], logprobs: trainer.into(), finish: FinishReason::Length };
        Rollout { responses: vec![response], sampler_logprobs: vec![sampler.into()], ..Rollout::default() }
    }

    #[test]
    fn differences_are_means_over_tokens_and_beyond_the_bound_an_error() {
        let found = rollout([-1.0, -2.0], [-1.5, -2.0]);
        // k3 = r - 1 - log r with log r = trainer - sampler = 0.5 at the first token.
        assert!((k3(&found) - (0.5_f64.exp() - 1.5) / 2.0).abs() < 1e-12);
        let check = |version: Option<&[Vec<f32>]>, most: f64| check(&found, version, (most, "its base"));
        assert_eq!(check(None, 0.25).unwrap(), 0.25);
        let message = check(None, 0.2).unwrap_err().to_string();
        for say in ["0.250 nats", "max_mismatch = 0.2", "check its base, or"] {
            assert!(message.contains(say), "{message}");
        }
        // The weights that it was sampled from, where the actor has moved on.
        assert_eq!(check(Some(&[vec![-1.5, -2.5]]), 0.25).unwrap(), 0.25);
        assert!(check(Some(&[vec![-1.5, -3.0]]), 0.25).is_err());
    }

    #[test]
    fn a_nan_of_the_actors_is_the_guards_to_judge_and_one_of_the_samplers_ends_the_run() {
        let of = |trainer, sampler, version| check(&rollout(trainer, sampler), version, (9.0, "")).unwrap_err();
        assert!(!of([0.0, 0.0], [f32::NAN, 0.0], None).is::<Diverged>());
        assert!(of([f32::NAN, 0.0], [0.0, 0.0], None).is::<Diverged>());
        assert!(of([0.0, 0.0], [0.0, 0.0], Some(&[vec![f32::NAN, 0.0]])).is::<Diverged>());
    }

    #[test]
    fn a_rollout_of_two_parts_has_their_mean_by_tokens_and_the_larger_lag() {
        let mut served = Served { lag: 0, mismatch: 0.1, unreported: 2 };
        served.add(30, Served { lag: 1, mismatch: 0.2, unreported: 1 }, 10);
        assert!((served.mismatch - 0.125).abs() < 1e-12 && (served.lag, served.unreported) == (1, 3));
    }

    #[test]
    fn a_token_without_a_reported_log_probability_is_neither_checked_nor_weighted() {
        let mut found = rollout([-1.0, -2.0], [-1.5, UNREPORTED]);
        assert_eq!(fill(&mut found, None).unwrap(), 1);
        assert_eq!(found.sampler_logprobs, [[-1.5, -2.0]]);
        assert_eq!(check(&found, None, (0.25, "")).unwrap(), 0.25);
        // Of a version before the actor's it is that version's, and the weight is what the actor moved since.
        let mut found = rollout([-1.0, -2.0], [-1.5, UNREPORTED]);
        assert_eq!(fill(&mut found, Some(&[vec![-1.5, -2.5]])).unwrap(), 1);
        assert_eq!(found.sampler_logprobs, [[-1.5, -2.5]]);
        assert_eq!(fill(&mut found, None).unwrap(), 0);
        assert!(fill(&mut rollout([-1.0, -2.0], [UNREPORTED; 2]), None).is_err());
    }

    #[test]
    fn a_thread_returns_what_it_gets_and_one_that_is_abandoned_knows_it() {
        let response = || Response { tokens: vec![7], logprobs: vec![-1.0], finish: FinishReason::Stop };
        assert_eq!(Started::new(move |_| Ok(vec![response()])).unwrap().wait().unwrap(), [response()]);
        let failed = Started::new(|_| Err(anyhow!("dead"))).unwrap().wait().unwrap_err();
        assert_eq!(failed.to_string(), "dead");
        assert!(Started::new(|_| panic!("a bug")).unwrap().wait().unwrap_err().to_string().contains("panicked"));
        let (send, receive) = channel();
        let started = Started::new(move |abandoned| {
            while !abandoned.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            send.send("ended").unwrap();
            Ok(vec![])
        });
        drop(started.unwrap());
        assert_eq!(receive.recv_timeout(Duration::from_secs(60)), Ok("ended"));
    }
}

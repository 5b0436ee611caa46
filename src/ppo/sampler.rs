//! What samples a rollout's responses outside this process, and how far its log-probabilities are from the actor's. It does not
//! depend on how a sampler is reached. Read `state.rs` for the caller, `correction.rs` for the weights of what differs.

use anyhow::{Error, Result, bail};

use super::kl::Estimator;
use super::rollout::Rollout;
use crate::diverged;
use crate::model::adapter::Adapter;
use crate::model::batch::{Batch, Targets};
use crate::model::generate::{Response, SamplingParams};
use crate::model::roles::Policy;

/// A sampler outside this process.
pub trait Sampler {
    /// (B) one response per prompt, sampled from the policy `adapter`, with the sampler's own log-probabilities. `version` is
    /// another one whenever the adapter's weights are. `seeds` (B): one per response.
    ///
    /// # Errors
    /// If the responses cannot be obtained.
    fn sample(
        &self,
        adapter: &Adapter,
        version: usize,
        prompts: &[Vec<u32>],
        seeds: &[u64],
        sampling: &SamplingParams,
    ) -> Result<Vec<Response>>;

    /// The largest mean difference of log-probabilities, nats per token, at which its samples are taken for the actor's.
    fn max_mismatch(&self) -> f64;
}

/// Mean of `|log p of the trainer - log p of the sampler|` over a rollout's tokens, nats.
pub fn mean_difference(rollout: &Rollout) -> f64 {
    mean(rollout, |trainer, sampler| (trainer - sampler).abs())
}

/// KL(sampler || trainer) over a rollout's tokens by the k3 estimate, nats per token.
pub fn k3(rollout: &Rollout) -> f64 {
    mean(rollout, |trainer, sampler| Estimator::K3.of(sampler, trainer))
}

fn mean(rollout: &Rollout, of: impl Fn(f64, f64) -> f64) -> f64 {
    let (mut sum, mut tokens) = (0.0, 0);
    for (i, response) in rollout.responses.iter().enumerate() {
        let both = response.logprobs.iter().zip(rollout.sampler_logprobs(i));
        sum += both.map(|(&trainer, &sampler)| of(trainer.into(), sampler.into())).sum::<f64>();
        tokens += response.logprobs.len();
    }
    sum / tokens.max(1) as f64
}

/// Checks that a rollout was sampled from the actor.
///
/// # Errors
/// If the log-probabilities differ by more than `most` on average, or the sampler's are NaN; a divergence if the actor's are.
pub fn check(rollout: &Rollout, most: f64) -> Result<()> {
    let trainers = rollout.responses.iter().flat_map(|response| &response.logprobs);
    if let Some(bad) = trainers.copied().find(|logprob| !logprob.is_finite()) {
        return Err(diverged!("a sampled token has log-probability {bad} under the actor"));
    }
    let found = mean_difference(rollout);
    // A NaN is no agreement either.
    if found.is_nan() || found > most {
        bail!(
            "the rollout server's log-probabilities differ from the actor's by {found:.3} nats per token on average, more than \
             max_mismatch = {most}: it sampled from another base or adapter, or returns log-probabilities of another mode; check its \
             base, its log and logprobs_mode, or raise max_mismatch of the rollout's section"
        );
    }
    Ok(())
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
        assert_eq!(mean_difference(&found), 0.25);
        // k3 = r - 1 - log r with log r = trainer - sampler = 0.5 at the first token.
        assert!((k3(&found) - (0.5_f64.exp() - 1.5) / 2.0).abs() < 1e-12);
        assert!(check(&found, 0.25).is_ok());
        let message = check(&found, 0.2).unwrap_err().to_string();
        assert!(message.contains("0.250 nats") && message.contains("max_mismatch = 0.2"), "{message}");
        let of = |trainer, sampler| check(&rollout(trainer, sampler), 9.0).unwrap_err();
        assert!(!of([0.0, 0.0], [f32::NAN, 0.0]).is::<Diverged>());
        assert!(of([f32::NAN, 0.0], [0.0, 0.0]).is::<Diverged>(), "the guard's to judge");
    }
}

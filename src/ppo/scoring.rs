//! What the roles compute of whole sequences, without gradients: log-probabilities under actor and reference, their exact KL, the
//! critic's values, reward models' scores. Roles over one base are readers of it, which a device takes through its blocks together
//! (`model/readers.rs`). It does not depend on rewards or on the training loop. Read `rollout.rs` for who asks.

use anyhow::Result;

use crate::device::Array;
use crate::model::base::Base;
use crate::model::batch::{Batch, Targets};
use crate::model::readers::{Reader, Sharing};
use crate::model::roles::{Policy, ValueModel};

/// The roles that score a batch, and what is asked of them.
#[derive(Clone, Copy)]
pub struct Scoring<'a> {
    /// The actor, if its log-probabilities or the exact KL are wanted.
    pub actor: Option<Policy<'a>>,
    /// Whether the actor's log-probabilities are wanted.
    pub recomputes: bool,
    /// The reference, if there is one.
    pub reference: Option<Policy<'a>>,
    /// Whether the exact KL from the actor to the reference is wanted.
    pub exact_kl: bool,
    /// The critic, if there is one.
    pub critic: Option<ValueModel<'a>>,
    /// Whether the critic's value of the state after the last token is wanted.
    pub last_values: bool,
    /// Reward models.
    pub models: &'a [ValueModel<'a>],
    /// What roles over one base have in common.
    pub sharing: Sharing,
    /// Divisor of the logits.
    pub temperature: f64,
}

/// What the roles found; R is the number of targets, S that of sequences.
#[derive(Debug, Default)]
pub struct Scored {
    /// (R) log-probabilities under the actor, if they were wanted.
    pub logprobs: Option<Vec<f32>>,
    /// (R) log-probabilities under the reference.
    pub ref_logprobs: Option<Vec<f32>>,
    /// (R) exact KL from the actor to the reference, if it was wanted, nats.
    pub exact_kl: Option<Vec<f32>>,
    /// (R) values of the critic, and (S) values after the last token behind them if they were wanted.
    pub values: Option<Vec<f32>>,
    /// (S) scores of each reward model.
    pub scores: Vec<Vec<f32>>,
}

#[derive(Clone, Copy)]
enum Role<'a> {
    Actor(Policy<'a>),
    Reference(Policy<'a>),
    Critic(ValueModel<'a>),
    Model(ValueModel<'a>),
}

impl<'a> Role<'a> {
    fn base(self) -> &'a Base {
        match self {
            Self::Actor(policy) | Self::Reference(policy) => policy.base(),
            Self::Critic(model) | Self::Model(model) => model.base(),
        }
    }
}

/// Scores a batch. `keep` gets the reference's hidden states (R, D).
///
/// # Errors
/// Those of the forward passes; the error of `keep`.
pub fn score(
    batch: &Batch,
    targets: &Targets,
    asked: Scoring<'_>,
    mut keep: impl FnMut(Array) -> Result<()>,
) -> Result<Scored> {
    let last = batch.last_rows();
    let states = if asked.last_values { [&targets.rows[..], &last].concat() } else { targets.rows.clone() };
    let compares = asked.exact_kl && asked.reference.is_some();
    let actor = asked.actor.filter(|_| asked.recomputes || compares);
    let policies = actor.map(Role::Actor).into_iter().chain(asked.reference.map(Role::Reference));
    let models = asked.critic.map(Role::Critic).into_iter().chain(asked.models.iter().copied().map(Role::Model));
    let roles: Vec<Role<'_>> = policies.chain(models).collect();
    let (mut scored, mut of_actor) = (Scored::default(), None);
    for group in roles.chunk_by(|a, b| std::ptr::eq(a.base(), b.base())) {
        let reader = |&role| match role {
            Role::Actor(policy) | Role::Reference(policy) => policy.reader(&targets.rows),
            Role::Critic(model) => model.reader(&states),
            Role::Model(model) => model.reader(&last),
        };
        let readers: Vec<Reader<'_>> = group.iter().map(reader).collect();
        group[0].base().read(batch, &readers, asked.sharing, |i, rows| {
            match group[i] {
                Role::Actor(actor) => {
                    if asked.recomputes {
                        scored.logprobs = Some(actor.logprobs_of(&rows, targets, asked.temperature)?.logprobs);
                    }
                    of_actor = compares.then_some((actor, rows));
                }
                Role::Reference(reference) => {
                    scored.ref_logprobs = Some(reference.logprobs_of(&rows, targets, asked.temperature)?.logprobs);
                    if let Some((actor, theirs)) = of_actor.take() {
                        scored.exact_kl = Some(actor.kl(&theirs, (reference, &rows), asked.temperature)?);
                    }
                    keep(rows)?;
                }
                Role::Critic(critic) => scored.values = Some(critic.values_of(&rows)?),
                Role::Model(model) => scored.scores.push(model.values_of(&rows)?),
            }
            Ok(())
        })?;
    }
    Ok(scored)
}

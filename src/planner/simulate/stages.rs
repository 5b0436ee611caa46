//! Allocations of the stages, phase by phase: what stays throughout, and what each phase takes on top. Three optimizer steps
//! are simulated, since each starts with more than the one before: stepped weights, the guard's copy. Read ../plan.rs for
//! the plan that is made of it.

use std::ops::Range;

use crate::host::meter::Phase;
use crate::model::batch::chunks_by_tokens;
use crate::model::block::Recompute;
use crate::model::inputs::pinned_bytes;
use crate::planner::dry::{OnDevice, is_device};
use crate::planner::passes::largest_share;
use crate::planner::sim_allocator::{Allocation, Bytes, MemoryCategory, SimAllocator};
use crate::planner::simulate::network::{Gradients, View};
use crate::planner::simulate::ops::{Simulator, Tensor};
use crate::planner::simulate::shape::{Branches, Network};
use crate::planner::simulate::work::{Pass, Rollouts, Supervised, Work};
use crate::reward::source::SCORING_TOKENS;

/// The inputs of a simulation.
#[derive(Clone, Debug)]
pub struct StageShape {
    /// The base of the trained adapter; of actor and reference in PPO.
    pub policy: Network,
    /// The base of critic and reward model, or the teacher's, if it is another one.
    pub scorer: Option<Network>,
    /// LoRA layers of the trained adapter; the actor's in PPO.
    pub branches: Branches,
    /// LoRA layers of the reward model and the critic.
    pub reward: Branches,
    /// Which activations blocks recompute.
    pub checkpoint: Recompute,
    /// The passes.
    pub work: Work,
    /// Bytes of tokenizer and examples.
    pub data: usize,
    /// Bytes of the process beside its heap.
    pub process: usize,
    /// Threads of the kernels.
    pub threads: usize,
    /// The devices of the bases, if one lies on a device.
    pub on_device: Option<OnDevice>,
}

/// From the third step on nothing more is added: weights of the start, which the guard holds too, those that are stepped from
/// and those that are made.
const STEPS: usize = 3;

/// Bytes of a batch per token: its id, its position; and of a target: its row and its id.
const OF_TOKEN: usize = 8;
const OF_TARGET: usize = 12;
/// Bytes of a response token beside its hidden state: ids, log-probabilities of both, value, KL, advantage, return, and
/// the room that growing lists leave.
const OF_RESPONSE_TOKEN: usize = 40;

/// Numbers of a response token that ranks exchange beside the reference's hidden state: its log-probabilities, KL and values.
const OF_OUTPUTS: usize = 5;
/// Bytes of a response token in JSON: its id, its log-probability, and the room of a text that grows.
const OF_JSON_TOKEN: usize = 50;

/// A number of a rollout in a checkpoint: a JSON value (32), one of its bits (32) as a text (32), a line of the file (31, in a
/// text that grew by doubling).
const OF_FACT: usize = 160;

/// An array of a checkpoint beside its numbers: its name in the list (90 letters) and in the header's (90), the header's
/// entry as JSON values (300), its line (170, in a text that grew by doubling), for two of three a tensor (320).
const OF_ARRAY: usize = 950;

/// A learner: its weights, its means, what the guard keeps.
struct Learner {
    weights: Vec<Tensor>,
    sizes: Vec<usize>,
    means: Option<Allocation>,
    guarded: Option<(Allocation, Vec<Tensor>)>,
    /// The weights before the first step, which the guard holds.
    start: Vec<Tensor>,
}

impl Learner {
    fn new(walk: &Simulator, weights: Vec<Tensor>, branches: &Branches, net: &Network) -> Self {
        let sizes = branches.tensors(net);
        let means = walk.ledger.take(MemoryCategory::Optimizer, 2 * sizes.iter().sum::<usize>());
        Self { weights, sizes, means: Some(means), guarded: None, start: vec![] }
    }

    /// `Learner::step`: new tensors beside the old until all are made.
    fn step(&mut self, walk: &Simulator, gradients: Gradients) {
        let mut new = vec![];
        for bytes in &self.sizes {
            new.push(walk.tensor(MemoryCategory::Adapters, bytes / 4));
            drop(walk.ledger.take(MemoryCategory::Gradients, *bytes));
        }
        let old = std::mem::replace(&mut self.weights, new);
        if self.guarded.is_none() {
            self.start = old;
        }
        drop(gradients);
    }

    /// `Learner::prepared`: new weights and new means beside the old ones.
    fn prepared(&self, walk: &Simulator) -> (Vec<Tensor>, Allocation) {
        let means = walk.ledger.take(MemoryCategory::Optimizer, 2 * self.bytes());
        (self.sizes.iter().map(|bytes| walk.tensor(MemoryCategory::Adapters, bytes / 4)).collect(), means)
    }

    /// `Learner::commit`: they take the place of the old ones.
    fn commit(&mut self, (new, means): (Vec<Tensor>, Allocation)) {
        let old = std::mem::replace(&mut self.weights, new);
        if self.guarded.is_none() {
            self.start = old;
        }
        self.means = Some(means);
    }

    /// The guard's copy after a good step: the means copied, the weights before it held.
    fn guard(&mut self, walk: &Simulator) {
        let means = walk.ledger.take(MemoryCategory::Optimizer, 2 * self.sizes.iter().sum::<usize>());
        self.guarded = Some((means, std::mem::take(&mut self.start)));
    }

    /// The stage is over: the weights stay, the optimizer goes, what the guard has stays with the session.
    fn finish(&mut self) {
        self.means = None;
    }

    fn bytes(&self) -> usize {
        self.sizes.iter().sum()
    }
}

/// `World::sum_gradients` on rank 0: beside its own the message of one other rank and what it says.
fn exchange_gradients(ledger: &SimAllocator, ranks: usize, learner: &Learner) {
    if ranks > 1 {
        drop(ledger.take(MemoryCategory::Gradients, 2 * learner.bytes()));
    }
}

fn adapter(walk: &Simulator, branches: &Branches, net: &Network) -> Vec<Tensor> {
    branches.tensors(net).iter().map(|bytes| walk.tensor(MemoryCategory::Adapters, bytes / 4)).collect()
}

/// `Gradients::add`: pair by pair, so that a sum takes no more than what was there.
fn add(sum: Gradients, more: Gradients) -> Gradients {
    drop(sum);
    more
}

/// Scoring passes at the start and at the end of a rollout that a plan goes through.
const SOME: usize = 32;

impl StageShape {
    /// Bytes of pinned memory of the host, of the bases that lie on devices.
    pub fn pinned(&self) -> usize {
        let Some(on) = &self.on_device else { return 0 };
        let nets = [(on.policy, Some(&self.policy)), (on.scorer, self.scorer.as_ref())];
        let there = nets.into_iter().filter(|(choice, _)| is_device(*choice)).filter_map(|(_, net)| net);
        there.map(Network::pinned).sum::<usize>() + self.host_inputs(on)
    }

    /// Bytes of pinned memory for the inputs of blocks: each base that a trained adapter lies over keeps those of its largest pass.
    pub fn host_inputs(&self, on: &OnDevice) -> usize {
        if self.checkpoint != Recompute::Offload {
            return 0;
        }
        let (policy, scorer) = match &self.work {
            Work::Supervised(work) => (work.step.iter().map(Pass::tokens).max(), None),
            Work::Rollouts(work) => {
                let micro = work.micro.iter().map(|micro| sizes(micro).0.iter().sum()).max();
                let text = work.text.map(|(blocks, tokens, a_pass)| blocks.min(a_pass) * tokens);
                (micro.max(text), micro.filter(|_| work.critic && !work.critic_on_policy))
            }
        };
        let nets = [(on.policy, Some(&self.policy), policy), (on.scorer, self.scorer.as_ref(), scorer)];
        let of = |net: &Network, tokens: usize| {
            let config = &net.config;
            config.num_hidden_layers * pinned_bytes(tokens * config.hidden_size * size_of::<f32>())
        };
        let there = nets.into_iter().filter(|(choice, ..)| is_device(*choice));
        there.filter_map(|(_, net, tokens)| Some(of(net?, tokens?))).sum()
    }

    /// The peaks of every phase.
    pub fn walk(&self) -> [(Phase, Bytes); Phase::ALL.len()] {
        let nets = [Some(&self.policy), self.scorer.as_ref()];
        let mut standing = Bytes::default();
        let all = |of: fn(&Network) -> usize| nets.iter().flatten().map(|net| of(net)).sum::<usize>();
        standing.set(MemoryCategory::Base, all(|net| net.owned + net.vectors()));
        standing.set(MemoryCategory::Mapped, all(|net| net.mapped));
        standing.set(MemoryCategory::Data, self.data);
        standing.set(MemoryCategory::Process, self.process);
        standing.set(MemoryCategory::Pinned, self.pinned());
        let whole = self.on_device.as_ref().is_some_and(OnDevice::is_whole);
        let ledger = SimAllocator::new(standing, whole);
        for net in nets.into_iter().flatten() {
            let walk = Simulator::new(ledger.clone(), self.threads, net.compute);
            if net.quantised_cols > 0 {
                // Rows are packed 64 at a time by each thread, while the last matrix is not there yet: an upper bound.
                drop(ledger.take(MemoryCategory::Base, self.threads * 64 * net.quantised_cols * 6));
            }
            View { walk: &walk, net, branches: None }.look();
        }
        let longest = self.work.longest();
        let further = nets.into_iter().flatten().map(|net| net.rotations(longest) - net.rotations(1)).sum();
        let _rotations = ledger.take(MemoryCategory::Base, further);
        let walk = Simulator::new(ledger.clone(), self.threads, self.policy.compute);
        match &self.work {
            Work::Supervised(work) => self.supervised(&walk, work),
            Work::Rollouts(work) => self.rollouts(&walk, work),
        }
        ledger.peaks()
    }

    /// A checkpoint: `facts` numbers go into JSON beside the learners' arrays, `rows` numbers are an array of their own.
    fn save(&self, walk: &Simulator, learners: &[&Learner], facts: usize, rows: usize) {
        walk.ledger.enter(Phase::Save);
        let _facts = walk.ledger.take(MemoryCategory::Data, facts * OF_FACT + rows * size_of::<f32>());
        // The means are copied; all is written array by array, the guard's too.
        let weights: usize = learners.iter().map(|learner| learner.bytes()).sum();
        let _means = walk.ledger.take(MemoryCategory::Optimizer, 2 * weights);
        let guarded = learners.iter().any(|learner| learner.guarded.is_some());
        let arrays: usize = learners.iter().map(|learner| learner.sizes.len()).sum();
        let _names = walk.ledger.take(MemoryCategory::Optimizer, 3 * arrays * if guarded { 2 } else { 1 } * OF_ARRAY);
        let largest = learners.iter().flat_map(|learner| &learner.sizes).max().copied().unwrap_or(0);
        let _array = walk.ledger.take(MemoryCategory::Optimizer, largest.max(rows * size_of::<f32>()));
    }

    fn supervised(&self, walk: &Simulator, work: &Supervised) {
        let net = &self.policy;
        let branches = if work.scorer { &self.reward } else { &self.branches };
        let start = adapter(walk, branches, net);
        let view = View { walk, net, branches: Some(branches) };
        let ledger = &walk.ledger;
        let teacher_net = self.scorer.as_ref().unwrap_or(net);
        let teacher = View { walk, net: teacher_net, branches: None };
        let _taught = work.taught.then(|| adapter(walk, &self.reward, teacher_net));
        if work.taught {
            // The file that it was read from.
            drop(ledger.take(MemoryCategory::Adapters, self.reward.bytes(teacher_net)));
        }
        let sample = |pass: &Pass, response: usize| {
            let prompts: Vec<usize> =
                pass.lengths.iter().map(|length| length.saturating_sub(response).max(1)).collect();
            view.generate(&prompts, 1, response);
        };
        let evaluate = || {
            if let Some(pass) = &work.evaluation {
                ledger.enter(Phase::Evaluation);
                let _batch = ledger.take(MemoryCategory::Data, pass.tokens() * OF_TOKEN + pass.targets * OF_TARGET);
                match (work.scorer, work.response) {
                    (true, _) => view.values(&pass.lengths, pass.targets),
                    (false, None) => drop(view.logprobs(&pass.lengths, pass.targets)),
                    (false, Some(response)) => {
                        sample(pass, response);
                        let theirs = teacher.logprobs(&pass.lengths, pass.targets);
                        let mine = view.logprobs(&pass.lengths, pass.targets);
                        drop((theirs, mine, view.divergence(pass.targets)));
                    }
                }
            }
        };
        ledger.enter(Phase::Step);
        let _finished: Vec<_> = (1..work.members).map(|_| adapter(walk, branches, net)).collect();
        let mut learner = Learner::new(walk, start.clone(), branches, net);
        if work.evaluates_before {
            evaluate();
        }
        for number in 0..work.steps.clamp(1, STEPS) {
            let batches = work.step.iter().map(|p| p.tokens() * OF_TOKEN + p.targets * OF_TARGET).sum();
            if let Some(response) = work.response {
                ledger.enter(Phase::Rollout);
                work.step.iter().for_each(|pass| sample(pass, response));
            }
            ledger.enter(Phase::Update);
            let _batches = ledger.take(MemoryCategory::Data, batches);
            let mut grads: Gradients = vec![];
            for pass in &work.step {
                let theirs = work.response.map(|_| teacher.logprobs(&pass.lengths, pass.targets));
                for pass in &work.reference {
                    drop(view.logprobs(&pass.lengths, pass.targets));
                }
                let g = match work.scorer {
                    true => view.scorer_gradients(&pass.lengths, pass.targets, self.checkpoint),
                    false => {
                        let against = work.response.map(|_| true);
                        view.policy_gradients(&pass.lengths, pass.targets, against, self.checkpoint)
                    }
                };
                drop(theirs);
                grads = add(grads, g);
            }
            exchange_gradients(ledger, work.ranks, &learner);
            ledger.enter(Phase::Step);
            learner.step(walk, grads);
            if number == 0 {
                learner.guard(walk);
            }
        }
        self.save(walk, &[&learner], 0, 0);
        evaluate();
        drop(start);
    }

    fn rollouts(&self, walk: &Simulator, work: &Rollouts) {
        let (net, ledger) = (&self.policy, &walk.ledger);
        let scorer_net = self.scorer.as_ref().unwrap_or(net);
        let critic_net = if work.critic_on_policy { net } else { scorer_net };
        let sft = adapter(walk, &self.branches, net);
        let reward = work.main_reward.then(|| adapter(walk, &self.reward, scorer_net));
        if work.reward_model {
            // The file that it was read from.
            drop(ledger.take(MemoryCategory::Adapters, self.reward.bytes(scorer_net)));
        }
        let more: Vec<_> = (0..work.more_rewards).map(|_| adapter(walk, &self.reward, scorer_net)).collect();
        let copies: Vec<_> = (0..work.copies).map(|_| adapter(walk, &self.branches, net)).collect();
        let actor_view = View { walk, net, branches: Some(&self.branches) };
        let critic_view = View { walk, net: critic_net, branches: Some(&self.reward) };
        let reward_view = View { walk, net: scorer_net, branches: Some(&self.reward) };
        let e = net.config.embedding_width;
        ledger.enter(Phase::Step);
        let mut actor = Learner::new(walk, sft.clone(), &self.branches, net);
        let start = || match reward.as_ref().filter(|_| work.critic_is_reward && !work.critic_on_policy) {
            Some(reward) => reward.clone(),
            None => adapter(walk, &self.reward, critic_net),
        };
        let mut critic = work.critic.then(|| Learner::new(walk, start(), &self.reward, critic_net));
        let whole = |prompts: &[usize]| -> Vec<usize> { prompts.iter().map(|p| p + work.response).collect() };
        // What is left of a pass, the rows of the reference, counts for all; of many passes only some are gone through, the
        // largest and the last among them.
        let in_chunks = |lengths: &[usize], ranks: usize, pass: &mut dyn FnMut(&[usize], bool)| {
            let chunks = chunks_by_tokens(lengths, SCORING_TOKENS);
            let tokens = |chunks: &[Vec<usize>]| chunks.iter().flatten().map(|&i| lengths[i]).sum::<usize>();
            let chunks = &chunks[largest_share(ranks, chunks.len(), |share| tokens(&chunks[share]))];
            let tokens = |at: usize| chunks[at].iter().map(|&i| lengths[i]).sum::<usize>();
            let largest = (0..chunks.len()).max_by_key(|&at| tokens(at));
            for (at, rows) in chunks.iter().enumerate() {
                let chunk: Vec<usize> = rows.iter().map(|&i| lengths[i]).collect();
                if at >= SOME && at + SOME < chunks.len() && Some(at) != largest {
                    pass(&chunk, false);
                    continue;
                }
                let _batch = ledger.take(MemoryCategory::Data, chunk.iter().sum::<usize>() * (OF_TOKEN + OF_TARGET));
                pass(&chunk, true);
            }
        };
        let score = |chunk: &[usize], is_gone_through: bool| {
            if is_gone_through {
                reward_view.values(chunk, chunk.len());
            }
        };
        let evaluate = || {
            if work.evaluation.is_empty() {
                return;
            }
            ledger.enter(Phase::Evaluation);
            actor_view.generate(&work.evaluation, 1, work.response);
            let lengths = whole(&work.evaluation);
            if work.reference {
                drop(actor_view.logprobs(&lengths, work.evaluation.len() * work.response));
            }
            if work.reward_model {
                in_chunks(&lengths, 1, &mut |chunk, is_gone_through| score(chunk, is_gone_through));
            }
        };
        evaluate();
        // Gradients of the critic's step, which a thread may still make in the next rollout or the actor's next passes.
        let mut under_way: Option<Allocation> = None;
        for number in 0..work.steps.clamp(1, STEPS) {
            ledger.enter(Phase::Rollout);
            let responses = work.prompts.len() * work.response;
            let _tokens = ledger.take(MemoryCategory::Data, responses * OF_RESPONSE_TOKEN);
            // Nothing is left of a batch of responses, so that of many only some are gone through, the largest among them.
            let batches: Vec<&[usize]> = work.own().chunks(work.at_once.max(1)).collect();
            let largest = batches.iter().max_by_key(|prompts| prompts.iter().sum::<usize>());
            let some = batches.iter().take(2 * SOME).chain(largest.filter(|_| batches.len() > 2 * SOME));
            for prompts in some.filter(|_| !work.served) {
                actor_view.generate(prompts, work.generations, work.response);
            }
            if work.ranks > 1 && work.served {
                // Rank 0's responses go to the others as one JSON text, which grew by doubling.
                drop(ledger.take(MemoryCategory::Data, responses * OF_JSON_TOKEN));
            }
            ledger.enter(Phase::Scoring);
            let was_under_way = under_way.take().is_some();
            let mut rows = vec![];
            let mut own = 0;
            in_chunks(&whole(&work.prompts), work.ranks, &mut |chunk, is_gone_through| {
                own += chunk.len() * work.response;
                let r = chunk.len() * work.response;
                if !is_gone_through {
                    if work.reference {
                        rows.push(ledger.take(MemoryCategory::Data, r * e * size_of::<f32>()));
                    }
                    return;
                }
                // For the exact KL it is read once.
                if work.recomputes && !work.exact.0 {
                    drop(actor_view.logprobs(chunk, r));
                }
                let hidden = work.reference.then(|| {
                    let (hidden, stats) = actor_view.logprobs(chunk, r);
                    drop(stats);
                    hidden
                });
                if work.critic {
                    critic_view.values(chunk, r);
                }
                if work.exact.0 {
                    let (mine, stats) = actor_view.logprobs(chunk, r);
                    drop(stats);
                    drop(actor_view.divergence(r));
                    drop(mine);
                }
                if work.reference {
                    rows.push(ledger.take(MemoryCategory::Data, r * e * size_of::<f32>()));
                }
                drop(hidden);
            });
            if work.ranks > 1 {
                // `World::share`: the messages of all ranks take the place of the own results; each is read, and goes.
                rows.clear();
                let of_token = (if work.reference { e } else { 0 } + OF_OUTPUTS) * size_of::<f32>();
                rows.push(ledger.take(MemoryCategory::Data, responses * of_token));
                drop(ledger.take(MemoryCategory::Data, own * of_token));
                rows.clear();
                rows.extend(
                    work.reference.then(|| ledger.take(MemoryCategory::Data, responses * e * size_of::<f32>())),
                );
            }
            if work.refills && work.reference {
                rows.push(ledger.take(MemoryCategory::Data, responses * e * size_of::<f32>()));
            }
            if work.reward_model {
                let lengths = whole(&work.prompts);
                let tokens = |share: Range<usize>| lengths[share].iter().sum::<usize>();
                let lengths = &lengths[largest_share(work.ranks, lengths.len(), tokens)];
                in_chunks(lengths, 1, &mut |chunk, is_gone_through| score(chunk, is_gone_through));
            }
            if work.refills && work.reference {
                rows.pop();
            }
            ledger.enter(Phase::Update);
            let of_critic = critic.as_ref().filter(|_| was_under_way).map(Learner::bytes);
            let held = of_critic.map(|bytes| ledger.take(MemoryCategory::Gradients, bytes));
            let grads = self.actor_gradients(walk, actor_view, work);
            drop(held);
            exchange_gradients(ledger, work.ranks, &actor);
            // A thread computes the actor's step while the critic's passes run, and is done with the gradients before they are.
            let prepared = self.computes_step_meanwhile(work).then(|| actor.prepared(walk));
            let critic_grads = critic.as_ref().map(|critic| {
                let mut sum: Gradients = vec![];
                for micro in &work.micro {
                    let (lengths, r) = sizes(micro);
                    let g = critic_view.scorer_gradients(&lengths, r, self.checkpoint);
                    sum = add(sum, g);
                }
                exchange_gradients(ledger, work.ranks, critic);
                sum
            });
            match prepared {
                Some(prepared) => {
                    drop(grads);
                    ledger.enter(Phase::Step);
                    actor.commit(prepared);
                }
                None => {
                    ledger.enter(Phase::Step);
                    actor.step(walk, grads);
                }
            }
            if let (Some(critic), Some(grads)) = (&mut critic, critic_grads) {
                critic.step(walk, grads);
                let bytes = critic.bytes();
                under_way = self.computes_step_meanwhile(work).then(|| ledger.take(MemoryCategory::Gradients, bytes));
            }
            if number == 0 || number + 1 == work.steps.clamp(1, STEPS) {
                // The guard's copy and a checkpoint wait for the thread.
                under_way = None;
            }
            if number == 0 {
                actor.guard(walk);
                critic.iter_mut().for_each(|critic| critic.guard(walk));
            }
            let learners: Vec<&Learner> = [&actor].into_iter().chain(&critic).collect();
            if number + 1 == work.steps.clamp(1, STEPS) {
                self.save(
                    walk,
                    &learners,
                    // Of a response's token: itself, log-probability and advantage; of the reference log-probability
                    // and KL; of the critic value and return.
                    (3 + if work.reference { 2 } else { 0 } + if work.critic { 2 } else { 0 }) * responses
                        + work.prompts.iter().sum::<usize>(),
                    if work.reference { responses * e } else { 0 },
                );
            }
        }
        if !work.evaluates_within {
            actor.finish();
            critic.iter_mut().for_each(Learner::finish);
        }
        evaluate();
        drop((sft, reward, more, copies));
    }

    /// Whether the actor's step is computed while the critic's passes run on a device, and the critic's while what comes next does.
    fn computes_step_meanwhile(&self, work: &Rollouts) -> bool {
        let is_on_device = self.on_device.as_ref().is_some_and(|on| match &self.scorer {
            Some(_) if !work.critic_on_policy => is_device(on.scorer),
            _ => is_device(on.policy),
        });
        is_on_device && work.critic && work.ranks <= 1 && work.steps_actor_by_its_gradients
    }

    fn actor_gradients(&self, walk: &Simulator, view: View<'_>, work: &Rollouts) -> Gradients {
        let mut sum: Gradients = vec![];
        for micro in &work.micro {
            let (lengths, r) = sizes(micro);
            let m: usize = lengths.iter().sum();
            let e = view.net.config.embedding_width;
            let _batch = walk.ledger.take(MemoryCategory::Data, m * OF_TOKEN + r * (OF_TARGET + 12));
            // The reference's hidden states of these responses: the exact KL is a metric of the first pass.
            let other = work.reference.then(|| walk.rows(MemoryCategory::Head, r, e));
            let against = work.reference.then_some(work.exact.1);
            let g = view.policy_gradients(&lengths, r, against, self.checkpoint);
            drop(other);
            sum = add(sum, g);
        }
        if let Some((blocks, tokens, a_pass)) = work.text {
            let mut of_text: Gradients = vec![];
            for first in (0..blocks).step_by(a_pass.max(1)) {
                let lengths = vec![tokens; a_pass.min(blocks - first)];
                let r = lengths.len() * (tokens - 1);
                of_text = add(of_text, view.policy_gradients(&lengths, r, None, self.checkpoint));
            }
            sum = add(sum, of_text);
        }
        sum
    }
}

/// Lengths of whole sequences, and how many targets they have.
fn sizes(micro: &[(usize, usize)]) -> (Vec<usize>, usize) {
    (micro.iter().map(|(p, r)| p + r).collect(), micro.iter().map(|(_, r)| r).sum())
}

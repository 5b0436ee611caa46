//! The thread that owns the model's work: sequences of many requests are generated together. A request that arrives joins at the
//! next decoding step: its prompt is run, and its rows are decoded with the others of its adapter from then on. It does not depend
//! on HTTP or text. Read `model/decoding.rs` for a step, and `http.rs` beside it for who sends requests.
//!
//! Each sequence has its own sampling parameters, and its draws depend on its seed alone. A sequence whose client is gone leaves
//! before the next step. When a step fails, its sequences are generated again from where they are, one by one, so that the fault
//! of one of them ends that one alone.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Error, Result, anyhow};
use tokio::sync::{mpsc, oneshot};

use crate::error::unless_it_panics;
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::batch::{Batch, chunks_by_tokens};
use crate::model::decoding::{Decoding, Read};
use crate::model::generate::{FinishReason, SamplingParams};
use crate::model::roles::ValueModel;
use crate::ops::cpu::view;
use crate::ops::sample::{Distribution, ranked};
use crate::rng::{SplitMix64, derive};
use crate::run::Model;

/// Prompt tokens that are run at once before the next decoding step; a longer prompt is run alone.
const PREFILL_TOKENS: usize = 2048;
/// Tokens per response that the cache begins with room for; it grows for longer ones.
const ROOM: usize = 256;
/// The engine's thread calls as deeply as the main thread of a command.
const STACK: usize = 8 << 20;

/// A sequence to be generated.
pub struct Generation {
    /// The adapter; `None` is the bare base.
    pub adapter: Option<Arc<Adapter>>,
    /// Token ids of the prompt, at least one, and fewer than the context.
    pub prompt: Arc<[u32]>,
    /// Sampling parameters; at least one token, and no more than the context has room for.
    pub sampling: SamplingParams,
    /// Seed of the draws, as `generate` has it.
    pub seed: u64,
    /// The number of most likely tokens that are reported with each token.
    pub top: usize,
    /// Whether log-probabilities are those of temperature 1 whatever the temperature is.
    pub raw_logprobs: bool,
}

/// What becomes of a sequence.
#[derive(Debug)]
pub enum Event {
    /// The next token.
    Token {
        /// Its id.
        token: u32,
        /// Its log-probability, nats.
        logprob: f32,
        /// The most likely tokens and their log-probabilities, as many as were asked for.
        top: Vec<(u32, f32)>,
    },
    /// The last token was sent.
    Done(FinishReason),
    /// The sequence cannot be generated.
    Failed(String),
}

/// Flags by which the sequences of a request are ended.
#[derive(Clone, Debug, Default)]
pub struct Flags(Vec<Arc<AtomicBool>>);

impl Flags {
    /// Ends one of the request's sequences.
    pub fn end(&self, sequence: usize) {
        if let Some(flag) = self.0.get(sequence) {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

/// Ends the sequences of a request when it is dropped.
#[derive(Debug, Default)]
pub struct Cancel(Flags);

impl Cancel {
    /// The flags, which end nothing by themselves.
    pub fn flags(&self) -> Flags {
        self.0.clone()
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        (0..self.0.0.len()).for_each(|sequence| self.0.end(sequence));
    }
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// As many sequences wait as may.
    Full,
    /// The engine has ended.
    Ended,
}

/// How much is done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that are generated together.
    pub max_batch: usize,
    /// Sequences and scoring requests that wait, beyond which requests are refused.
    pub max_queue: usize,
}

enum Job {
    Generate(Vec<Row>),
    Score { adapter: Arc<Adapter>, sequences: Vec<Vec<u32>>, reply: oneshot::Sender<Result<Vec<f32>>> },
}

/// The engine, for those who send requests.
pub struct Engine {
    jobs: Mutex<Option<Sender<Job>>>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    limits: Limits,
}

#[derive(Default)]
struct Shared {
    waiting: AtomicUsize,
    running: AtomicUsize,
    /// Whether what runs and waits is given up.
    cut: AtomicBool,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there can be no further thread.
    pub fn start(model: Arc<Model>, limits: Limits) -> Result<Self> {
        let (jobs, received) = channel();
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let work = move || Work { base: &model.base, shared: &theirs, limits, waiting: VecDeque::new() }.run(&received);
        let thread = thread::Builder::new().name("engine".into()).stack_size(STACK).spawn(work);
        let thread = Mutex::new(Some(thread.context("starting the engine's thread")?));
        Ok(Self { jobs: Mutex::new(Some(jobs)), shared, thread, limits })
    }

    /// Sends a job that counts as so many in the queue.
    fn send(&self, job: Job, count: usize) -> Result<(), Refused> {
        let sender = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = sender.as_ref().ok_or(Refused::Ended)?;
        if self.shared.waiting.load(Ordering::Relaxed) >= self.limits.max_queue {
            return Err(Refused::Full);
        }
        self.shared.waiting.fetch_add(count, Ordering::Relaxed);
        sender.send(job).map_err(|_| Refused::Ended)
    }

    /// Has sequences generated. Their events come with the sequence's number; dropping the [`Cancel`] ends them all.
    ///
    /// # Errors
    /// If too many wait already, or the engine has ended.
    pub fn generate(
        &self,
        sequences: Vec<Generation>,
    ) -> Result<(mpsc::UnboundedReceiver<(usize, Event)>, Cancel), Refused> {
        let (events, received) = mpsc::unbounded_channel();
        let cancel = Cancel(Flags(sequences.iter().map(|_| Arc::default()).collect()));
        let rows = sequences.into_iter().zip(&cancel.0.0).enumerate().map(|(number, (of, cancelled))| {
            let (events, cancelled) = (events.clone(), cancelled.clone());
            Row { of, number, events, cancelled, tokens: vec![], alone: false }
        });
        let rows: Vec<Row> = rows.collect();
        let count = rows.len();
        self.send(Job::Generate(rows), count)?;
        Ok((received, cancel))
    }

    /// Has sequences scored by a reward adapter: the score at each sequence's last token.
    ///
    /// # Errors
    /// If too many wait already, or the engine has ended.
    pub fn score(
        &self,
        adapter: Arc<Adapter>,
        sequences: Vec<Vec<u32>>,
    ) -> Result<oneshot::Receiver<Result<Vec<f32>>>, Refused> {
        let (reply, received) = oneshot::channel();
        self.send(Job::Score { adapter, sequences, reply }, 1)?;
        Ok(received)
    }

    /// Whether the thread is there.
    pub fn is_running(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// The numbers of sequences that run and of requests that wait.
    pub fn load(&self) -> (usize, usize) {
        (self.shared.running.load(Ordering::Relaxed), self.shared.waiting.load(Ordering::Relaxed))
    }

    /// Takes no further request, and waits for the end of those that there are; `cut` gives them up instead.
    pub fn end(&self, cut: bool) {
        self.shared.cut.fetch_or(cut, Ordering::Relaxed);
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // Its work catches panics.
            let _ = thread.join();
        }
    }
}

/// A sequence of a request.
struct Row {
    of: Generation,
    /// The number of the sequence in its request.
    number: usize,
    events: mpsc::UnboundedSender<(usize, Event)>,
    cancelled: Arc<AtomicBool>,
    /// The tokens so far.
    tokens: Vec<u32>,
    /// Whether it runs in a batch of its own: a batch that it was in has failed.
    alone: bool,
}

impl Row {
    fn send(&self, event: Event) {
        // A receiver that is gone has cancelled the row.
        let _ = self.events.send((self.number, event));
    }

    fn is_gone(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.events.is_closed()
    }

    fn draw(&self) -> f64 {
        SplitMix64::new(derive(self.of.seed, &[self.tokens.len() as u64])).uniform()
    }

    fn by(&self) -> Distribution {
        let SamplingParams { temperature, top_k, top_p, .. } = self.of.sampling;
        Distribution { temperature, top_k, top_p }
    }

    /// Prompt and tokens so far.
    fn sequence(&self) -> Vec<u32> {
        [&self.of.prompt[..], &self.tokens].concat()
    }

    /// The temperature of log-probabilities that the sampler does not return itself.
    fn reads_logits(&self) -> Option<f64> {
        let temperature = self.of.sampling.temperature;
        let is_raw = self.of.raw_logprobs && temperature > 0.0 && temperature != 1.0;
        let temperature = if self.of.raw_logprobs { 1.0 } else { temperature };
        (is_raw || self.of.top > 0).then_some(temperature)
    }

    /// Takes the next token; returns whether the sequence goes on.
    fn take(&mut self, (token, logprob): (u32, f32), top: Vec<(u32, f32)>) -> bool {
        self.tokens.push(token);
        self.send(Event::Token { token, logprob, top });
        let finish = match () {
            () if self.of.sampling.stop.contains(&token) => FinishReason::Stop,
            () if self.tokens.len() >= self.of.sampling.max_new_tokens => FinishReason::Length,
            () => return true,
        };
        self.send(Event::Done(finish));
        false
    }
}

/// The rows of one adapter that are decoded together.
struct Group<'m> {
    adapter: Option<Arc<Adapter>>,
    decoding: Decoding<'m>,
    rows: Vec<Row>,
    alone: bool,
}

fn same(a: Option<&Arc<Adapter>>, b: Option<&Arc<Adapter>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// Runs a part of the work; a panic in it is an error.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    unless_it_panics(work).unwrap_or_else(|| Err(anyhow!("a fault of the program while it computed")))
}

/// Draws with `step`, which gets the draws and what reads the logits; returns which rows go on.
fn drawn(rows: &mut [Row], step: impl FnOnce(&[f64], &mut Read<'_>) -> Result<Vec<(u32, f32)>>) -> Result<Vec<bool>> {
    let draws: Vec<f64> = rows.iter().map(Row::draw).collect();
    let mut tops = vec![vec![]; rows.len()];
    let sampled = step(&draws, &mut |logits, sampled| {
        for (i, row) in rows.iter().enumerate() {
            let Some(temperature) = row.reads_logits() else { continue };
            let of_row = logits.row(i)?.to_host()?;
            let (logprob, top) = ranked(&view(&of_row)?, temperature, sampled[i].0, row.of.top)?;
            // The sampler's own number is that of `generate`.
            if row.of.raw_logprobs && row.of.sampling.temperature != 1.0 && row.of.sampling.temperature > 0.0 {
                sampled[i].1 = logprob;
            }
            tops[i] = top;
        }
        Ok(())
    })?;
    anyhow::ensure!(sampled.len() == rows.len(), "{} tokens for {} sequences", sampled.len(), rows.len());
    Ok(rows.iter_mut().zip(sampled).zip(tops).map(|((row, token), top)| row.take(token, top)).collect())
}

impl Group<'_> {
    /// Drops the rows whose flag is false.
    fn retain(&mut self, keep: &[bool]) {
        if keep.contains(&false) {
            self.decoding.retain(keep);
            let mut flags = keep.iter();
            self.rows.retain(|_| *flags.next().unwrap_or(&true));
        }
    }

    /// The next token of every row.
    fn step(&mut self) -> Result<()> {
        let (decoding, rows) = (&mut self.decoding, &mut self.rows);
        let tokens: Vec<u32> = rows.iter().filter_map(|row| row.tokens.last().copied()).collect();
        let positions: Vec<u32> = rows.iter().map(|row| (row.of.prompt.len() + row.tokens.len() - 1) as u32).collect();
        let keep = guarded(|| drawn(rows, |draws, read| decoding.step_reading(&tokens, &positions, draws, read)))?;
        self.retain(&keep);
        Ok(())
    }
}

/// The thread's state.
struct Work<'m> {
    base: &'m Base,
    shared: &'m Shared,
    limits: Limits,
    waiting: VecDeque<Row>,
}

impl<'m> Work<'m> {
    fn run(&mut self, jobs: &Receiver<Job>) {
        let mut groups: Vec<Group<'m>> = vec![];
        let mut scores = VecDeque::new();
        let mut is_open = true;
        loop {
            // 1. What has arrived; without work, the thread sleeps until something does.
            if groups.is_empty() && self.waiting.is_empty() && scores.is_empty() {
                match jobs.recv() {
                    Ok(job) => self.sort(job, &mut scores),
                    Err(_) => return,
                }
            }
            while is_open {
                match jobs.try_recv() {
                    Ok(job) => self.sort(job, &mut scores),
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => is_open = false,
                    Err(std::sync::mpsc::TryRecvError::Empty) => break,
                }
            }
            if self.shared.cut.load(Ordering::Relaxed) {
                return;
            }
            // 2. One request for scores.
            if let Some((adapter, sequences, reply)) = scores.pop_front() {
                self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
                self.score(&adapter, &sequences, reply);
            }
            // 3. Sequences whose clients are gone leave, and others take their places.
            for group in &mut groups {
                let keep: Vec<bool> = group.rows.iter().map(|row| !row.is_gone()).collect();
                group.retain(&keep);
            }
            groups.retain(|group| !group.rows.is_empty());
            self.admit(&mut groups);
            self.count(&groups);
            // 4. One token of every sequence.
            let mut failed = vec![];
            for group in &mut groups {
                if let Err(error) = group.step() {
                    failed.push((mem::take(&mut group.rows), error));
                }
            }
            groups.retain(|group| !group.rows.is_empty());
            failed.into_iter().for_each(|(rows, error)| self.failed(rows, &error));
            self.count(&groups);
        }
    }

    fn count(&self, groups: &[Group<'_>]) {
        self.shared.running.store(groups.iter().map(|group| group.rows.len()).sum(), Ordering::Relaxed);
    }

    fn sort(&mut self, job: Job, scores: &mut VecDeque<Scoring>) {
        match job {
            Job::Generate(rows) => self.waiting.extend(rows),
            Job::Score { adapter, sequences, reply } => scores.push_back((adapter, sequences, reply)),
        }
    }

    /// Runs the prompts of the sequences that there is room for.
    fn admit(&mut self, groups: &mut Vec<Group<'m>>) {
        let before = self.waiting.len();
        self.waiting.retain(|row| !row.is_gone());
        self.shared.waiting.fetch_sub(before - self.waiting.len(), Ordering::Relaxed);
        let running: usize = groups.iter().map(|group| group.rows.len()).sum();
        let (mut room, mut tokens, mut admitted) =
            (self.limits.max_batch.saturating_sub(running), 0, Vec::<Row>::new());
        while let Some(next) = self.waiting.front().filter(|_| room > 0) {
            let more = next.of.prompt.len() + next.tokens.len();
            if !admitted.is_empty() && tokens + more > PREFILL_TOKENS {
                break;
            }
            (room, tokens) = (room - 1, tokens + more);
            admitted.extend(self.waiting.pop_front());
        }
        self.shared.waiting.fetch_sub(admitted.len(), Ordering::Relaxed);
        while let Some(first) = admitted.first() {
            let (adapter, alone) = (first.of.adapter.clone(), first.alone);
            let (rows, others): (Vec<Row>, Vec<Row>) = match alone {
                true => {
                    let others = admitted.split_off(1);
                    (admitted, others)
                }
                false => {
                    admitted.into_iter().partition(|row| !row.alone && same(row.of.adapter.as_ref(), adapter.as_ref()))
                }
            };
            admitted = others;
            self.start(adapter, rows, groups);
        }
    }

    /// Runs prompts of one adapter, draws their first tokens, and adds them to the adapter's group.
    fn start(&mut self, adapter: Option<Arc<Adapter>>, mut rows: Vec<Row>, groups: &mut Vec<Group<'m>>) {
        let alone = rows.iter().any(|row| row.alone);
        let started = guarded(|| {
            // A prompt that several responses share is run once.
            let (mut places, mut distinct) = (HashMap::new(), vec![]);
            let sources: Vec<usize> = rows
                .iter()
                .map(|row| {
                    *places.entry(row.sequence()).or_insert_with_key(|sequence| {
                        distinct.push(sequence.clone());
                        distinct.len() - 1
                    })
                })
                .collect();
            let room = rows.iter().map(|row| row.of.sampling.max_new_tokens - row.tokens.len()).max().unwrap_or(0);
            let by = rows.iter().map(Row::by).collect();
            let prompts = Batch::new(&distinct)?;
            let mut decoding =
                Decoding::start_shared(self.base, adapter.clone(), &prompts, &sources, room.min(ROOM), by)?;
            let keep = drawn(&mut rows, |draws, read| decoding.first_reading(draws, read))?;
            Ok((decoding, keep))
        });
        let (decoding, keep) = match started {
            Ok(started) => started,
            Err(error) => return self.failed(rows, &error),
        };
        let mut new = Group { adapter, decoding, rows, alone };
        new.retain(&keep);
        if new.rows.is_empty() {
            return;
        }
        let place = groups
            .iter()
            .position(|group| !alone && !group.alone && same(group.adapter.as_ref(), new.adapter.as_ref()));
        let Some(place) = place else { return groups.push(new) };
        let Group { decoding, rows, .. } = new;
        let group = &mut groups[place];
        let joined = guarded(|| group.decoding.join(decoding));
        group.rows.extend(rows);
        if let Err(error) = joined {
            let group = groups.remove(place);
            self.failed(group.rows, &error);
        }
    }

    /// A batch has failed: its sequences go on one by one, unless it was of one.
    fn failed(&mut self, mut rows: Vec<Row>, error: &Error) {
        if let [row] = &rows[..] {
            return row.send(Event::Failed(format!("{error:#}")));
        }
        self.shared.waiting.fetch_add(rows.len(), Ordering::Relaxed);
        while let Some(mut row) = rows.pop() {
            row.alone = true;
            self.waiting.push_front(row);
        }
    }

    fn score(&self, adapter: &Adapter, sequences: &[Vec<u32>], reply: oneshot::Sender<Result<Vec<f32>>>) {
        if reply.is_closed() {
            return;
        }
        let scores = guarded(|| {
            let scorer = ValueModel::new(self.base, adapter)?;
            let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
            let mut scores = Vec::with_capacity(sequences.len());
            for chunk in chunks_by_tokens(&lengths, PREFILL_TOKENS) {
                let some: Vec<&Vec<u32>> = chunk.into_iter().map(|i| &sequences[i]).collect();
                scores.extend(scorer.scores(&Batch::new(&some)?)?);
            }
            Ok(scores)
        });
        // A receiver that is gone needs no reply.
        let _ = reply.send(scores);
    }
}

/// A request for scores.
type Scoring = (Arc<Adapter>, Vec<Vec<u32>>, oneshot::Sender<Result<Vec<f32>>>);

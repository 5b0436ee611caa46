//! Decoding steps that are recorded and issued again, against the same steps launch by launch: the same launches, tokens and
//! log-probabilities, and what happens when a machine refuses or an input is not written. Read `kv_cache.rs` for a cache in q8_0.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use fourfold::device::emulated::Emulated;
use fourfold::device::machine::{Launch, Product, Recorded, Refusal};
use fourfold::device::{Device, Element, Info, Machine};
use fourfold::model::adapter::TargetModules;
use fourfold::model::base::Base;
use fourfold::model::batch::Batch;
use fourfold::model::decoding::Decoding;
use fourfold::model::generate::{Response, SamplingParams, generate};
use fourfold::model::roles::Policy;
use fourfold::ops::sample::Distribution;
use fourfold::ops::storage::dtype::StorageDType;
use fourfold::ops::weight::ComputeDtype;

use crate::parity::families;
use crate::tiny_decoders::open;
use crate::world::*;

pub type Log = Vec<(String, [u32; 3])>;

fn entry(launch: &Launch<'_>) -> (String, [u32; 3]) {
    (launch.kernel.to_string(), launch.grid)
}

/// The emulated machine, with a list of all its launches. It can leave a part of an input as it was.
pub struct Watched {
    inner: Arc<Emulated>,
    log: Mutex<Log>,
    recordings: Mutex<HashMap<u64, Log>>,
    /// Bytes of the input, and those of them that only its first write reaches.
    stale: Option<(usize, Range<usize>)>,
    inputs: Mutex<Vec<u64>>,
    /// Results of so many bytes have no token at this word, as if the host had to draw it.
    undrawn: Option<(usize, usize)>,
}

impl Watched {
    pub fn open(inner: &Arc<Emulated>, stale: Option<(usize, Range<usize>)>) -> (Arc<Self>, Device) {
        Self::of(inner, stale, None)
    }

    fn of(
        inner: &Arc<Emulated>,
        stale: Option<(usize, Range<usize>)>,
        undrawn: Option<(usize, usize)>,
    ) -> (Arc<Self>, Device) {
        let (inner, inputs) = (Arc::clone(inner), Mutex::default());
        let machine = Self { inner, log: Mutex::default(), recordings: Mutex::default(), stale, inputs, undrawn };
        let machine = Arc::new(machine);
        (machine.clone(), Device::new(machine))
    }

    pub fn log(&self) -> Log {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Machine for Watched {
    fn name(&self) -> String {
        "the watched machine".into()
    }
    fn info(&self) -> Result<Info> {
        self.inner.info()
    }
    fn supports(&self, element: Element) -> bool {
        self.inner.supports(element)
    }
    fn allocate(&self, bytes: usize) -> Result<u64, Refusal> {
        self.inner.allocate(bytes)
    }
    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: promised by the caller, as in all functions below.
        unsafe { self.inner.free(address, bytes) }
    }
    fn allocate_host(&self, bytes: usize) -> Result<*mut u8> {
        self.inner.allocate_host(bytes)
    }
    unsafe fn free_host(&self, address: *mut u8, bytes: usize) {
        // SAFETY: as above.
        unsafe { self.inner.free_host(address, bytes) }
    }
    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        if let Some((bytes, stale)) = self.stale.clone().filter(|(bytes, _)| *bytes == from.len()) {
            let mut inputs = self.inputs.lock().unwrap();
            if inputs.contains(&to) {
                for part in [0..stale.start, stale.end..bytes].into_iter().filter(|part| !part.is_empty()) {
                    // SAFETY: as above; a part lies inside of the whole.
                    unsafe { self.inner.upload(&from[part.clone()], to + part.start as u64) }?;
                }
                return Ok(());
            }
            inputs.push(to);
        }
        // SAFETY: as above.
        unsafe { self.inner.upload(from, to) }
    }
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.inner.download(from, to) }?;
        if let Some((_, word)) = self.undrawn.filter(|(bytes, _)| *bytes == to.len()) {
            to[4 * word..4 * word + 4].fill(0xff);
        }
        Ok(())
    }
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.inner.zero(address, bytes) }
    }
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.inner.copy(from, to, bytes) }
    }
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.log.lock().unwrap().push(entry(launch));
        // SAFETY: as above.
        unsafe { self.inner.launch(launch) }
    }
    unsafe fn gemm(&self, product: &Product) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.inner.gemm(product) }
    }
    fn record(&self, launches: Vec<Recorded>) -> Result<u64> {
        let log = launches.iter().map(|kept| entry(&kept.launch())).collect();
        let number = self.inner.record(launches)?;
        self.recordings.lock().unwrap().insert(number, log);
        Ok(number)
    }
    unsafe fn replay(&self, recording: u64) -> Result<()> {
        let launches = self.recordings.lock().unwrap()[&recording].clone();
        self.log.lock().unwrap().extend(launches);
        // SAFETY: as above.
        unsafe { self.inner.replay(recording) }
    }
    fn forget(&self, recording: u64) {
        self.inner.forget(recording);
    }
    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }
}

/// A machine that keeps no recordings.
pub fn refusing() -> (Arc<Emulated>, Device) {
    let (machine, device) = machine().unwrap();
    machine.fail_recording_after(Some(0));
    (machine, device)
}

pub fn small(device: &Device) -> Base {
    let base = embedded(2).quantised(Some(StorageDType::Q8_0)).base().unwrap().computing_in(ComputeDtype::F16);
    on(base, device)
}

/// Prompts of which one crosses a chunk of the cache, and settings under which some end early.
pub fn prompts() -> Vec<Vec<u32>> {
    let of = |n: u32, seed: u32| (0..n).map(|i| (i * 7 + seed * 31) % 900 + 3).collect();
    vec![of(251, 1), of(5, 2), of(9, 3), of(5, 2)]
}

pub fn settings() -> SamplingParams {
    SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: 24, stop: (0..25).collect() }
}

pub fn rollout(base: &Base, prompts: &[Vec<u32>], sampling: &SamplingParams) -> Vec<Response> {
    try_rollout(base, prompts, sampling).unwrap_or_else(|e| panic!("{e:#}"))
}

fn try_rollout(base: &Base, prompts: &[Vec<u32>], sampling: &SamplingParams) -> Result<Vec<Response>> {
    let adapter = adapter(base, TargetModules::AllLinear, 3, 5);
    let seeds: Vec<u64> = (0..prompts.len() as u64).map(|s| 90 + s).collect();
    generate(Policy::new(base, Some(&adapter)), prompts, &seeds, sampling, |_, _| {})
}

#[test]
fn steps_issued_again_have_the_launches_and_tokens_of_steps_launch_by_launch() {
    let Some((kept, _)) = machine() else { return };
    let _time = timed("recorded decoding steps");
    let (watched, device) = Watched::open(&kept, None);
    let (one_by_one, plain) = Watched::open(&refusing().0, None);
    let (base, other) = (small(&device), small(&plain));
    let narrow = SamplingParams { top_k: 40, top_p: 0.95, temperature: 0.8, ..settings() };
    // The host draws from more than 1,024 tokens: the recorded step ends with the logits.
    let of_host = SamplingParams { temperature: 0.0, top_k: 0, ..settings() };
    for sampling in [settings(), narrow, of_host] {
        let lengths = |of: &[Response]| -> Vec<usize> { of.iter().map(|r| r.tokens.len()).collect() };
        // Some responses end within steps in a row: their sequences leave the batch after them.
        let (got, want) = (rollout(&base, &prompts(), &sampling), rollout(&other, &prompts(), &sampling));
        let some = lengths(&want);
        assert_eq!(got, want, "{sampling:?}");
        assert!(some.iter().any(|&n| n != some[0]) || sampling.temperature == 0.0, "{some:?}");
        let (ours, theirs) = (watched.log(), one_by_one.log());
        say(&format!("responses of {some:?} tokens: {} launches, {} one by one", ours.len(), theirs.len()));
        // Where none does, the launches are the same, but for those that hand the tokens on.
        let sampling = SamplingParams { stop: vec![], ..sampling };
        assert_eq!(rollout(&base, &prompts(), &sampling), rollout(&other, &prompts(), &sampling), "{sampling:?}");
        let (mut ours, theirs) = (watched.log(), one_by_one.log());
        let before = ours.len();
        ours.retain(|(kernel, _)| kernel != "sample_turn");
        assert!(before > ours.len(), "{sampling:?}: no steps in a row");
        assert!(ours == theirs, "{sampling:?}: {} launches, {} one by one", ours.len(), theirs.len());
    }
    let (work, none) = (device.work(), plain.work());
    say(&format!("with recordings {work:?}, without {none:?}"));
    assert!(work.replays >= 8 && none.replays == 0, "{work:?} {none:?}");
    assert!(work.uploads < none.uploads && work.launches < none.launches, "{work:?} {none:?}");
    assert_eq!(kept.recordings(), 0, "recordings outlive their rollout");
}

#[test]
fn an_input_that_is_not_written_again_changes_what_is_sampled() {
    let Some((inner, _)) = machine() else { return };
    let _time = timed("inputs of another step");
    // Their lengths together are no array of the input's size.
    let prompts = [prompts()[1].clone(), prompts()[2][..8].to_vec()];
    let sampling = SamplingParams { stop: vec![], max_new_tokens: 10, ..settings() };
    let (_, device) = Watched::open(&inner, None);
    let want = rollout(&small(&device), &prompts, &sampling);
    // Words of the draws, tokens, positions, and slots, lengths and rows of two sequences.
    let (all, words) = (14, [0..4, 4..6, 6..8, 10..12, 12..14]);
    for part in words {
        let (_, device) = Watched::open(&inner, Some((4 * all, 4 * part.start..4 * part.end)));
        let got = try_rollout(&small(&device), &prompts, &sampling);
        assert!(device.work().replays > 0);
        match got {
            Ok(got) => {
                assert_eq!(got[0].tokens[..3], want[0].tokens[..3], "the steps before the first replay");
                assert_ne!(got, want, "words {part:?} of the input do not matter");
            }
            // Keys that were never written are NaN on this machine.
            Err(error) => {
                assert!(part == (12..14) && format!("{error:#}").contains("NaN"), "words {part:?}: {error:#}")
            }
        }
    }
    // Nothing is left out: the same machine, with a part of no words.
    let (_, device) = Watched::open(&inner, Some((4 * all, 8..8)));
    assert_eq!(rollout(&small(&device), &prompts, &sampling), want);
}

#[test]
fn a_machine_that_refuses_a_recording_or_a_replay_goes_on_launch_by_launch() {
    let Some((machine, device)) = machine() else { return };
    let base = small(&device);
    let (prompts, sampling) = (prompts(), SamplingParams { stop: vec![], max_new_tokens: 9, ..settings() });
    let want = rollout(&base, &prompts, &sampling);
    assert!(device.work().replays > 0 && device.can_record());
    let live = device.usage().live;
    assert_eq!(rollout(&base, &prompts, &sampling), want);
    assert_eq!(device.usage().live, live, "a recording's memory outlives its rollout");
    for after in [0, 1, 3] {
        let (machine, device) = (machine.clone(), Device::new(machine.clone()));
        machine.fail_recording_after(Some(after));
        let base = small(&device);
        assert_eq!(rollout(&base, &prompts, &sampling), want, "failure after {after}");
        assert!(!device.can_record() && device.work().replays <= after as usize);
        assert_eq!(device.usage().live, live, "memory of a recording is left");
        machine.fail_recording_after(None);
    }
    assert_eq!(machine.recordings(), 0);
}

/// Twenty tokens of two sequences, at most so many steps in a row: the results of each step, and how many came at once.
fn in_a_row(base: &Base, most: usize) -> (Vec<Vec<(u32, f32)>>, Vec<usize>) {
    let by = Distribution { temperature: 1.0, top_k: 0, top_p: 1.0 };
    let prompts = Batch::new(&[vec![3, 4, 5], vec![6, 7]]).unwrap();
    let mut decoding = Decoding::start(Policy::new(base, None), &prompts, &[0, 1], 32, by).unwrap();
    let draw = |step: usize| vec![(0.37 * step as f64).fract(), (0.61 * step as f64 + 0.3).fract()];
    let (mut all, mut runs) = (vec![decoding.first(&draw(0)).unwrap()], vec![]);
    while all.len() < 20 {
        let tokens: Vec<u32> = all[all.len() - 1].iter().map(|(token, _)| *token).collect();
        let at = all.len();
        let positions = [2, 1].map(|first| (first + at) as u32);
        let most = most.min(20 - at);
        let steps = match most {
            0 | 1 => vec![decoding.step(&tokens, &positions, &draw(at)).unwrap()],
            _ => decoding.steps(&tokens, &positions, most, |ahead| draw(at + ahead)).unwrap(),
        };
        runs.push(steps.len());
        all.extend(steps);
    }
    (all, runs)
}

#[test]
fn steps_in_a_row_have_the_tokens_of_steps_one_by_one_and_wait_once() {
    let Some((inner, device)) = machine() else { return };
    let base = small(&device);
    let (want, _) = in_a_row(&base, 1);
    for most in [2, 3, 4, 9] {
        let before = device.work();
        let (got, runs) = in_a_row(&base, most);
        assert_eq!(got, want, "{most} at most");
        // The first step of a shape is run, the second recorded.
        assert_eq!((&runs[..2], runs[2]), (&[1, 1][..], most.min(4)), "{runs:?}");
        let work = device.work() - before;
        assert_eq!(work.replays, 17, "{work:?}");
        assert_eq!(work.downloads, 1 + runs.len(), "{work:?}");
    }
    // A token that the host has to draw, of either sequence and of each step of four: what follows it is run again.
    for (step, sequence) in [(0, 0), (0, 1), (1, 0), (2, 1), (3, 0), (3, 1)] {
        let (_, device) = Watched::of(&inner, None, Some((4 * 2 * 16, 4 * (2 * step + sequence))));
        let (got, runs) = in_a_row(&small(&device), 4);
        assert_eq!(got, want, "no token of sequence {sequence} in step {step}");
        assert_eq!(runs[..4], [1, 1, step.max(1), 1], "{runs:?}");
        // Twice as many steps by themselves the next time, so that few are run for nothing.
        assert!(device.work().replays <= 17 + 4 * 4, "{runs:?} {:?}", device.work());
    }
}

#[test]
fn every_family_decodes_alike_with_and_without_recordings() {
    let Some((_, device)) = machine() else { return };
    let (_, plain) = refusing();
    let _time = timed("recorded steps of the families");
    for path in families() {
        let (base, other) = (on(open(&path).base, &device), on(open(&path).base, &plain));
        let vocab = base.config().vocab_size as u32;
        let prompts: Vec<Vec<u32>> = vec![(0..5).map(|i| i % vocab).collect(), vec![1, 2]];
        let sampling = SamplingParams { stop: vec![3], max_new_tokens: 8, ..settings() };
        let before = device.work();
        assert_eq!(rollout(&base, &prompts, &sampling), rollout(&other, &prompts, &sampling), "{path}");
        let work = device.work() - before;
        assert!(work.replays > 0, "{path}: {work:?}");
    }
}

#[test]
fn a_cache_that_grows_ends_a_recording() {
    let Some((_, device)) = machine() else { return };
    let (_, plain) = refusing();
    let run = |device: &Device| {
        let base = small(device);
        let by = Distribution { temperature: 1.0, top_k: 0, top_p: 1.0 };
        let prompts = Batch::new(&[vec![3, 4, 5], vec![6, 7]]).unwrap();
        let mut decoding = Decoding::start(Policy::new(&base, None), &prompts, &[0, 1], 4, by).unwrap();
        let mut all = decoding.first(&[0.3, 0.8]).unwrap();
        for step in 0..9 {
            let tokens: Vec<u32> = all[all.len() - 2..].iter().map(|(token, _)| *token).collect();
            let draw = f64::from(step) / 10.0 + 0.013;
            all.extend(decoding.step(&tokens, &[3 + step, 2 + step], &[draw, 1.0 - draw]).unwrap());
        }
        all
    };
    let (got, want) = (run(&device), run(&plain));
    assert_eq!(got, want);
    // Four steps fit: one as it is, one recorded, two replays; the fifth grows the cache, then again.
    assert_eq!((device.work().replays, plain.work().replays), (4, 0));
}

/// Tokens and log-probabilities of some of four sequences, which join and leave a batch at steps of their own. The third is drawn
/// from another distribution.
pub fn joining(base: &Base, which: &[usize]) -> Vec<Vec<(u32, f32)>> {
    let prompts = [vec![3, 4, 5], vec![6, 7], vec![8, 9, 10, 11, 12], vec![5]];
    // The fourth finds the slot that the first has left; the cache has grown before, for the third and for length.
    let (starts, ends) = ([0, 0, 3, 8], [7, 16, 12, 16]);
    let by =
        |i: usize| Distribution { temperature: if i == 2 { 0.7 } else { 1.0 }, top_k: [0, 0, 5, 0][i], top_p: 1.0 };
    let mut found: Vec<Vec<(u32, f32)>> = vec![vec![]; 4];
    let draw = |i: usize, k: usize| (0.37 * i as f64 + 0.613 * k as f64 + 0.013).fract();
    let (mut batch, mut live): (Option<Decoding<'_>>, Vec<usize>) = (None, vec![]);
    for step in 0..16 {
        if let Some(decoding) = &mut batch {
            let keep: Vec<bool> = live.iter().map(|&i| ends[i] > step).collect();
            decoding.retain(&keep);
            live.retain(|&i| ends[i] > step);
        }
        if live.is_empty() {
            batch = None;
        }
        if let Some(decoding) = &mut batch {
            let tokens: Vec<u32> = live.iter().map(|&i| found[i].last().unwrap().0).collect();
            let positions: Vec<u32> = live.iter().map(|&i| (prompts[i].len() + found[i].len() - 1) as u32).collect();
            let draws: Vec<f64> = live.iter().map(|&i| draw(i, found[i].len())).collect();
            let next = decoding.step(&tokens, &positions, &draws).unwrap();
            live.iter().zip(next).for_each(|(&i, token)| found[i].push(token));
        }
        let new: Vec<usize> = which.iter().copied().filter(|&i| starts[i] == step).collect();
        if new.is_empty() {
            continue;
        }
        let some: Vec<&Vec<u32>> = new.iter().map(|&i| &prompts[i]).collect();
        let sources: Vec<usize> = (0..new.len()).collect();
        let by = new.iter().map(|&i| by(i)).collect();
        let mut begun = Decoding::start_shared(base, None, &Batch::new(&some).unwrap(), &sources, 4, by).unwrap();
        let draws: Vec<f64> = new.iter().map(|&i| draw(i, 0)).collect();
        let firsts = begun.first(&draws).unwrap();
        new.iter().zip(firsts).for_each(|(&i, token)| found[i].push(token));
        live.extend(new);
        match &mut batch {
            Some(decoding) => decoding.join(begun).unwrap(),
            None => batch = Some(begun),
        }
    }
    found
}

#[test]
fn sequences_that_join_a_batch_are_generated_as_alone_recorded_or_not() {
    let Some((_, device)) = machine() else { return };
    let (_, plain) = refusing();
    let (base, other) = (small(&device), small(&plain));
    let together = joining(&base, &[0, 1, 2, 3]);
    assert_eq!(together.iter().map(Vec::len).collect::<Vec<_>>(), [7, 16, 9, 8]);
    assert!(device.work().replays > 0 && plain.work().replays == 0);
    assert_eq!(together, joining(&other, &[0, 1, 2, 3]), "every bit, with and without recordings");
    for (i, together) in together.iter().enumerate() {
        let alone = joining(&base, &[i]).swap_remove(i);
        assert!(
            alone.iter().zip(together).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-3),
            "{alone:?} {together:?}"
        );
    }
    let host = joining(&open(&families()[0]).base, &[0, 1, 2, 3]);
    let of_host = |i: usize| joining(&open(&families()[0]).base, &[i]).swap_remove(i);
    for (i, together) in host.iter().enumerate() {
        assert!(of_host(i).iter().zip(together).all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-4), "{i}");
    }
}

#[test]
fn memory_of_work_that_cannot_be_recorded_is_given_back_matrix_by_matrix() {
    let device = Device::dry();
    let row = |n| device.matrix(Element::F32, 1, n);
    let ((kept, also), recording) = device
        .record(|| {
            let (kept, also) = (row(100)?, row(200)?);
            drop(row(1000)?);
            kept.fill_zero()?;
            Ok((kept, also))
        })
        .unwrap();
    assert!(recording.is_none(), "a fill is no launch");
    assert_eq!(device.usage().live, 512 + 1024);
    drop(also);
    assert_eq!(device.usage().live, 512);
    drop(kept);
    assert_eq!(device.usage().live, 0);
}

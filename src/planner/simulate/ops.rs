//! Allocations of the operations in `ops`: what each takes, holds and frees. Rows and widths count f32 numbers. The names are
//! those of the operations; read the operation itself beside each.

use std::cell::RefCell;
use std::rc::Rc;

use crate::ops::attention;
use crate::ops::cpu::WORTH_A_THREAD;
use crate::ops::cpu::bf16;
use crate::ops::cpu::gemm::NR;
use crate::ops::linear::{cpu_bf16, cpu_gemv};
use crate::ops::logprobs::{RUN_BYTES, RUNS, STRIP};
use crate::ops::weight::{ComputeDtype, StorageDType};
use crate::planner::sim_allocator::{Allocation, MemoryCategory, SimAllocator};

const F32: usize = size_of::<f32>();
/// Bytes that candle keeps per tensor beside its numbers: the tensor, its storage's lock, two counts each, the shape's list.
const TENSOR: usize = 320;

/// A tensor: clones share its storage.
#[derive(Clone)]
pub struct Tensor(Rc<RefCell<Allocation>>);

impl Tensor {
    /// Counts towards another category from now on.
    pub fn becomes(self, class: MemoryCategory) -> Self {
        self.0.borrow_mut().becomes(class);
        self
    }
}

/// One linear map of a group.
#[derive(Clone, Copy)]
pub struct Part {
    /// Output features.
    pub out: usize,
    /// Rank of its LoRA layer; 0 without one.
    pub rank: usize,
    /// Whether its LoRA layer is DoRA: the unscaled product is saved beside the scaled output.
    pub dora: bool,
    /// How its matrix is stored.
    pub stored: StorageDType,
}

/// The LoRA layer on the embedding or lm_head.
#[derive(Clone, Copy, Debug, Default)]
pub struct TableBranch {
    /// Its rank; 0 without one.
    pub rank: usize,
    /// Whether it is DoRA.
    pub dora: bool,
}

/// The context in which operations allocate.
pub struct Simulator {
    /// The simulated allocator.
    pub ledger: SimAllocator,
    /// Number of threads that share the kernels' work.
    pub threads: usize,
    /// Type in which products with frozen matrices are computed.
    pub compute: ComputeDtype,
    /// Scratch buffers that threads keep, of the caller and of its helpers.
    scratch: RefCell<[Vec<Scratch>; 2]>,
}

/// A scratch buffer at one depth of nesting: its length, and its owner.
type Scratch = (usize, Option<Allocation>);

/// The threads that work.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    /// The calling thread.
    One,
    /// All threads.
    All,
}

impl Simulator {
    /// A simulation without allocations.
    pub fn new(ledger: SimAllocator, threads: usize, compute: ComputeDtype) -> Self {
        Self { ledger, threads, compute, scratch: RefCell::default() }
    }

    /// A list of f32 outside of any tensor.
    fn list(&self, class: MemoryCategory, numbers: usize) -> Allocation {
        self.ledger.take(class, numbers * F32)
    }

    /// A tensor of `numbers` f32.
    pub fn tensor(&self, class: MemoryCategory, numbers: usize) -> Tensor {
        Tensor(Rc::new(RefCell::new(self.ledger.take(class, numbers * F32 + TENSOR))))
    }

    /// `cpu::parallel`: the threads that work on a number of items.
    fn parallel(&self, items: usize, cost: usize) -> Who {
        if cost < WORTH_A_THREAD || items < 2 { Who::One } else { Who::All }
    }

    /// `pack::with_scratch` at a depth of nesting: threads keep the largest that they needed.
    fn scratch(&self, who: Who, depth: usize, numbers: usize) {
        let mut all = self.scratch.borrow_mut();
        let helpers = if who == Who::All { self.threads.saturating_sub(1) } else { 0 };
        for (kept, threads) in all.iter_mut().zip([1, helpers]).filter(|(_, threads)| *threads > 0) {
            kept.resize_with(kept.len().max(depth + 1), Default::default);
            let (have, holder) = &mut kept[depth];
            if *have < numbers {
                *have = numbers;
                drop(holder.take());
                *holder = Some(self.list(MemoryCategory::Blocks, numbers * threads));
            }
        }
    }

    fn words(&self, who: Who, depth: usize, words: usize) {
        self.scratch(who, depth, words + 16);
    }

    /// `linear::forward`: outputs of each map, and its saved tensors: z, and the directions of maps with DoRA.
    pub fn linear(&self, m: usize, k: usize, parts: &[Part]) -> (Vec<Tensor>, Vec<Tensor>) {
        let rank: usize = parts.iter().map(|p| p.rank).sum();
        let outputs: usize = parts.iter().map(|p| p.out).sum();
        let who = self.parallel(parts.iter().map(|p| p.out.div_ceil(NR)).sum(), m * k * outputs);
        let (left, z) = self.low_rank_inputs(m, k, parts);
        let ys: Vec<Allocation> = parts.iter().map(|p| self.list(MemoryCategory::Blocks, m * p.out)).collect();
        let words = bf16::words(k + rank);
        match &left {
            Some(_) if m <= cpu_bf16::FEW_ROWS => self.words(who, 0, 32 * words),
            Some(_) => self.words(who, 0, words * (NR + 16)),
            None if m <= cpu_gemv::FEW_ROWS => self.scratch(who, 0, cpu_gemv::WEIGHT_ROWS * k),
            None => {
                self.scratch(who, 0, k * NR);
                self.scratch(who, 1, 16 * k);
            }
        }
        if left.is_none() && rank > 0 {
            self.scratch(who, 0, NR * parts.iter().map(|p| p.rank).max().unwrap_or(0));
        }
        drop(left);
        let owned = |held: Allocation| Tensor(Rc::new(RefCell::new(held)));
        let mut kept = vec![owned(z)];
        let mut outputs: Vec<Tensor> = ys.into_iter().map(owned).collect();
        for (y, part) in outputs.iter_mut().zip(parts).filter(|(_, part)| part.dora && part.rank > 0) {
            let scaled = self.tensor(MemoryCategory::Blocks, m * part.out);
            kept.push(std::mem::replace(y, scaled));
        }
        (outputs, kept)
    }

    /// `linear::saved_alone`, for parts without DoRA.
    pub fn linear_saved_alone(&self, m: usize, k: usize, parts: &[Part]) -> Vec<Tensor> {
        vec![Tensor(Rc::new(RefCell::new(self.low_rank_inputs(m, k, parts).1)))]
    }

    /// z, and in bf16 the rounded rows.
    fn low_rank_inputs(&self, m: usize, k: usize, parts: &[Part]) -> (Option<[Allocation; 2]>, Allocation) {
        let rank: usize = parts.iter().map(|p| p.rank).sum();
        let is_bf16 =
            self.compute == ComputeDtype::Bf16 && k.is_multiple_of(2) && parts.iter().all(|p| p.out.is_multiple_of(2));
        if is_bf16 {
            let _stacked = self.list(MemoryCategory::Blocks, rank * k);
            let (left, z) = self.left(m, k, rank);
            return (Some(left), z);
        }
        let z = self.list(MemoryCategory::Blocks, m * rank);
        drop(self.list(MemoryCategory::Blocks, k * rank));
        (None, z)
    }

    /// `cpu_bf16::PackedLhs::of`: the rounded rows with their low-rank columns, and z.
    fn left(&self, m: usize, k: usize, rank: usize) -> ([Allocation; 2], Allocation) {
        let words = bf16::words(k + rank);
        let rounded = self.list(MemoryCategory::Blocks, m.div_ceil(32) * 32 * words);
        let z = self.list(MemoryCategory::Blocks, m * rank);
        if rank > 0 {
            self.words(Who::One, 0, words * (NR + 16));
        }
        let few = self.list(MemoryCategory::Blocks, if m <= cpu_bf16::FEW_ROWS { words * NR } else { 0 });
        ([rounded, few], z)
    }

    /// `linear::backward`: dx where it is wanted, and the gradients of each LoRA layer.
    pub fn linear_backward(&self, m: usize, k: usize, parts: &[Part], wanted: bool) -> (Option<Tensor>, Vec<Tensor>) {
        let rank: usize = parts.iter().map(|p| p.rank).sum();
        let is_bf16 =
            self.compute == ComputeDtype::Bf16 && k.is_multiple_of(2) && parts.iter().all(|p| p.out.is_multiple_of(2));
        let _dz = self.list(MemoryCategory::Blocks, m * rank);
        let mut lefts = vec![];
        for p in parts {
            if is_bf16 {
                let _factor = self.list(MemoryCategory::Blocks, p.rank * p.out);
                lefts.push(self.left(m, p.out, p.rank).0);
            } else if p.rank > 0 {
                drop(self.list(MemoryCategory::Blocks, p.out * p.rank));
            }
        }
        let outputs: usize = parts.iter().map(|p| p.out).sum();
        let dx = wanted.then(|| self.tensor(MemoryCategory::Blocks, m * k));
        if wanted {
            let group = parts.iter().map(|p| p.stored.block().0).max().unwrap_or(1).max(NR);
            let who = self.parallel(k.div_ceil(group), m * k * outputs);
            for p in parts {
                let width = group.min(k);
                if is_bf16 {
                    self.words(who, 0, width.div_ceil(NR) * bf16::words(p.out + p.rank) * NR);
                    self.scratch(who, 1, 2 * width);
                } else {
                    self.scratch(who, 0, p.out * width);
                }
            }
        }
        drop(lefts);
        let mut lora = vec![];
        for p in parts.iter().filter(|p| p.rank > 0) {
            let da = self.tensor(MemoryCategory::Gradients, p.rank * k);
            let db_t = self.list(MemoryCategory::Blocks, p.rank * p.out);
            let db = self.tensor(MemoryCategory::Gradients, p.out * p.rank);
            drop(db_t);
            lora.extend([da, db]);
        }
        (dx, lora)
    }

    /// An operation whose only allocation is its output of rows: a norm, a rotation, an activation, a sum.
    pub fn rows(&self, class: MemoryCategory, m: usize, width: usize) -> Tensor {
        self.tensor(class, m * width)
    }

    /// `attention::forward`.
    pub fn attention(&self, lengths: &[usize], heads: attention::Heads) -> Tensor {
        let n: usize = lengths.iter().sum();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let o = self.tensor(MemoryCategory::Blocks, n * heads.q * heads.dim);
        self.scratch(self.attending(lengths, heads, 1), 0, heads.dim * longest + attention::QUERIES * longest);
        o
    }

    fn attending(&self, lengths: &[usize], heads: attention::Heads, factor: usize) -> Who {
        let cost: usize = lengths.iter().map(|t| t * t * heads.q * heads.dim).sum();
        self.parallel(lengths.len() * heads.kv, factor * cost)
    }

    /// `attention::backward`: dq, dk, dv.
    pub fn attention_backward(&self, lengths: &[usize], heads: attention::Heads) -> [Tensor; 3] {
        let n: usize = lengths.iter().sum();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let widths = [heads.q, heads.kv, heads.kv].map(|h| h * heads.dim);
        let all = widths.map(|width| self.tensor(MemoryCategory::Blocks, n * width));
        let bent = if heads.soft_cap.is_some() { longest } else { 0 };
        let scratch = 2 * heads.dim * longest + 2 * attention::QUERIES * longest + bent;
        self.scratch(self.attending(lengths, heads, 3), 0, scratch);
        all
    }

    /// `attention::decode` over caches of `tokens` each.
    pub fn attention_decode(&self, tokens: &[usize], heads: attention::Heads) -> Tensor {
        let o = self.tensor(MemoryCategory::Blocks, tokens.len() * heads.q * heads.dim);
        let cost = tokens.iter().sum::<usize>() * heads.dim * 2 * heads.q;
        let longest = tokens.iter().copied().max().unwrap_or(0);
        self.scratch(self.parallel(tokens.len() * heads.q, cost), 0, longest.min(heads.window.unwrap_or(usize::MAX)));
        o
    }

    /// `HeadBranch::of` for r rows: z, and with DoRA the scales of every row of the table.
    fn head_branch(&self, r: usize, d: usize, vocab: usize, branch: TableBranch) -> [Allocation; 2] {
        let z = self.list(MemoryCategory::Head, r * branch.rank);
        drop(self.list(MemoryCategory::Head, d * branch.rank));
        [z, self.list(MemoryCategory::Head, if branch.dora { vocab } else { 0 })]
    }

    /// `BranchSums`, and what `finish` makes of them: the branch's gradients.
    fn branch_gradients(&self, r: usize, d: usize, vocab: usize, branch: TableBranch) -> Vec<Tensor> {
        if branch.rank == 0 {
            return vec![];
        }
        let _dz = self.list(MemoryCategory::Head, RUNS * r * branch.rank);
        let db = self.tensor(MemoryCategory::Gradients, vocab * branch.rank);
        let _products =
            self.list(MemoryCategory::Head, if branch.dora { self.threads.min(RUNS) * r * STRIP } else { 0 });
        let dm = branch.dora.then(|| self.tensor(MemoryCategory::Gradients, vocab));
        let da = self.tensor(MemoryCategory::Gradients, branch.rank * d);
        [da, db].into_iter().chain(dm).collect()
    }

    /// `embedding::forward` of m tokens beside the rows themselves: its saved tensors.
    pub fn lookup_branch(&self, m: usize, d: usize, branch: TableBranch) -> Vec<Tensor> {
        if branch.rank == 0 {
            return vec![];
        }
        drop(self.list(MemoryCategory::Blocks, d * branch.rank));
        let z = self.tensor(MemoryCategory::Blocks, m * branch.rank);
        [z].into_iter().chain(branch.dora.then(|| self.tensor(MemoryCategory::Blocks, m * d))).collect()
    }

    /// `embedding::backward`: the gradients of its LoRA layer.
    pub fn lookup_backward(&self, m: usize, d: usize, vocab: usize, branch: TableBranch) -> Vec<Tensor> {
        if branch.rank == 0 {
            return vec![];
        }
        let _scaled = branch.dora.then(|| self.tensor(MemoryCategory::Blocks, m * d));
        let _sums = [m * branch.rank, branch.rank * d].map(|numbers| self.list(MemoryCategory::Blocks, numbers));
        let sizes = [branch.rank * vocab, d * branch.rank];
        let factors = sizes.map(|numbers| self.tensor(MemoryCategory::Gradients, numbers));
        factors.into_iter().chain(branch.dora.then(|| self.tensor(MemoryCategory::Gradients, d))).collect()
    }

    /// The buffers of `logprobs::strips` and of what its caller does with each strip.
    fn strips(&self, r: usize, d: usize, vocab: usize, backward: bool, rounds: bool) {
        let who = self.parallel(RUNS, if backward { 2 } else { 1 } * r * d * vocab);
        self.scratch(who, 0, r * STRIP + d * NR);
        let is_bf16 = self.compute == ComputeDtype::Bf16 && d.is_multiple_of(2);
        if is_bf16 {
            let words = bf16::words(d);
            self.words(who, 1, if r <= cpu_bf16::FEW_ROWS { 32 * words } else { words * (NR + 16) });
        } else {
            self.scratch(who, 1, 16 * d);
        }
        if backward && is_bf16 && rounds {
            // Each thread rounds its strip's gradients.
            let threads = if who == Who::All { self.threads.min(RUNS) } else { 1 };
            let _left = self.list(MemoryCategory::Head, threads * r.div_ceil(32) * 32 * bf16::words(STRIP));
            self.words(who, 1, d.div_ceil(NR) * bf16::words(STRIP) * NR);
            self.scratch(who, 2, 2 * d);
        } else if backward {
            self.scratch(who, 1, STRIP.min(vocab) * d);
        }
    }

    /// `logprobs::Hidden::of`.
    fn hidden(&self, r: usize, d: usize) -> Allocation {
        let is_bf16 = self.compute == ComputeDtype::Bf16 && d.is_multiple_of(2);
        let rounded = r.div_ceil(32) * 32 + if r <= cpu_bf16::FEW_ROWS { NR } else { 0 };
        self.list(MemoryCategory::Head, if is_bf16 { rounded * bf16::words(d) } else { 0 })
    }

    /// `logprobs::forward`: the statistics of r targets.
    pub fn head(&self, r: usize, d: usize, vocab: usize, branch: TableBranch) -> Allocation {
        let _branch = self.head_branch(r, d, vocab, branch);
        let _hidden = self.hidden(r, d);
        let runs = self.ledger.take(MemoryCategory::Head, RUNS * r * RUN_BYTES);
        self.strips(r, d, vocab, false, true);
        // Four lists that grow by doubling.
        let stats = self.list(MemoryCategory::Head, 4 * r.next_power_of_two().max(4));
        drop(runs);
        stats
    }

    /// `logprobs::backward`: dL/dh of r rows, out of one sum per run, and the gradients of the LoRA layer.
    pub fn head_backward(&self, r: usize, d: usize, vocab: usize, branch: TableBranch) -> (Tensor, Vec<Tensor>) {
        let _branch = self.head_branch(r, d, vocab, branch);
        let _hidden = self.hidden(r, d);
        let partial = self.list(MemoryCategory::Head, RUNS * r * d);
        let gradients = self.branch_gradients(r, d, vocab, branch);
        self.strips(r, d, vocab, true, true);
        let result = self.tensor(MemoryCategory::Head, r * d);
        drop(partial);
        (result, gradients)
    }

    /// `kl::forward` of r rows against r others.
    pub fn divergence(&self, r: usize, d: usize, vocab: usize, branch: TableBranch) -> Allocation {
        let _branches = [(); 2].map(|()| self.head_branch(r, d, vocab, branch));
        let _both = (self.list(MemoryCategory::Head, 2 * r * d), self.hidden(2 * r, d));
        // Eight runs' sums of five numbers per position, and each thread's own.
        let sums = self.list(MemoryCategory::Head, (RUNS + 1) * r * 5);
        self.strips(2 * r, d, vocab, false, true);
        let kept = self.list(MemoryCategory::Head, 3 * r.next_power_of_two().max(4));
        drop(sums);
        kept
    }

    /// `kl::backward`.
    pub fn divergence_backward(&self, r: usize, d: usize, vocab: usize, branch: TableBranch) -> Tensor {
        let _branches = [(); 2].map(|()| self.head_branch(r, d, vocab, branch));
        let _both = (self.list(MemoryCategory::Head, 2 * r * d), self.hidden(2 * r, d));
        let partial = self.list(MemoryCategory::Head, RUNS * r * d);
        let _gradients = self.branch_gradients(r, d, vocab, branch);
        self.strips(2 * r, d, vocab, true, false);
        let result = self.tensor(MemoryCategory::Head, r * d);
        drop(partial);
        result
    }
}

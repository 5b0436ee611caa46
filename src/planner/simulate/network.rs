//! Allocations of `model::base` and `model::roles`: passes over all blocks, log-probabilities, gradients of policy and value
//! model, generation.
//! Read stages.rs next.

use crate::model::block::Recompute;
use crate::planner::sim_allocator::{Allocation, MemoryCategory};
use crate::planner::simulate::block::{Kept, Layer};
use crate::planner::simulate::ops::{Simulator, TableBranch, Tensor};
use crate::planner::simulate::shape::{Branches, Network};

/// A network through an adapter, as a role sees it.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The simulated allocator's user.
    pub walk: &'a Simulator,
    /// The network.
    pub net: &'a Network,
    /// The branches; `None` is the bare base.
    pub branches: Option<&'a Branches>,
}

/// Saved tensors of a training pass.
struct Tape {
    kept: Vec<Kept>,
    /// Output of the last block.
    last: Tensor,
    /// Saved tensor of the LoRA layer on the token embedding.
    lookup: Vec<Tensor>,
}

/// Gradients of an adapter: one tensor per factor.
pub type Gradients = Vec<Tensor>;

impl View<'_> {
    fn layer(&self, index: usize) -> Layer<'_> {
        Layer { walk: self.walk, net: self.net, branches: self.branches, index }
    }

    /// The LoRA layer on lm_head.
    fn table(&self) -> TableBranch {
        self.branches.map_or_else(TableBranch::default, |b| TableBranch { rank: b.table, dora: b.dora })
    }

    /// The LoRA layer on the token embedding.
    fn tokens(&self) -> TableBranch {
        self.branches.map_or_else(TableBranch::default, |b| TableBranch { rank: b.tokens, dora: b.dora })
    }

    /// The exact KL of r rows to another policy's.
    pub fn divergence(&self, r: usize) -> Allocation {
        let (_, e, vocab) = self.sizes();
        self.walk.divergence(r, e, vocab, self.table())
    }

    fn sizes(&self) -> (usize, usize, usize) {
        let c = &self.net.config;
        (c.hidden_size, c.embedding_width, c.vocab_size)
    }

    /// `Base::embed`.
    fn embed(&self, m: usize) -> Tensor {
        let (d, e, _) = self.sizes();
        let rows = |width: usize| self.walk.rows(MemoryCategory::Blocks, m, width);
        let mut x = rows(e);
        if self.net.config.embedding_multiplier != 1.0 {
            x = rows(e);
        }
        if d != e {
            x = rows(d);
        }
        if self.net.config.learned_positions.is_some() {
            let _table = rows(d);
            x = rows(d);
        }
        x
    }

    /// `Base::finish`.
    fn finish(&self, m: usize, x: Tensor) -> Tensor {
        let (d, e, _) = self.sizes();
        let h = if self.net.config.final_norm { self.walk.rows(MemoryCategory::Head, m, d) } else { x };
        if d != e { self.walk.rows(MemoryCategory::Head, m, e) } else { h }
    }

    /// `Base::hidden`: without saved tensors.
    pub fn hidden(&self, lengths: &[usize]) -> Tensor {
        let m = lengths.iter().sum();
        let mut x = self.embed(m);
        for layer in 0..self.net.config.num_hidden_layers {
            x = self.layer(layer).forward(lengths, &x);
        }
        self.finish(m, x)
    }

    /// Log-probabilities of r targets: `Policy::rows` and `logprobs_of`.
    pub fn logprobs(&self, lengths: &[usize], r: usize) -> (Tensor, Allocation) {
        let (_, e, vocab) = self.sizes();
        let hidden = self.hidden(lengths);
        let rows = self.walk.rows(MemoryCategory::Head, r, e);
        drop(hidden);
        let stats = self.walk.head(r, e, vocab, self.table());
        (rows, stats)
    }

    /// `ValueModel::values` at r rows.
    pub fn values(&self, lengths: &[usize], r: usize) {
        let hidden = self.hidden(lengths);
        let _rows = self.walk.rows(MemoryCategory::Head, r, self.sizes().1);
        drop(hidden);
    }

    fn hidden_kept(&self, lengths: &[usize], branches: &Branches, checkpoint: Recompute) -> (Tensor, Tape) {
        let m = lengths.iter().sum();
        let layers = self.net.config.num_hidden_layers;
        let lowest = branches.ranks.iter().position(|row| row.iter().any(|&r| r > 0)).unwrap_or(layers);
        let first = if branches.tokens > 0 { 0 } else { lowest };
        let (mut x, mut kept) = (self.embed(m), vec![]);
        let lookup = self.walk.lookup_branch(m, self.net.config.embedding_width, self.tokens());
        for layer in 0..layers {
            if layer < first {
                x = self.layer(layer).forward(lengths, &x);
            } else {
                let (y, k) = self.layer(layer).forward_kept(lengths, x, checkpoint);
                kept.push(k);
                x = y;
            }
        }
        let h = self.finish(m, x.clone());
        (h, Tape { kept, last: x, lookup })
    }

    /// `Base::backward` of dh.
    fn backward(&self, lengths: &[usize], tape: Tape, dh: Tensor) -> Gradients {
        let (d, e, vocab) = self.sizes();
        let Tape { kept, last, lookup } = tape;
        let m: usize = lengths.iter().sum();
        let mut grads = vec![];
        let mut dy = dh;
        if d != e {
            dy = self.walk.rows(MemoryCategory::Blocks, m, d);
        }
        if self.net.config.final_norm {
            dy = self.walk.rows(MemoryCategory::Blocks, m, d);
        }
        drop(last);
        let first = self.net.config.num_hidden_layers - kept.len();
        for (i, kept) in kept.into_iter().enumerate().rev() {
            match self.layer(first + i).backward(lengths, kept, dy, i > 0 || self.tokens().rank > 0, &mut grads) {
                Some(dx) => dy = dx,
                None => break,
            }
        }
        grads.extend(self.walk.lookup_backward(m, e, vocab, self.tokens()));
        drop(lookup);
        grads
    }

    /// `Policy::gradients_against`: r targets; `against` another policy's hidden states, and whether their divergence is
    /// trained on.
    pub fn policy_gradients(
        &self,
        lengths: &[usize],
        r: usize,
        against: Option<bool>,
        checkpoint: Recompute,
    ) -> Gradients {
        let (Some(branches), (_, e, vocab)) = (self.branches, self.sizes()) else { return vec![] };
        let m: usize = lengths.iter().sum();
        let (hidden, tape) = self.hidden_kept(lengths, branches, checkpoint);
        let rows = self.walk.rows(MemoryCategory::Head, r, e);
        drop(hidden);
        let stats = self.walk.head(r, e, vocab, self.table());
        let divergence = against.map(|_| self.divergence(r));
        let (mut d_rows, of_table) = self.walk.head_backward(r, e, vocab, self.table());
        if against == Some(true) {
            let more = self.walk.divergence_backward(r, e, vocab, self.table());
            d_rows = self.walk.rows(MemoryCategory::Head, r, e);
            drop(more);
        }
        drop((rows, divergence));
        let dh = self.walk.rows(MemoryCategory::Head, m, e);
        drop(d_rows);
        let mut grads = self.backward(lengths, tape, dh);
        drop(stats);
        grads.extend(of_table);
        grads
    }

    /// `ValueModel::gradients` at r rows.
    pub fn scorer_gradients(&self, lengths: &[usize], r: usize, checkpoint: Recompute) -> Gradients {
        let (Some(branches), (_, e, _)) = (self.branches, self.sizes()) else { return vec![] };
        let m: usize = lengths.iter().sum();
        let (hidden, tape) = self.hidden_kept(lengths, branches, checkpoint);
        let picked = self.walk.rows(MemoryCategory::Head, r, e);
        drop(hidden);
        let d_rows = self.walk.rows(MemoryCategory::Head, r, e);
        drop(picked);
        let dh = self.walk.rows(MemoryCategory::Head, m, e);
        drop(d_rows);
        let mut grads = self.backward(lengths, tape, dh);
        grads.push(self.walk.rows(MemoryCategory::Gradients, 1, e));
        grads
    }

    /// `generate`: prompts of these lengths, of which each `shared` in a row are one, `new` tokens each. The last step is the
    /// largest; those before it take as much in their scratch and less in nothing.
    pub fn generate(&self, lengths: &[usize], shared: usize, new: usize) {
        let (d, e, vocab) = self.sizes();
        let s = lengths.len();
        let prompts: Vec<usize> = lengths.iter().copied().step_by(shared.max(1)).collect();
        let mut cache = vec![];
        let mut x = self.embed(prompts.iter().sum());
        for layer in 0..self.net.config.num_hidden_layers {
            x = self.layer(layer).prefill(&prompts, lengths, &x, new, &mut cache);
        }
        let last = self.walk.rows(MemoryCategory::Head, s, d);
        drop(x);
        let mut hidden = self.finish(s, last);
        // One row's weights are drawn from at a time.
        let chooser = self.walk.rows(MemoryCategory::Head, 1, vocab);
        for step in [1, new.max(2) - 1] {
            let logits = self.logits(s, e, vocab);
            drop(logits);
            let tokens: Vec<usize> = lengths.iter().map(|t| t + step).collect();
            let mut x = self.embed(s);
            for layer in 0..self.net.config.num_hidden_layers {
                x = self.layer(layer).decode(&tokens, &x);
            }
            hidden = self.finish(s, x);
        }
        drop((hidden, chooser, cache));
    }

    /// `Base::logits`.
    fn logits(&self, s: usize, e: usize, vocab: usize) -> Tensor {
        let table = self.table();
        let part = crate::planner::simulate::ops::Part {
            out: vocab,
            rank: table.rank,
            dora: table.dora,
            stored: self.net.table,
        };
        let (mut out, _) = self.walk.linear(s, e, &[part]);
        let logits = out.swap_remove(0).becomes(MemoryCategory::Head);
        let c = &self.net.config;
        if c.logits_multiplier == 1.0 && c.logits_soft_cap.is_none() {
            return logits;
        }
        self.walk.rows(MemoryCategory::Head, s, vocab)
    }

    /// One token through all layers: `Model::of` does this to find weights that are NaN or infinite.
    pub fn look(&self) {
        let (_, e, vocab) = self.sizes();
        let h = self.hidden(&[1]);
        let _logits = self.logits(1, e, vocab);
        drop(h);
    }
}

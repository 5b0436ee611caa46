//! Time on a device by kernel: every launch and product between two marks in the device's order of work. It does not depend
//! on the kernels' texts. Read `machine.rs` for the marks.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::machine::Product;
use super::{Device, lock};

/// What the launches of one kernel took, or the products of one shape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelTime {
    /// The kernel's name in the text; of products `product_f16_f32 m x n x k`.
    pub name: String,
    /// Launches.
    pub calls: usize,
    /// Seconds on the device, from one mark to the next. A few microseconds of each launch belong to the marks.
    pub seconds: f64,
    /// Bytes of the operands, each counted once a launch: at least these cross the memory bus, unless a cache holds them. Of a
    /// key-value cache and an embedding, what the kernel uses counts ([`Matrix::counts_as`](super::Matrix)).
    pub bytes: f64,
    /// Multiplications and additions, of products alone.
    pub operations: f64,
    /// The part of `bytes` that belongs to launches which run beside the order of work while launches are not timed.
    pub bytes_beside: f64,
}

/// What a launch or product does.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cost {
    /// As in [`KernelTime`].
    pub operations: f64,
    /// As in [`KernelTime`].
    pub bytes: f64,
    /// It runs beside the order of work while launches are not timed.
    pub could_be_beside: bool,
}

/// Marks that are not read yet; reading waits for the device.
const MOST_PENDING: usize = 4096;

#[derive(Default)]
pub(super) struct Profile {
    totals: BTreeMap<String, KernelTime>,
    pending: Vec<(String, u64, u64)>,
}

thread_local! {
    /// Operands that a thread asked for last, as (address, bytes), and where the next one goes. No kernel has so many. Every launch
    /// notes some, profiled or not, so one entry is written and nothing else touched.
    static OPERANDS: [Cell<(u64, usize)>; 64] = const { [const { Cell::new((0, 0)) }; 64] };
    static NEXT: Cell<usize> = const { Cell::new(0) };
}

/// Notes an operand that a kernel will get.
pub(super) fn note_operand(address: u64, bytes: usize) {
    let next = NEXT.get();
    OPERANDS.with(|last| last[next].set((address, bytes)));
    NEXT.set((next + 1) % 64);
}

/// Bytes of the operands whose addresses are among the words of a kernel's arguments; from where an address points to the end.
pub(super) fn bytes_of_operands(words: impl Iterator<Item = u64>) -> usize {
    let (next, last) = (NEXT.get(), OPERANDS.with(|last| last.each_ref().map(Cell::get)));
    let newest = |word: u64| {
        let all = last[..next].iter().rev().chain(last[next..].iter().rev());
        all.map(|&(address, bytes)| {
            (address + bytes as u64).saturating_sub(word.max(1)).min(bytes as u64) * u64::from(address <= word)
        })
        .find(|&bytes| bytes > 0)
    };
    // An address that stands twice, as where a group of maps has fewer than it may have, is one operand.
    let distinct: BTreeSet<u64> = words.collect();
    distinct.into_iter().filter_map(newest).sum::<u64>() as usize
}

/// Multiplications and additions of a product, and the bytes of its operands.
pub(super) fn of_product(p: &Product) -> Cost {
    let [m, n, k, batch] = [p.m, p.n, p.k, p.batch].map(|d| d as f64);
    // A factor without a distance to the next is one for the whole batch.
    let times = |place: &super::machine::Place| if place.next == 0 { 1.0 } else { batch };
    let bytes = |place: &super::machine::Place, numbers: f64| numbers * times(place) * place.element.bytes() as f64;
    let read = if p.beta == 0.0 { 1.0 } else { 2.0 };
    let bytes = bytes(&p.x, m * k) + bytes(&p.w, k * n) + read * bytes(&p.y, m * n);
    Cost { operations: 2.0 * m * n * k * batch, bytes, could_be_beside: false }
}

impl Device {
    /// Begins to time every launch. Until [`Device::end_profile`], work takes longer and memory is unaffected.
    ///
    /// # Errors
    /// If earlier work failed.
    pub fn begin_profile(&self) -> Result<()> {
        self.synchronize()?;
        *lock(&self.0.profile) = Some(Profile::default());
        Ok(())
    }

    /// Ends the timing and returns what each kernel took, the longest first; nothing if it was not begun.
    ///
    /// # Errors
    /// If work failed.
    pub fn end_profile(&self) -> Result<Vec<KernelTime>> {
        let Some(mut profile) = lock(&self.0.profile).take() else { return Ok(vec![]) };
        self.read_marks(&mut profile)?;
        let mut all: Vec<KernelTime> = profile.totals.into_values().collect();
        all.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(all)
    }

    /// Whether launches are being timed.
    pub fn is_profiled(&self) -> bool {
        lock(&self.0.profile).is_some()
    }

    /// A mark before a launch, where launches are timed.
    pub(super) fn mark(&self) -> Result<Option<u64>> {
        if self.is_profiled() { self.0.machine.mark().map(Some) } else { Ok(None) }
    }

    /// Counts the work since the mark `from`, if there is one.
    pub(super) fn timed(&self, from: Option<u64>, name: impl FnOnce() -> String, cost: Cost) -> Result<()> {
        let Some(from) = from else { return Ok(()) };
        let to = self.0.machine.mark()?;
        let mut guard = lock(&self.0.profile);
        // Another thread ended the timing meanwhile: nobody asks for this one.
        let Some(profile) = guard.as_mut() else { return self.0.machine.elapsed(from, to).map(drop) };
        let name = name();
        let total = profile
            .totals
            .entry(name.clone())
            .or_insert_with(|| KernelTime { name: name.clone(), ..KernelTime::default() });
        total.calls += 1;
        total.bytes += cost.bytes;
        total.operations += cost.operations;
        total.bytes_beside += if cost.could_be_beside { cost.bytes } else { 0.0 };
        profile.pending.push((name, from, to));
        if profile.pending.len() >= MOST_PENDING { self.read_marks(profile) } else { Ok(()) }
    }

    fn read_marks(&self, profile: &mut Profile) -> Result<()> {
        for (name, from, to) in profile.pending.drain(..) {
            let seconds = self.0.machine.elapsed(from, to)?;
            if let Some(total) = profile.totals.get_mut(&name) {
                total.seconds += seconds;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Element, Gemm};

    #[test]
    fn products_are_counted_by_shape_with_their_operations_and_the_bytes_of_their_operands() {
        let device = Device::dry();
        let [x, w] = [(3, 5), (7, 5)].map(|(rows, cols)| device.matrix(Element::F32, rows, cols).unwrap());
        let y = device.matrix(Element::F32, 3, 7).unwrap();
        let multiply = |beta: f32| {
            let gemm = Gemm {
                m: 3,
                n: 7,
                k: 5,
                batch: 1,
                x: x.whole(),
                x_transposed: false,
                w: w.whole(),
                w_transposed: true,
                y: y.whole(),
                alpha: 1.0,
                beta,
            };
            device.gemm(gemm).unwrap();
        };
        multiply(0.0);
        assert!(!device.is_profiled());
        device.begin_profile().unwrap();
        (0..MOST_PENDING).for_each(|_| multiply(0.0));
        multiply(1.0);
        let found = device.end_profile().unwrap();
        assert_eq!(found.len(), 1);
        let calls = MOST_PENDING + 1;
        assert_eq!((found[0].name.as_str(), found[0].calls), ("product_f32_f32 3x7x5", calls));
        assert_eq!(found[0].operations, (2 * 3 * 7 * 5 * calls) as f64);
        // Results that are added to are read, too.
        assert_eq!(found[0].bytes, (4 * (15 + 35 + 21) * calls + 4 * 21) as f64);
        assert!(found[0].seconds > 0.0 && found[0].seconds < 60.0, "{}", found[0].seconds);
        assert_eq!(device.end_profile().unwrap(), []);
    }

    #[test]
    fn operands_are_known_by_their_addresses_whatever_was_asked_for_between() {
        note_operand(1 << 20, 512);
        note_operand(2 << 20, 1024);
        (0..40).for_each(|i| note_operand((9 + i) << 20, 8));
        // A scalar is no address, an absent operand is none, a part is what follows it, and an address that stands twice is one.
        let words = [(1 << 20) + 12, 7, 0, 2 << 20, 2 << 20];
        assert_eq!(bytes_of_operands(words.into_iter()), 500 + 1024);
        // The same address again, as an operand of another size.
        note_operand(2 << 20, 64);
        assert_eq!(bytes_of_operands([2 << 20].into_iter()), 64);
    }

    #[test]
    fn a_batch_counts_a_factor_that_all_its_products_share_once() {
        let place = |next| super::super::machine::Place { address: 0, element: Element::F16, row: 4, next };
        let product = Product {
            m: 2,
            n: 3,
            k: 4,
            batch: 10,
            x: place(8),
            x_transposed: false,
            w: place(0),
            w_transposed: false,
            y: place(6),
            alpha: 1.0,
            beta: 0.0,
        };
        let bytes = 2.0 * (80.0 + 12.0 + 60.0);
        assert_eq!(of_product(&product), Cost { operations: 480.0, bytes, could_be_beside: false });
    }
}

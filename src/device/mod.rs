//! The GPU path's device layer: `Device`, the checked face of a machine, and `Matrix`, the one handle for its memory.
//! Three machines stand behind it: `cuda` is a card, `emulated` runs the card's kernels on the CPU and checks them, and
//! `dry` only counts memory. It does not depend on operations or models. Read `matrix.rs` beside it next, then `machine.rs`.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};

mod array;
mod beside;
pub mod cuda;
mod downloads;
pub mod dry;
pub mod emulated;
mod graph;
pub mod kernels;
mod landing;
pub mod machine;
mod matrix;
mod pass;
mod pinned;
pub mod profile;
mod resident;
pub mod select;
#[doc(hidden)]
pub mod testing;

pub use array::Array;
pub use beside::Beside;
pub use graph::{Inputs, Recording};
pub use landing::{HostCopy, Landing};
pub use machine::{Element, Info, LibraryInfo, Machine};
pub use matrix::{Matrix, Ptr};
pub use pass::Pass;
pub use pinned::Pinned;
pub use resident::Resident;
pub use select::{DeviceChoice, Selected, select};

use machine::{Launch, Place, Product, Refusal};

/// Memory in use. Every allocation counts as a multiple of 512 bytes, as the card's pool counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in use now.
    pub live: usize,
    /// The most bytes that were in use at one time.
    pub peak: usize,
    /// How many allocations there were.
    pub allocations: usize,
}

/// What was issued to a machine since it was opened. A pass over a large network costs about this many times the fixed time
/// of each: some microseconds of the host a launch, and all of the machine's work so far a download.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Kernels, without those of replays.
    pub launches: usize,
    /// Those of them that ran beside the order of work.
    pub beside: usize,
    /// Recorded launches that were issued again as one piece.
    pub replays: usize,
    /// Calls of the matrix product.
    pub products: usize,
    /// Copies to the machine.
    pub uploads: usize,
    /// Copies to the host. Each waits until the machine has done everything before it.
    pub downloads: usize,
    /// Bytes that were copied to the machine and from it.
    pub copied: usize,
    /// Bytes that were copied to the machine beside the order of work, from pinned memory: layers that are streamed.
    pub streamed: usize,
    /// Bytes that were copied to pinned memory, and back, beside the order of work: blocks' inputs.
    pub spilled: usize,
}

impl std::ops::Sub for Work {
    type Output = Self;
    fn sub(self, before: Self) -> Self {
        Self {
            launches: self.launches - before.launches,
            beside: self.beside - before.beside,
            replays: self.replays - before.replays,
            products: self.products - before.products,
            uploads: self.uploads - before.uploads,
            downloads: self.downloads - before.downloads,
            copied: self.copied - before.copied,
            streamed: self.streamed - before.streamed,
            spilled: self.spilled - before.spilled,
        }
    }
}

/// The machine has too little memory. Recognise it by `error.downcast_ref::<OutOfMemory>()`.
#[derive(Clone, Debug)]
pub struct OutOfMemory {
    /// Bytes that were asked for.
    pub wanted: usize,
    /// Bytes that this process used through the device.
    pub live: usize,
    /// The most bytes that it used.
    pub peak: usize,
    /// Bytes that the machine had left, where it told.
    pub free: Option<u64>,
    /// The machine.
    pub device: String,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
        write!(f, "{} is out of memory: {} more were wanted", self.device, mib(self.wanted as u64))?;
        write!(f, " with {} in use (at most {})", mib(self.live as u64), mib(self.peak as u64))?;
        if let Some(free) = self.free {
            write!(f, " and {} free", mib(free))?;
        }
        f.write_str("; lower micro_batch_size, set checkpoint = \"block\", shorten max_length, or quantize the base")
    }
}

impl std::error::Error for OutOfMemory {}

type Watch = Box<dyn FnMut(Usage) + Send>;

struct Shared {
    machine: Arc<dyn Machine>,
    usage: Mutex<Usage>,
    work: Mutex<Work>,
    watch: Mutex<Option<Watch>>,
    indices: Mutex<pass::Indices>,
    profile: Mutex<Option<profile::Profile>>,
    graph: Mutex<graph::State>,
}

/// A machine, ready for use. Clones are the same machine, and any thread may use them.
#[derive(Clone)]
pub struct Device(Arc<Shared>);

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}

/// A thread that panicked while it held the lock leaves plain numbers behind, and those stay valid.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// The checked face of a machine.
    pub fn new(machine: Arc<dyn Machine>) -> Self {
        let (usage, work, watch, indices, profile, graph) = Default::default();
        Self(Arc::new(Shared { machine, usage, work, watch, indices, profile, graph }))
    }

    /// The card with this ordinal. Errors name what is missing and how to install it.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self::new(Arc::new(cuda::Cuda::open(ordinal)?)))
    }

    /// The CPU, which runs the card's kernels slowly and checks them. It needs a C++ compiler.
    pub fn emulated() -> Result<Self> {
        Ok(Self::new(Arc::new(emulated::Emulated::open()?)))
    }

    /// A machine that computes nothing and counts memory.
    pub fn dry() -> Self {
        Self::new(Arc::new(dry::Dry::default()))
    }

    /// The machine's name, for messages.
    pub fn name(&self) -> String {
        self.0.machine.name()
    }

    /// The machine in words.
    pub fn info(&self) -> Result<Info> {
        self.0.machine.info()
    }

    /// Can kernels and products use this element here? Cards before sm_80 have no bf16.
    pub fn supports(&self, element: Element) -> bool {
        self.0.machine.supports(element)
    }

    /// Are both the same machine?
    pub fn ptr_eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Memory in use, the most there was, and the number of allocations.
    pub fn usage(&self) -> Usage {
        *lock(&self.0.usage)
    }

    /// What was issued so far.
    pub fn work(&self) -> Work {
        *lock(&self.0.work)
    }

    fn count(&self, count: impl FnOnce(&mut Work)) {
        count(&mut lock(&self.0.work));
    }

    /// Memory is counted and nothing is computed: a plan needs no numbers.
    pub fn is_dry(&self) -> bool {
        self.0.machine.is_dry()
    }

    /// Counts the peak from what is in use now.
    pub fn reset_peak(&self) {
        let mut usage = lock(&self.0.usage);
        usage.peak = usage.live;
    }

    /// Calls `f` after every allocation from now on; `f` must not allocate on this device. Tests compare two machines
    /// so.
    pub fn watch(&self, f: impl FnMut(Usage) + Send + 'static) {
        *lock(&self.0.watch) = Some(Box::new(f));
    }

    /// Waits until all issued work is done, and reports its errors.
    pub fn synchronize(&self) -> Result<()> {
        self.0.machine.synchronize()
    }

    /// Starts a kernel: `A` names it and fixes the size of its blocks, `variant` adds suffixes to the name. A grid with
    /// a dimension of 0 is no work and succeeds.
    ///
    /// Every `Ptr` of the arguments comes from a matrix of this device that is alive during the call. The memory may be
    /// given back right after it, because the machine keeps the order of work.
    pub fn launch<A: Arguments>(&self, variant: Variant, grid: [u32; 3], arguments: A) -> Result<()> {
        self.prepare(variant, grid, &arguments, |launch| self.launch_in_order(launch, false)).map(drop)
    }

    fn launch_in_order(&self, launch: &Launch<'_>, could_be_beside: bool) -> Result<()> {
        let from = self.mark()?;
        // SAFETY: `Arguments` promises the struct's fields; matrices of this device are the only source of addresses,
        // and the caller has checked their lengths by `Matrix::input` and `Matrix::output`.
        unsafe { self.0.machine.launch(launch) }?;
        self.note(launch);
        if from.is_none() {
            return Ok(());
        }
        // SAFETY: the struct has so many bytes; words may lie at any address.
        let word = |i: usize| unsafe { launch.arguments.cast::<u64>().add(i).read_unaligned() };
        let bytes = profile::bytes_of_operands((0..launch.bytes / 8).map(word));
        let cost = profile::Cost { bytes: bytes as f64, could_be_beside, ..profile::Cost::default() };
        self.timed(from, || launch.kernel.to_owned(), cost)
    }

    /// Checks a launch and calls `start` with it, unless it is no work.
    fn prepare<A: Arguments, T>(
        &self,
        variant: Variant,
        grid: [u32; 3],
        arguments: &A,
        start: impl FnOnce(&Launch<'_>) -> Result<T>,
    ) -> Result<Option<T>> {
        if grid.contains(&0) {
            return Ok(None);
        }
        let kernel = variant.of_kernel(A::NAME);
        let threads_fit = A::BLOCK > 0 && A::BLOCK <= 1024 && A::BLOCK.is_multiple_of(32);
        ensure!(threads_fit, "kernel {kernel}: blocks of {} threads are no multiple of 32 up to 1,024", A::BLOCK);
        let grid_fits = grid[0] < 1 << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16;
        ensure!(grid_fits, "kernel {kernel}: a grid of {grid:?} is above what cards allow, [2147483647, 65535, 65535]");
        ensure!(size_of::<A>() <= 4096, "kernel {kernel}: arguments of {} bytes are above 4,096", size_of::<A>());
        self.count(|work| work.launches += 1);
        let arguments = (&raw const *arguments).cast();
        let launch = Launch { kernel: &kernel, grid, block: A::BLOCK, arguments, bytes: size_of::<A>() };
        start(&launch).map(Some).with_context(|| format!("kernel {kernel} on {}", self.name()))
    }

    /// Matrix products, see `Gemm`. A product whose operands leave their matrix or have unsuitable types is refused.
    pub fn gemm(&self, gemm: Gemm<'_>) -> Result<()> {
        let product = self.product(&gemm)?;
        if gemm.m == 0 || gemm.n == 0 || gemm.batch == 0 {
            return Ok(());
        }
        self.count(|work| work.products += 1);
        let from = self.mark()?;
        // SAFETY: the operands are alive and lie inside of their matrices.
        unsafe { self.machine().gemm(&product) }.with_context(|| {
            let (x, w) = (if gemm.x_transposed { "x^T" } else { "x" }, if gemm.w_transposed { "w^T" } else { "w" });
            let (m, n, k, batch) = (gemm.m, gemm.n, gemm.k, gemm.batch);
            format!("{batch} products {x} {w} with m = {m}, n = {n}, k = {k} on {}", self.name())
        })?;
        let (x, y) = (product.x.element, product.y.element);
        let batch = if gemm.batch == 1 { String::new() } else { format!("{} of ", gemm.batch) };
        let name = || format!("product_{x}_{y} {batch}{}x{}x{}", gemm.m, gemm.n, gemm.k);
        self.timed(from, name, profile::of_product(&product))
    }

    fn product(&self, gemm: &Gemm<'_>) -> Result<Product> {
        let Gemm { m, n, k, batch, x_transposed, w_transposed, alpha, beta, .. } = *gemm;
        let (x, w, y) = (gemm.x.matrix.element(), gemm.w.matrix.element(), gemm.y.matrix.element());
        ensure!(x == w && x.is_float(), "a product of {x} and {w}: both operands need one type of f32, bf16, f16");
        ensure!(y == Element::F32 || y == x, "a product of {x} into {y}: the result needs f32 or the operands' type");
        ensure!(self.supports(x), "{} has no products of {x}; use f32 or f16", self.name());
        ensure!(k > 0 || m * n * batch == 0, "a product over k = 0 terms");
        let shape = |transposed, rows, cols| if transposed { (cols, rows) } else { (rows, cols) };
        Ok(Product {
            m,
            n,
            k,
            batch,
            x: self.place("x", &gemm.x, shape(x_transposed, m, k), batch)?,
            x_transposed,
            w: self.place("w", &gemm.w, shape(w_transposed, k, n), batch)?,
            w_transposed,
            y: self.place("y", &gemm.y, (m, n), batch)?,
            alpha,
            beta,
        })
    }

    fn place(&self, what: &str, at: &Strided<'_>, (rows, cols): (usize, usize), batch: usize) -> Result<Place> {
        let (matrix, len) = (at.matrix, at.matrix.len());
        ensure!(
            self.ptr_eq(matrix.device()),
            "gemm: {what} lies on {}, not on {}",
            matrix.device().name(),
            self.name()
        );
        ensure!(rows.max(cols).max(at.row).max(batch) < 1 << 31, "gemm: {what} has a dimension of 2^31 or more");
        ensure!(cols <= at.row || rows <= 1, "gemm: {what} has rows of {cols} numbers at a distance of {}", at.row);
        if rows * cols * batch > 0 {
            let reach = (batch - 1) * at.next + (rows - 1) * at.row + cols + at.offset;
            ensure!(reach <= len, "gemm: {batch} x ({rows}, {cols}) of {what} reach to number {reach} of {len}");
        }
        let address = matrix.address() + (at.offset * matrix.element().bytes()) as u64;
        Ok(Place { address, element: matrix.element(), row: at.row.max(cols), next: at.next })
    }

    /// So many bytes, rounded up; the ledger knows of them afterwards. Returns the address, the rounded size, and the
    /// recording that the memory belongs to.
    fn allocate(&self, bytes: usize) -> Result<(u64, usize, Option<Arc<graph::Pool>>)> {
        let bytes = bytes.max(1).checked_next_multiple_of(512).context("an allocation beyond the address space")?;
        let pool = self.recording_pool();
        if let Some(address) = pool.as_ref().and_then(|pool| pool.take(bytes)) {
            return Ok((address, bytes, pool));
        }
        let address = match self.0.machine.allocate(bytes) {
            Ok(address) => address,
            Err(Refusal::Full { free }) => {
                let Usage { live, peak, .. } = self.usage();
                return Err(OutOfMemory { wanted: bytes, live, peak, free, device: self.name() }.into());
            }
            Err(Refusal::Failed(error)) => {
                return Err(error.context(format!("allocation of {bytes} bytes on {}", self.name())));
            }
        };
        let usage = {
            let mut usage = lock(&self.0.usage);
            usage.live += bytes;
            usage.peak = usage.peak.max(usage.live);
            usage.allocations += 1;
            *usage
        };
        if let Some(watch) = lock(&self.0.watch).as_mut() {
            watch(usage);
        }
        if let Some(pool) = &pool {
            pool.add(address, bytes);
        }
        Ok((address, bytes, pool))
    }

    /// For the destructor of memory.
    fn give_back(&self, address: u64, bytes: usize) {
        // SAFETY: the last matrix with this memory is gone.
        unsafe { self.0.machine.free(address, bytes) };
        lock(&self.0.usage).live -= bytes;
    }

    /// The machine for work other than launches, which a recording cannot hold.
    fn machine(&self) -> &dyn Machine {
        self.note_other_work();
        &*self.0.machine
    }
}

/// The struct that a kernel takes by value.
///
/// # Safety
/// The type is `repr(C)` and has the same fields in the same order as the struct in the kernels' text. The emulated
/// machine compares the sizes of both, and the sizes of blocks, at every launch.
pub unsafe trait Arguments {
    /// The kernel's name without the variant's suffixes.
    const NAME: &'static str;
    /// Threads of a block.
    const BLOCK: u32;
}

/// Which kernel of a family: suffixes of its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variant(String);

impl Variant {
    /// The name as it is.
    pub const NONE: Self = Self(String::new());

    /// `norm_forward` with `of(&[F32, Bf16])` is `norm_forward_f32_bf16`.
    pub fn of(elements: &[Element]) -> Self {
        Self(elements.iter().fold(String::new(), |name, element| name + "_" + element.name()))
    }

    /// `unpack` with `named("q4_k_bf16")` is `unpack_q4_k_bf16`.
    pub fn named(name: &str) -> Self {
        Self(format!("_{name}"))
    }

    fn of_kernel(&self, name: &str) -> String {
        format!("{name}{}", self.0)
    }
}

/// y (m, n) = alpha x (m, k) w (k, n) + beta y, `batch` times, row-major, with sums in f32. x and w have one type of
/// f32, bf16 and f16; y has f32 or that type. With beta = 0, y is not read.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    /// Rows of x and y.
    pub m: usize,
    /// Columns of y.
    pub n: usize,
    /// Columns of x.
    pub k: usize,
    /// Number of products.
    pub batch: usize,
    /// The left factor.
    pub x: Strided<'a>,
    /// x is stored as (k, m) and read transposed, as dA = dz^T x needs it.
    pub x_transposed: bool,
    /// The right factor.
    pub w: Strided<'a>,
    /// w is stored as (n, k) and read transposed, as y = x W^T needs it.
    pub w_transposed: bool,
    /// The result.
    pub y: Strided<'a>,
    /// The factor of the product.
    pub alpha: f32,
    /// The factor of what y held.
    pub beta: f32,
}

/// A matrix inside of a `Matrix`, or a batch of them at equal distances.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a> {
    /// Where it lies.
    pub matrix: &'a Matrix,
    /// Numbers from the start of `matrix` to its first number.
    pub offset: usize,
    /// Numbers from one row to the next.
    pub row: usize,
    /// Numbers from one matrix of the batch to the next; 0 uses the same one for all.
    pub next: usize,
}

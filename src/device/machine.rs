//! What a pass needs of a machine, in bytes and addresses: memory, copies, kernels, the matrix product. A trait and not
//! an enum, because each machine can then be read alone and tests can hand in one of their own. The trait is untyped
//! and unchecked on purpose: types, lengths, limits and the ledger are the business of `Device`, once for all machines,
//! so that no machine can be laxer than another. It does not depend on the rest of the crate. Read `mod.rs` beside it next.

use std::ffi::c_void;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};

/// The type of the numbers in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Bytes: quantised weights as they are stored.
    U8,
    /// Indices.
    U32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Single precision.
    F32,
}

impl Element {
    /// Bytes of one number.
    pub const fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::F32 => 4,
        }
    }

    /// Can products compute with it?
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32)
    }

    /// The name in kernels' names, configurations and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::U32 => "u32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One launch of a kernel.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The kernel's whole name in the text, for example `norm_forward_f32_bf16`.
    pub kernel: &'a str,
    /// Blocks along x, y and z. None is 0.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// The struct that the kernel takes by value.
    pub arguments: *const c_void,
    /// The size of that struct.
    pub bytes: usize,
}

/// A launch that is kept, with a copy of its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    kernel: String,
    grid: [u32; 3],
    block: u32,
    /// The struct's bytes, the last word filled up with zeros.
    arguments: Vec<u64>,
    bytes: usize,
}

impl Recorded {
    /// A copy of a launch.
    pub fn of(launch: &Launch<'_>) -> Self {
        let mut arguments = vec![0u64; launch.bytes.div_ceil(size_of::<u64>())];
        // SAFETY: `arguments` points to a struct of so many bytes, and the words have room for them.
        unsafe {
            let from = launch.arguments.cast::<u8>();
            arguments.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from, launch.bytes);
        }
        let Launch { kernel, grid, block, bytes, .. } = *launch;
        Self { kernel: kernel.into(), grid, block, arguments, bytes }
    }

    /// The launch, which points to the copy of its arguments.
    pub fn launch(&self) -> Launch<'_> {
        let Self { kernel, grid, block, arguments, bytes } = self;
        Launch { kernel, grid: *grid, block: *block, arguments: arguments.as_ptr().cast(), bytes: *bytes }
    }
}

/// A row-major matrix in memory, or the first of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Address of the first number.
    pub address: u64,
    /// Type of the numbers.
    pub element: Element,
    /// Numbers from one row to the next.
    pub row: usize,
    /// Numbers from one matrix of the batch to the next.
    pub next: usize,
}

/// y (m, n) = alpha x (m, k) w (k, n) + beta y, `batch` times, with sums in f32. With beta = 0, y is not read.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Rows of x and y.
    pub m: usize,
    /// Columns of y.
    pub n: usize,
    /// Columns of x.
    pub k: usize,
    /// Number of products.
    pub batch: usize,
    /// The left factor, (m, k).
    pub x: Place,
    /// Is x stored as (k, m)?
    pub x_transposed: bool,
    /// The right factor, (k, n). It has the element of x.
    pub w: Place,
    /// Is w stored as (n, k)?
    pub w_transposed: bool,
    /// The result, of f32 or of x's element.
    pub y: Place,
    /// The factor of the product.
    pub alpha: f32,
    /// The factor of what y held.
    pub beta: f32,
}

/// Why memory was not given.
#[derive(Debug)]
pub enum Refusal {
    /// There is not enough. `free` bytes are left, where that is known.
    Full {
        /// Bytes that the machine has left.
        free: Option<u64>,
    },
    /// Something else failed.
    Failed(anyhow::Error),
}

/// A machine in words, for `doctor` and for logs.
#[derive(Clone, Debug, Default)]
pub struct Info {
    /// The card's or the machine's name.
    pub name: String,
    /// What the kernels were compiled for, for example `sm_90`.
    pub arch: String,
    /// Bytes of memory, where the machine has memory of its own.
    pub total: Option<u64>,
    /// Bytes that nobody uses.
    pub free: Option<u64>,
    /// What was loaded at run time.
    pub libraries: Vec<LibraryInfo>,
}

/// A library or tool that was found at run time.
#[derive(Clone, Debug)]
pub struct LibraryInfo {
    /// What it is, for example `cuBLAS`.
    pub what: String,
    /// Its file; `None` if the system's own search found it by name.
    pub path: Option<PathBuf>,
    /// Its version, where it tells one.
    pub version: String,
}

/// A copy to the host.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Memory of the machine.
    pub from: u64,
    /// Memory of the host, which may be uninitialised.
    pub to: *mut u8,
    /// How many.
    pub bytes: usize,
}

/// A machine that work is issued to. It has one order of work, and that order is the only synchronisation: what is
/// issued later sees the results of what was issued earlier. Any thread may issue. Only a lane's copies, and the kernels of
/// `launch_beside`, run beside that order.
pub trait Machine: Send + Sync {
    /// A short name for messages, for example `cuda:0 (NVIDIA H100)`.
    fn name(&self) -> String;

    /// What `doctor` shows.
    fn info(&self) -> Result<Info>;

    /// Can kernels and products use this element?
    fn supports(&self, element: Element) -> bool;

    /// Does it count memory and compute nothing?
    fn is_dry(&self) -> bool {
        false
    }

    /// Uninitialised memory at a multiple of 256 bytes. `bytes` is a multiple of 512 and not 0.
    fn allocate(&self, bytes: usize) -> Result<u64, Refusal>;

    /// Gives memory back after everything that was issued so far. Destructors call it, so it reports nothing.
    ///
    /// # Safety
    /// The address comes from `allocate` with the same size, and nothing that is issued later uses it.
    unsafe fn free(&self, address: u64, bytes: usize);

    /// Zeroed memory of the host that the machine copies from and to at full speed. `bytes` is not 0.
    fn allocate_host(&self, bytes: usize) -> Result<*mut u8>;

    /// # Safety
    /// The address comes from `allocate_host` with the same size, and no copy uses it.
    unsafe fn free_host(&self, address: *mut u8, bytes: usize);

    /// Copies into the machine's memory. `from` may change when it returns.
    ///
    /// # Safety
    /// `to` is memory of this machine with so many bytes.
    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<()>;

    /// Waits for everything that was issued so far, then copies to the host.
    ///
    /// # Safety
    /// `from` is memory of this machine with so many bytes.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()>;

    /// As `download`, of many pieces, waiting once.
    ///
    /// # Safety
    /// The pieces are memory of this machine and of the host, with so many bytes, that nothing else uses.
    unsafe fn download_each(&self, pieces: &[Piece]) -> Result<()> {
        for &Piece { from, to, bytes } in pieces {
            // SAFETY: promised by the caller; the bytes are initialised before they are a slice.
            unsafe {
                to.write_bytes(0, bytes);
                self.download(from, std::slice::from_raw_parts_mut(to, bytes))?;
            }
        }
        Ok(())
    }

    /// Sets bytes to zero.
    ///
    /// # Safety
    /// `address` is memory of this machine with so many bytes.
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()>;

    /// Copies inside of the machine's memory.
    ///
    /// # Safety
    /// Both are memory of this machine with so many bytes, and they do not overlap.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()>;

    /// Starts a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and its accesses stay inside of memory of this machine.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Starts matrix products. No dimension is 0.
    ///
    /// # Safety
    /// The matrices lie in memory of this machine.
    unsafe fn gemm(&self, product: &Product) -> Result<()>;

    /// Starts a kernel beside the order of work, on a second stream, once all that was issued so far is done. It returns at once
    /// with a ticket for [`Machine::join`]. Until then the memory that the kernel writes is undefined, and what it reads stays as
    /// it is. Kernels that are started so run one after another.
    ///
    /// A machine without a second stream runs the kernel in the order of work.
    ///
    /// # Safety
    /// As for `launch`. The kernel writes to the (address, bytes) of `writes` alone, which nothing else uses before the join.
    unsafe fn launch_beside(&self, launch: &Launch<'_>, _writes: (u64, usize)) -> Result<u64> {
        // SAFETY: promised by the caller.
        unsafe { self.launch(launch) }?;
        Ok(0)
    }

    /// What is issued from now on sees what the kernel with this ticket wrote. Each ticket is joined once.
    fn join(&self, _ticket: u64) -> Result<()> {
        Ok(())
    }

    /// Keeps launches as one piece that [`Machine::replay`] issues in their order. Nothing runs yet.
    fn record(&self, launches: Vec<Recorded>) -> Result<u64> {
        bail!("{} cannot keep {} launches", self.name(), launches.len())
    }

    /// Issues recorded launches, each with the arguments that it was recorded with.
    ///
    /// # Safety
    /// As for `launch`, for each of them.
    unsafe fn replay(&self, recording: u64) -> Result<()> {
        bail!("{} keeps no recording {recording}", self.name())
    }

    /// Forgets a recording after everything that was issued so far. Destructors call it, so it reports nothing.
    fn forget(&self, _: u64) {}

    /// Waits until all is done, and reports errors of earlier work.
    fn synchronize(&self) -> Result<()>;

    /// A point in the order of work, for `elapsed`. A machine whose work is done when its calls return takes the host's clock.
    fn mark(&self) -> Result<u64> {
        static BEGAN: std::sync::LazyLock<std::time::Instant> = std::sync::LazyLock::new(std::time::Instant::now);
        Ok(BEGAN.elapsed().as_nanos() as u64)
    }

    /// Waits for two marks, each of which is used once, and returns the seconds between them.
    fn elapsed(&self, from: u64, to: u64) -> Result<f64> {
        Ok(to.saturating_sub(from) as f64 * 1e-9)
    }

    /// Opens a lane, through which one buffer is filled from pinned memory, and copied to it, beside the order of work: on a
    /// second stream of copies. All that was issued so far, the buffer's allocation among it, is done before the lane's first
    /// fill begins.
    ///
    /// A machine without a second stream needs none of these functions: its copies are in the order of work.
    fn open_lane(&self) -> Result<u64> {
        Ok(0)
    }

    /// Waits until the lane's last copy is over and ends the lane. Destructors call it, so it reports nothing.
    fn close_lane(&self, _lane: u64) {}

    /// Starts a copy, which begins once all that was issued before the lane's last `release` is done. It returns at once:
    /// until `arrive`, the buffer's content is undefined.
    ///
    /// # Safety
    /// `from` is memory of `allocate_host` and stays as it is until the fill is over; `to` is memory of this machine with so
    /// many bytes, the same buffer in every call of the lane.
    unsafe fn fill(&self, _lane: u64, from: &[u8], to: u64) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.upload(from, to) }
    }

    /// Starts a copy of the lane's buffer to the host, which begins once all that was issued before the lane's last `release` is
    /// done. It returns at once. Until `arrive` the buffer must not be written to; the host's memory is undefined until a later
    /// copy of any lane has arrived. Copies of all lanes are done in the order in which they are started, so that a fill may
    /// follow from the same memory.
    ///
    /// # Safety
    /// `to` is memory of `allocate_host`, which nothing but later copies uses until the lane is closed; `from` is the lane's
    /// buffer, with so many bytes.
    unsafe fn spill(&self, _lane: u64, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.download(from, to) }
    }

    /// What is issued from now on sees the lane's last fill, and may overwrite what its last spill read.
    fn arrive(&self, _lane: u64) -> Result<()> {
        Ok(())
    }

    /// What was issued so far is the last that uses the lane's buffer before its next fill.
    fn release(&self, _lane: u64) -> Result<()> {
        Ok(())
    }
}

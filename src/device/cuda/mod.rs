//! The machine that is a card. The libraries are found at run time (libraries.rs), a card that cannot be used is refused with a
//! reason (checks.rs), and the kernels are compiled for the card that is there (nvrtc.rs). All work goes to one stream, but for
//! the copies of layers that are streamed and of blocks' inputs that wait on the host (lanes.rs), and the kernels that dequantise
//! weights while a product runs (beside.rs); memory comes from the driver's stream-ordered pool, and nothing waits for the card
//! but `download`, `synchronize` and uploads that overtake their staging memory. Read libraries.rs next.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail, ensure};
use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::driver::{result, sys};

mod beside;
pub mod checks;
mod graph;
mod lanes;
pub mod libraries;
pub mod nvrtc;
mod staging;

use super::emulated::cache_folder;
use super::machine::{Element, Info, Launch, LibraryInfo, Machine, Piece, Place, Product, Recorded, Refusal};
use super::{kernels, lock};
use checks::{BF16_CARD, Card, Driver, RealDriver};
use lanes::Lanes;
use libraries::{Finder, Library, Opened};
use staging::{DIRECT, Downloads, Staging};

/// See the file's header.
pub struct Cuda {
    name: String,
    card: Card,
    driver: i32,
    libraries: Vec<Opened>,
    compiled_for: String,
    cached: bool,
    handles: Handles,
    functions: Mutex<HashMap<String, Function>>,
    /// One thread at a time uses the handle of cuBLAS.
    blas: Mutex<()>,
    staging: Mutex<Staging>,
    downloads: Mutex<Downloads>,
    lanes: Mutex<Lanes>,
    beside: Mutex<beside::Kernels>,
}

/// What the driver gave. Dropped last and in order.
struct Handles {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    pool: sys::CUmemoryPool,
    /// One per part of the kernels' texts.
    modules: Vec<sys::CUmodule>,
    blas: blas_sys::cublasHandle_t,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the driver's handles may be used by any thread that has bound their context; cuBLAS is behind a lock.
unsafe impl Send for Handles {}
// SAFETY: as above.
unsafe impl Sync for Handles {}
// SAFETY: as above.
unsafe impl Send for Function {}

impl Handles {
    /// Opens the device; what was opened before a failure is closed by `Drop`.
    fn open(ordinal: usize) -> Result<Self> {
        use std::ptr::null_mut;
        let device = result::device::get(i32::try_from(ordinal)?)?;
        // SAFETY: the device comes from the driver; every pointer is valid for its call.
        unsafe {
            let context = result::primary_ctx::retain(device)?;
            let (stream, pool, blas) = (null_mut(), null_mut(), null_mut());
            let mut handles = Self { device, context, stream, pool, modules: vec![], blas };
            result::ctx::set_current(context)?;
            handles.stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
            handles.pool = result::device::get_default_mem_pool(device)?;
            // Freed memory stays in the pool, because giving it back to the driver waits for the card.
            let (keep, threshold) = (u64::MAX, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD);
            sys::cuMemPoolSetAttribute(handles.pool, threshold, (&raw const keep).cast_mut().cast()).result()?;
            handles.blas = blas::create_handle()?;
            blas::set_stream(handles.blas, handles.stream.cast())?;
            // Partial sums of products with 16-bit results stay f32.
            let mode = blas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            blas_sys::cublasSetMathMode(handles.blas, mode).result()?;
            Ok(handles)
        }
    }

    /// Makes the context that of the calling thread.
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is alive.
        Ok(unsafe { result::ctx::set_current(self.context) }?)
    }
}

impl Drop for Handles {
    fn drop(&mut self) {
        self.bind().ok();
        // SAFETY: each handle is alive and used for the last time; work on the stream is over first.
        unsafe {
            if !self.stream.is_null() {
                result::stream::synchronize(self.stream).ok();
            }
            if !self.blas.is_null() {
                blas::destroy_handle(self.blas).ok();
            }
            for module in self.modules.drain(..) {
                result::module::unload(module).ok();
            }
            if !self.pool.is_null() {
                sys::cuMemPoolTrimTo(self.pool, 0).result().ok();
            }
            if !self.stream.is_null() {
                result::stream::destroy(self.stream).ok();
            }
            result::primary_ctx::release(self.device).ok();
        }
    }
}

impl Cuda {
    /// Libraries, the driver's CUDA version and the card with this ordinal, or what is missing or too old and what to do.
    pub fn find(ordinal: usize, finder: &Finder<'_>, driver: &dyn Driver) -> Result<(Vec<Opened>, i32, Card)> {
        let mut libraries = vec![finder.open(Library::Driver, &libraries::MAJORS)?];
        let version = checks::driver_version(driver)?;
        let card = checks::card(driver, ordinal)?;
        libraries.extend(finder.open_toolkit(version)?);
        Ok((libraries, version, card))
    }

    /// The card with this ordinal, with all kernels of this crate. Errors say what is missing, or why the card cannot
    /// be used, and what to do.
    pub fn open(ordinal: usize) -> Result<Self> {
        Self::open_with(ordinal, &Finder::real(), &kernels::parts(), Some(&cache_folder("cuda")))
    }

    /// The same with another search, other texts and another folder for compiled kernels.
    pub fn open_with(ordinal: usize, finder: &Finder<'_>, texts: &[String], cache: Option<&Path>) -> Result<Self> {
        let (libraries, driver, card) = Self::find(ordinal, finder, &RealDriver)?;
        let arch = nvrtc::target(card.capability, &nvrtc::architectures()?)?;
        let compiled = nvrtc::compiled_all(texts, &arch, cache)?;
        let cached = compiled.iter().all(|part| part.cached.is_some());
        let mut handles = Handles::open(ordinal)?;
        // SAFETY: the image is whole, and PTX ends with a zero.
        let load = |image: &[u8]| unsafe { result::module::load_data(image.as_ptr().cast()) };
        for (text, part) in texts.iter().zip(compiled) {
            let module = match load(&part.image) {
                Err(_) if part.cached.is_some() => load(&nvrtc::compiled(text, &arch, None)?.image),
                other => other,
            };
            let refused = || format!("cuda:{ordinal} ({}) cannot load kernels for {arch}", card.name);
            handles.modules.push(module.with_context(refused)?);
        }
        Ok(Self {
            name: format!("cuda:{ordinal} ({})", card.name),
            card,
            driver,
            libraries,
            compiled_for: arch,
            cached,
            handles,
            functions: Mutex::default(),
            blas: Mutex::default(),
            staging: Mutex::default(),
            downloads: Mutex::default(),
            lanes: Mutex::default(),
            beside: Mutex::default(),
        })
    }

    /// Whether all kernels came from files of an earlier run; otherwise they were compiled now.
    pub fn cached(&self) -> bool {
        self.cached
    }

    fn function(&self, kernel: &str) -> Result<sys::CUfunction> {
        let mut functions = lock(&self.functions);
        if let Some(known) = functions.get(kernel) {
            return Ok(known.0);
        }
        let name = CString::new(kernel)?;
        // SAFETY: the modules are alive.
        let find = |&module: &sys::CUmodule| unsafe { result::module::get_function(module, name.clone()) }.ok();
        let function =
            self.handles.modules.iter().find_map(find).context("the kernels' texts have no kernel of this name")?;
        functions.insert(kernel.into(), Function(function));
        Ok(function)
    }

    fn try_allocate(&self, bytes: usize) -> Result<u64, Refusal> {
        self.handles.bind().map_err(Refusal::Failed)?;
        // SAFETY: the stream is alive.
        let take = || unsafe { result::malloc_async(self.handles.stream, bytes) };
        let full = |error: &result::DriverError| error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        match take() {
            Ok(address) => return Ok(address),
            Err(error) if full(&error) => {}
            Err(error) => return Err(Refusal::Failed(error.into())),
        }
        // What waits to be given back, and what the pool keeps in pieces, may be enough.
        self.synchronize().map_err(Refusal::Failed)?;
        // SAFETY: the pool is alive.
        unsafe { sys::cuMemPoolTrimTo(self.handles.pool, 0) }.result().map_err(|e| Refusal::Failed(e.into()))?;
        match take() {
            Ok(address) => Ok(address),
            Err(error) if full(&error) => {
                Err(Refusal::Full { free: result::mem_get_info().ok().map(|(free, _)| free as u64) })
            }
            Err(error) => Err(Refusal::Failed(error.into())),
        }
    }
}

fn library_version(cuda: &Cuda, library: Library) -> Result<String> {
    Ok(match library {
        Library::Driver => format!("CUDA {}", checks::version_text(cuda.driver)),
        Library::Nvrtc => {
            let (major, minor) = nvrtc::version()?;
            format!("{major}.{minor}")
        }
        Library::Cublas => {
            let mut version = 0;
            let _turn = lock(&cuda.blas);
            // SAFETY: the handle is alive and locked.
            unsafe { blas_sys::cublasGetVersion_v2(cuda.handles.blas, &mut version) }.result()?;
            format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
        }
    })
}

impl Machine for Cuda {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn info(&self) -> Result<Info> {
        self.handles.bind()?;
        let (free, total) = result::mem_get_info()?;
        let library = |opened: &Opened| -> Result<LibraryInfo> {
            let version = library_version(self, opened.library)?;
            Ok(LibraryInfo { what: opened.library.name().into(), path: opened.path.clone(), version })
        };
        Ok(Info {
            name: self.name.clone(),
            arch: format!("{}, kernels for {}", self.card.arch(), self.compiled_for),
            total: Some(total as u64),
            free: Some(free as u64),
            libraries: self.libraries.iter().map(library).collect::<Result<_>>()?,
        })
    }

    fn supports(&self, element: Element) -> bool {
        element != Element::Bf16 || self.card.capability >= BF16_CARD
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Refusal> {
        self.try_allocate(bytes)
    }

    unsafe fn free(&self, address: u64, _: usize) {
        if self.handles.bind().is_ok() {
            // SAFETY: promised by the caller.
            unsafe { result::free_async(address, self.handles.stream) }.ok();
        }
    }

    fn allocate_host(&self, bytes: usize) -> Result<*mut u8> {
        self.handles.bind()?;
        // SAFETY: the context is bound; the memory has so many bytes.
        unsafe {
            let address =
                result::malloc_host(bytes, 0).with_context(|| format!("{bytes} bytes of pinned host memory"))?;
            address.cast::<u8>().write_bytes(0, bytes);
            lock(&self.staging).pinned(address.cast(), bytes);
            Ok(address.cast())
        }
    }

    unsafe fn free_host(&self, address: *mut u8, _: usize) {
        lock(&self.staging).not_pinned(address);
        if self.handles.bind().is_ok() {
            // SAFETY: promised by the caller.
            unsafe { result::free_host(address.cast()) }.ok();
        }
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: promised by the caller; the context is bound and the stream alive.
        unsafe { lock(&self.staging).upload(self.handles.stream, from, to) }
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.handles.bind()?;
        if to.len() >= DIRECT && !lock(&self.staging).is_pinned(to) {
            let piece = Piece { from, to: to.as_mut_ptr(), bytes: to.len() };
            // SAFETY: promised by the caller.
            return unsafe { self.download_each(&[piece]) };
        }
        // SAFETY: promised by the caller, and the copy is over before `to` is given back.
        unsafe { result::memcpy_dtoh_async(to, from, self.handles.stream) }?;
        self.synchronize()
    }

    unsafe fn download_each(&self, pieces: &[Piece]) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: promised by the caller; the context is bound and the stream alive.
        unsafe { lock(&self.downloads).download(self.handles.stream, pieces) }
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: promised by the caller.
        Ok(unsafe { result::memset_d8_async(address, 0, bytes, self.handles.stream) }?)
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: promised by the caller.
        Ok(unsafe { result::memcpy_dtod_async(to, from, bytes, self.handles.stream) }?)
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.handles.bind()?;
        let function = self.function(launch.kernel)?;
        let ([x, y, z], mut arguments) = (launch.grid, [launch.arguments.cast_mut()]);
        // SAFETY: promised by the caller; the driver copies the arguments during the call.
        unsafe {
            result::launch_kernel(function, (x, y, z), (launch.block, 1, 1), 0, self.handles.stream, &mut arguments)?;
        }
        Ok(())
    }

    unsafe fn launch_beside(&self, launch: &Launch<'_>, _: (u64, usize)) -> Result<u64> {
        self.handles.bind()?;
        let function = self.function(launch.kernel)?;
        // SAFETY: promised by the caller; the context is bound and the stream is its own.
        Ok(unsafe { lock(&self.beside).launch(launch, function, self.handles.stream) }? as u64)
    }

    fn join(&self, ticket: u64) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: the ticket comes from `launch_beside`; the context is bound and the stream is its own.
        unsafe { lock(&self.beside).join(ticket as sys::CUevent, self.handles.stream) }
    }

    unsafe fn gemm(&self, p: &Product) -> Result<()> {
        use blas_sys::cublasComputeType_t::{CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC};
        use blas_sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        let operation = |transposed| if transposed { CUBLAS_OP_T } else { CUBLAS_OP_N };
        // f32 operands are not rounded to TF32.
        let compute = if p.x.element == Element::F32 { CUBLAS_COMPUTE_32F_PEDANTIC } else { CUBLAS_COMPUTE_32F };
        self.handles.bind()?;
        let _turn = lock(&self.blas);
        // cuBLAS has columns where we have rows: its matrices are our transposed ones, and y^T = w^T x^T.
        // SAFETY: promised by the caller; the handle is alive and locked.
        unsafe {
            blas::gemm_strided_batched_ex(
                self.handles.blas,
                operation(p.w_transposed),
                operation(p.x_transposed),
                i32::try_from(p.n)?,
                i32::try_from(p.m)?,
                i32::try_from(p.k)?,
                (&raw const p.alpha).cast(),
                p.w.address as *const c_void,
                kind(&p.w)?,
                i32::try_from(p.w.row)?,
                i64::try_from(p.w.next)?,
                p.x.address as *const c_void,
                kind(&p.x)?,
                i32::try_from(p.x.row)?,
                i64::try_from(p.x.next)?,
                (&raw const p.beta).cast(),
                p.y.address as *mut c_void,
                kind(&p.y)?,
                i32::try_from(p.y.row)?,
                i64::try_from(p.y.next)?,
                i32::try_from(p.batch)?,
                compute,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )?;
        }
        Ok(())
    }

    fn record(&self, launches: Vec<Recorded>) -> Result<u64> {
        self.handles.bind()?;
        // cuGraphAddKernelNode_v2 came with CUDA 12.
        ensure!(self.driver >= 12_000, "the driver is older than CUDA 12");
        let nodes = launches.iter().map(|launch| Ok((launch.launch(), self.function(launch.launch().kernel)?)));
        // SAFETY: the context is bound, and the functions are of loaded modules.
        unsafe { graph::instantiate(&nodes.collect::<Result<Vec<_>>>()?) }
    }

    unsafe fn replay(&self, recording: u64) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: promised by the caller; the stream is alive.
        unsafe { graph::launch(recording, self.handles.stream) }
    }

    fn forget(&self, recording: u64) {
        if self.handles.bind().is_ok() {
            // SAFETY: it comes from `record` and is used for the last time.
            unsafe { graph::destroy(recording) };
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: the stream is alive.
        let waited = unsafe { result::stream::synchronize(self.handles.stream) };
        waited.map_err(|error| {
            anyhow!(error).context(format!(
                "{} reports an error of earlier work; it cannot be used again in this process",
                self.name
            ))
        })
    }

    fn mark(&self) -> Result<u64> {
        self.handles.bind()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
        // SAFETY: event and stream are alive.
        unsafe { result::event::record(event, self.handles.stream) }?;
        Ok(event as u64)
    }

    fn elapsed(&self, from: u64, to: u64) -> Result<f64> {
        self.handles.bind()?;
        let [from, to] = [from, to].map(|mark| mark as sys::CUevent);
        // SAFETY: both come from `mark`, and each is used once.
        unsafe {
            let milliseconds = result::event::synchronize(to).and_then(|()| result::event::elapsed(from, to));
            result::event::destroy(from)?;
            result::event::destroy(to)?;
            Ok(f64::from(milliseconds?) * 1e-3)
        }
    }

    fn open_lane(&self) -> Result<u64> {
        self.handles.bind()?;
        // SAFETY: the context is bound and the stream is its own.
        unsafe { lock(&self.lanes).open(self.handles.stream) }
    }

    fn close_lane(&self, lane: u64) {
        if self.handles.bind().is_ok() {
            lock(&self.lanes).close(lane);
        }
    }

    unsafe fn fill(&self, lane: u64, from: &[u8], to: u64) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: promised by the caller; the context is bound.
        unsafe { lock(&self.lanes).fill(lane, from, to) }
    }

    unsafe fn spill(&self, lane: u64, from: u64, to: &mut [u8]) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: promised by the caller; the context is bound.
        unsafe { lock(&self.lanes).spill(lane, from, to) }
    }

    fn arrive(&self, lane: u64) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: the context is bound and the stream is its own.
        unsafe { lock(&self.lanes).arrive(lane, self.handles.stream) }
    }

    fn release(&self, lane: u64) -> Result<()> {
        self.handles.bind()?;
        // SAFETY: the context is bound and the stream is its own.
        unsafe { lock(&self.lanes).release(lane, self.handles.stream) }
    }
}

fn kind(place: &Place) -> Result<blas_sys::cudaDataType_t> {
    Ok(match place.element {
        Element::F32 => blas_sys::cudaDataType_t::CUDA_R_32F,
        Element::Bf16 => blas_sys::cudaDataType_t::CUDA_R_16BF,
        Element::F16 => blas_sys::cudaDataType_t::CUDA_R_16F,
        Element::U8 | Element::U32 => bail!("a product of {}", place.element),
    })
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.handles.bind().is_ok() {
            lock(&self.lanes).end();
            lock(&self.beside).end();
            lock(&self.staging).close(self.handles.stream);
            lock(&self.downloads).close(self.handles.stream);
        }
    }
}

//! What the emulated machine finds, and that it computes what the kernels' text says.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use fourfold::device::dry::Dry;
use fourfold::device::emulated::{Emulated, Toolchain};
use fourfold::device::kernels::with_prelude;
use fourfold::device::testing::can_emulate;
use fourfold::device::{Arguments, Device, Element, Machine, Matrix, OutOfMemory, Ptr, Usage, Variant};
use tempfile::TempDir;

use crate::support::noise;

const TEXT: &str = r#"
template <class T> struct Scale { const T* x; T* y; u64 count; float factor; };
template <class T> __device__ __forceinline__ void scale(const Scale<T>& a) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.count) store(a.y + i, a.factor * load(a.x + i));
}
KERNEL(scale_f32, Scale<float>, 64) { scale(a); }
KERNEL(scale_bf16, Scale<bf16>, 64) { scale(a); }
KERNEL(scale_f16, Scale<f16>, 64) { scale(a); }
KERNEL(scale_wide, Scale<float>, 96) { scale(a); }

// Sum and maximum of each row.
struct Rows { const float* x; float* y; u32 cols; };
KERNEL(rows, Rows, 256) {
    const float* x = a.x + (size_t)blockIdx.x * a.cols;
    float s = 0.f, m = -infinity();
    for (u32 i = threadIdx.x; i < a.cols; i += blockDim.x) { s += x[i]; m = max_or_nan(m, x[i]); }
    s = block_sum(s); m = block_max(m);
    if (threadIdx.x == 0) { a.y[2 * blockIdx.x] = s; a.y[2 * blockIdx.x + 1] = m; }
}

// Reverses 256 numbers through shared memory; the barrier is missing in the second.
struct Reverse { const float* x; float* y; };
KERNEL(reverse, Reverse, 256) {
    __shared__ float s[256];
    s[threadIdx.x] = a.x[threadIdx.x];
    __syncthreads();
    a.y[threadIdx.x] = s[255 - threadIdx.x];
}
// Each warp writes, and reads what the warp before has written: in plain order that is there already.
KERNEL(neighbour_without_barrier, Reverse, 256) {
    __shared__ float s[256];
    s[threadIdx.x] = a.x[threadIdx.x];
    a.y[threadIdx.x] = s[threadIdx.x & 224 ? threadIdx.x - 32 : threadIdx.x];
}

struct Where { float* y; u32 kind; u32 n; };
KERNEL(wrong, Where, 128) {
    __shared__ float s[128];
    if (a.kind == 0 && threadIdx.x < 40) __syncthreads();
    if (a.kind == 0 && threadIdx.x >= 40) warp_sum(1.f);
    if (a.kind == 1) { if (threadIdx.x < 64) __syncthreads(); 
        else __syncthreads(); }
    if (a.kind == 2) s[threadIdx.x + a.n] = 1.f;
    if (a.kind == 3) *(U4*)(a.y + a.n) = U4();
    if (a.kind == 4) a.y[0] = (float)(1u << (threadIdx.x + a.n));
    if (a.kind == 5) *(volatile float*)(a.n ? (float*)0 : a.y) = 1.f;
    if (a.kind == 6) a.y[threadIdx.x] = (float)(threadIdx.x / (a.n - 7));
    s[threadIdx.x] = 2.f;
    a.y[threadIdx.x] = s[threadIdx.x];
}
"#;

#[repr(C)]
struct Scale {
    x: Ptr,
    y: Ptr,
    count: u64,
    factor: f32,
}
// SAFETY: the fields are those of the text.
unsafe impl Arguments for Scale {
    const NAME: &'static str = "scale";
    const BLOCK: u32 = 64;
}
#[repr(C)]
struct Rows {
    x: Ptr,
    y: Ptr,
    cols: u32,
}
// SAFETY: the fields are those of the text.
unsafe impl Arguments for Rows {
    const NAME: &'static str = "rows";
    const BLOCK: u32 = 256;
}
#[repr(C)]
struct Reverse {
    x: Ptr,
    y: Ptr,
}
// SAFETY: the fields are those of the text.
unsafe impl Arguments for Reverse {
    const NAME: &'static str = "reverse";
    const BLOCK: u32 = 256;
}
#[repr(C)]
struct Neighbour {
    x: Ptr,
    y: Ptr,
}
// SAFETY: the fields are those of the text.
unsafe impl Arguments for Neighbour {
    const NAME: &'static str = "neighbour_without_barrier";
    const BLOCK: u32 = 256;
}
#[repr(C)]
struct Wrong {
    y: Ptr,
    kind: u32,
    n: u32,
}
// SAFETY: the fields are those of the text.
unsafe impl Arguments for Wrong {
    const NAME: &'static str = "wrong";
    const BLOCK: u32 = 128;
}

fn machine() -> Arc<Emulated> {
    Arc::new(Emulated::with_text(&with_prelude(TEXT)).unwrap().shuffled(0))
}

fn device() -> Device {
    Device::new(machine())
}

fn scale(device: &Device, x: &Matrix, count: usize, element: Element) -> Result<Matrix> {
    let y = device.matrix(element, x.rows(), x.cols())?;
    let arguments = Scale {
        x: x.input("x", element, x.len())?,
        y: y.output("y", element, x.len())?,
        count: count as u64,
        factor: 3.0,
    };
    device.launch(Variant::of(&[element]), [count.div_ceil(64) as u32, 1, 1], arguments)?;
    Ok(y)
}

#[test]
fn kernels_of_all_types_compute_and_round() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let values = noise(7 * 333, 1);
    for element in [Element::F32, Element::Bf16, Element::F16] {
        let x = device.upload_as(element, &values, 7, 333).unwrap();
        let rounded = x.to_f32().unwrap();
        let y = scale(&device, &x, x.len(), element).unwrap().to_f32().unwrap();
        let expected = device.upload_as(element, &rounded.iter().map(|v| 3.0 * v).collect::<Vec<_>>(), 7, 333).unwrap();
        assert_eq!(y, expected.to_f32().unwrap(), "{element}");
    }
}

#[test]
fn reductions_give_sums_maxima_and_nan_in_every_order() {
    if !can_emulate() {
        return;
    }
    let mut values = noise(50 * 300, 2);
    values[3 * 300 + 17] = f32::NAN;
    let mut first = None;
    for seed in [0, 1, 2, 3] {
        let text = with_prelude(TEXT);
        let device = Device::new(Arc::new(Emulated::with_text(&text).unwrap().shuffled(seed)));
        let (x, y) = (device.upload_f32(&values, 50, 300).unwrap(), device.matrix(Element::F32, 50, 2).unwrap());
        let arguments = Rows {
            x: x.input("x", Element::F32, x.len()).unwrap(),
            y: y.output("y", Element::F32, 100).unwrap(),
            cols: 300,
        };
        device.launch(Variant::NONE, [50, 1, 1], arguments).unwrap();
        let y = y.to_f32().unwrap();
        for (row, (x, y)) in values.chunks(300).zip(y.chunks(2)).enumerate() {
            if row == 3 {
                assert!(y[0].is_nan() && y[1].is_nan());
                continue;
            }
            let sum: f64 = x.iter().map(|&v| f64::from(v)).sum();
            assert!((sum - f64::from(y[0])).abs() < 1e-4);
            assert_eq!(y[1], x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        let bits: Vec<u32> = y.iter().map(|v| v.to_bits()).collect();
        assert_eq!(*first.get_or_insert(bits.clone()), bits, "the order of threads does not matter");
    }
}

/// Numbers in shapes that views and empty matrices have.
#[test]
fn matrices_hold_what_was_written() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let values = noise(12, 3);
    let x = device.upload_f32(&values, 3, 4).unwrap();
    assert_eq!((x.rows(), x.cols(), x.len(), x.bytes(), x.element()), (3, 4, 12, 48, Element::F32));
    assert_eq!(x.row_range(1..3).unwrap().to_f32().unwrap(), values[4..]);
    let view = x.row_range(2..3).unwrap().reshape(2, 2).unwrap();
    view.write_f32(&[1.0, 2.0, 3.0, 4.0]).unwrap();
    assert_eq!(x.to_f32().unwrap()[8..], [1.0, 2.0, 3.0, 4.0]);
    assert!(view.shares_memory(&x) && x.row_range(2..4).is_err() && x.reshape(5, 2).is_err());
    assert!(x.write_f32(&[0.0; 11]).is_err() && x.to_u32().is_err() && x.write_u32(&[0; 12]).is_err());
    let indices = device.upload_u32(&[7, 8]).unwrap();
    assert_eq!((indices.to_u32().unwrap(), indices.rows()), (vec![7, 8], 1));
    assert_eq!(device.upload_bytes(&[1, 2, 3]).unwrap().to_bytes().unwrap(), [1, 2, 3]);
    assert_eq!(device.zeros(Element::Bf16, 3, 5).unwrap().to_f32().unwrap(), [0.0; 15]);
    assert!(device.matrix(Element::F16, 2, 2).unwrap().to_f32().unwrap().iter().all(|v| v.is_nan()));
    let copy = device.matrix(Element::F32, 3, 4).unwrap();
    copy.copy_from(&x).unwrap();
    assert_eq!(copy.to_f32().unwrap(), x.to_f32().unwrap());
    assert!(x.copy_from(&x).is_err() && indices.copy_from(&x).is_err());
    let empty = device.matrix(Element::F32, 0, 4).unwrap();
    assert!(empty.is_empty() && empty.to_f32().unwrap().is_empty());
    scale(&device, &empty, 0, Element::F32).unwrap();
    let mut pinned = device.pinned(12).unwrap();
    x.read_f32(&mut pinned).unwrap();
    assert_eq!(pinned[..], x.to_f32().unwrap()[..]);
    let error = x.input("gain", Element::Bf16, 12).unwrap_err().to_string();
    assert_eq!(error, "gain: the kernel needs bf16, and the matrix holds f32");
    let error = x.input("gain", Element::F32, 13).unwrap_err().to_string();
    assert_eq!(error, "gain: the kernel would use 13 of 12 numbers");
    let row = device.upload_f32(&[0.0; 6], 2, 3).unwrap().row_range(1..2).unwrap();
    assert!(row.input("x", Element::F32, 3).unwrap().aligned("x", 16).is_err());
    drop((x, view, indices, copy, empty, row, pinned));
    assert_eq!(device.usage().live, 0);
}

#[test]
fn many_matrices_are_read_with_one_wait_through_buffers_that_take_turns() {
    let device = device();
    // Whole buffers of 250 numbers, parts of one, and pieces that go through all of them several times.
    let lens = [1, 249, 250, 251, 3, 0, 1000, 4003, 7, 500, 250];
    let matrices: Vec<Matrix> =
        lens.iter().map(|&n| device.upload_f32(&noise(n, n as u64 + 1), 1, n).unwrap()).collect();
    let before = device.work();
    let read = device.read_each(&matrices.iter().collect::<Vec<_>>()).unwrap();
    let work = device.work() - before;
    assert_eq!((work.downloads, work.copied), (1, 4 * lens.iter().sum::<usize>()));
    for (values, &n) in read.iter().zip(&lens) {
        assert_eq!(values, &noise(n, n as u64 + 1), "{n} numbers");
    }
    assert!(device.read_each(&[]).unwrap().is_empty());
    let other = device.upload_u32(&[1, 2]).unwrap();
    assert!(device.read_each(&[&matrices[0], &other]).unwrap_err().to_string().contains("u32"));
}

#[test]
fn a_kernel_that_leaves_its_buffer_is_found_out() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let x = device.upload_f32(&[1.0; 128], 1, 128).unwrap();
    scale(&device, &x, 128, Element::F32).unwrap();
    let error = format!("{:#}", scale(&device, &x, 130, Element::F32).unwrap_err());
    assert!(error.contains("kernel scale_f32 on the emulated machine"), "{error}");
    assert!(error.ends_with("8 bytes were written past a buffer of 512 bytes"), "{error}");
    // A write to the guard of a buffer that is no argument is found by the look at all of them.
    let other = device.upload_f32(&[0.0; 128], 1, 128).unwrap();
    let raw = |m: &Matrix| m.input("x", Element::F32, 0).unwrap();
    // SAFETY: a `Ptr` is an address, and 64 bytes after the buffer are its guard.
    unsafe { (std::mem::transmute::<Ptr, u64>(raw(&other)) as *mut u8).add(512 + 64).write(1) };
    scale(&device, &x, 128, Element::F32).unwrap();
    assert!(device.synchronize().unwrap_err().to_string().contains("1 bytes were written past"));
    // SAFETY: as above.
    unsafe { (std::mem::transmute::<Ptr, u64>(raw(&other)) as *mut u8).sub(1).write(1) };
    // Or when it is freed, and then reported by what comes next.
    drop(other);
    let error = device.synchronize().unwrap_err().to_string();
    assert!(error.contains("found when it was freed"), "{error}");
    device.synchronize().unwrap();
}

#[test]
fn a_missing_barrier_shows_in_shuffled_order() {
    if !can_emulate() {
        return;
    }
    let values = noise(256, 4);
    let run = |seed, neighbour: bool| {
        let machine = Emulated::with_text(&with_prelude(TEXT)).unwrap().shuffled(seed);
        let device = Device::new(Arc::new(machine));
        let (x, y) = (device.upload_f32(&values, 1, 256).unwrap(), device.matrix(Element::F32, 1, 256).unwrap());
        let (from, to) = (x.input("x", Element::F32, 256).unwrap(), y.output("y", Element::F32, 256).unwrap());
        // The shared memory of the last block of this thread still holds numbers: other ones make it plain.
        let zeros = device.zeros(Element::F32, 1, 256).unwrap();
        for from in [zeros.input("x", Element::F32, 256).unwrap(), from] {
            let done = match neighbour {
                true => device.launch(Variant::NONE, [1, 1, 1], Neighbour { x: from, y: to }),
                false => device.launch(Variant::NONE, [1, 1, 1], Reverse { x: from, y: to }),
            };
            done.unwrap();
        }
        y.to_f32().unwrap()
    };
    let reversed: Vec<f32> = values.iter().rev().copied().collect();
    let neighbours: Vec<f32> = (0..256).map(|i| values[if i < 32 { i } else { i - 32 }]).collect();
    assert_eq!(run(0, true), neighbours, "plain order hides it");
    assert!((1..4).all(|seed| run(seed, true) != neighbours));
    assert!((0..8).all(|seed| run(seed, false) == reversed));
}

#[test]
fn what_a_card_would_do_silently_is_an_error() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let y = device.matrix(Element::F32, 1, 128).unwrap();
    let run = |kind, n| {
        let arguments = Wrong { y: y.output("y", Element::F32, 128).unwrap(), kind, n };
        device.launch(Variant::NONE, [3, 2, 1], arguments).map_err(|error| format!("{error:#}"))
    };
    for (kind, n, words) in [
        (0, 0, "some of its threads wait at a barrier that others never reach, in block [0, 0, 0]"),
        (1, 0, "two different __syncthreads()"),
        (2, 1, "an index outside of its array (test.cu line"),
        (3, 1, "no multiple of its size (test.cu line"),
        (4, 32, "a shift by 32 bits or more (test.cu line"),
        (5, 1, "through a null pointer (test.cu line"),
        (6, 7, "a division by zero (test.cu line"),
    ] {
        let error = run(kind, n).unwrap_err();
        assert!(error.contains(words), "{kind}: {error}");
        // The machine goes on afterwards.
        run(9, 0).unwrap();
        assert_eq!(y.to_f32().unwrap(), [2.0; 128]);
    }
}

macro_rules! arguments {
    ($name:ident, $kernel:literal, $block:literal) => {
        #[repr(C)]
        struct $name(u64, u64, u64, u64);
        // SAFETY: never started, because something does not fit.
        unsafe impl Arguments for $name {
            const NAME: &'static str = $kernel;
            const BLOCK: u32 = $block;
        }
    };
}
arguments!(WrongBlock, "scale_f32", 128);
arguments!(NoSuch, "no_such", 64);
arguments!(TooManyThreads, "scale_f32", 2048);
#[repr(C)]
struct WrongSize(u64);
// SAFETY: never started, because the size does not fit.
unsafe impl Arguments for WrongSize {
    const NAME: &'static str = "scale_f32";
    const BLOCK: u32 = 64;
}

#[test]
fn what_does_not_match_the_text_or_the_limits_is_refused() {
    if !can_emulate() {
        return;
    }
    let device = device();
    let grid = [1, 1, 1];
    let error = |done: Result<()>| format!("{:#}", done.unwrap_err());
    let launch = device.launch(Variant::NONE, grid, WrongSize(0));
    assert!(error(launch).ends_with("its arguments are 32 bytes in the text and 8 here"));
    let launch = device.launch(Variant::NONE, grid, WrongBlock(0, 0, 0, 0));
    assert!(error(launch).ends_with("its blocks have 64 threads in the text and 128 here"));
    let launch = device.launch(Variant::named("q4_k"), grid, NoSuch(0, 0, 0, 0));
    assert_eq!(
        error(launch),
        "kernel no_such_q4_k on the emulated machine: the kernels' text has no kernel of this name"
    );
    assert!(error(device.launch(Variant::NONE, grid, TooManyThreads(0, 0, 0, 0))).contains("blocks of 2048 threads"));
    for grid in [[1 << 31, 1, 1], [1, 1 << 16, 1], [1, 1, 1 << 16]] {
        assert!(error(device.launch(Variant::NONE, grid, NoSuch(0, 0, 0, 0))).contains("above what cards allow"));
    }
    device.launch(Variant::NONE, [1, 0, 1], NoSuch(0, 0, 0, 0)).unwrap();
}

/// Some allocations, copies, launches and a product.
fn work(device: &Device) -> Result<()> {
    let x = device.upload_as(Element::Bf16, &noise(300, 5), 20, 15)?;
    let mut kept = vec![];
    for _ in 0..10 {
        let y = scale(device, &x, x.len(), Element::Bf16)?;
        let z = device.zeros(Element::F32, 20, 20)?;
        let (x, w, y) = (x.whole(), y.whole(), z.whole());
        let (m, n, k, batch, alpha, beta) = (20, 20, 15, 1, 1.0, 0.0);
        let product =
            fourfold::device::Gemm { m, n, k, batch, x, x_transposed: false, w, w_transposed: true, y, alpha, beta };
        device.gemm(product)?;
        z.to_f32()?;
        kept.push(z.clone());
    }
    Ok(())
}

#[test]
fn every_failure_is_a_clean_error() {
    if !can_emulate() {
        return;
    }
    let machine = machine();
    let device = Device::new(machine.clone());
    type Fault = fn(&Emulated, Option<u64>);
    let faults: [(Fault, &str); 3] = [
        (Emulated::fail_allocation_after, "is out of memory"),
        (Emulated::fail_launch_after, "failed, as a test asked for"),
        (Emulated::fail_copy_after, "load failed, as a test asked for"),
    ];
    for (fail, words) in faults {
        let mut count = 0;
        loop {
            fail(&machine, Some(count));
            let Err(error) = work(&device) else { break };
            assert!(format!("{error:#}").contains(words), "{error:#}");
            assert_eq!(error.downcast_ref::<OutOfMemory>().is_some(), words.contains("memory"));
            assert_eq!((device.usage().live, machine.live()), (0, 0), "after {error:#}");
            count += 1;
        }
        assert!(count >= 11, "{words}: {count}");
        fail(&machine, None);
    }
    work(&device).unwrap();
}

#[test]
fn out_of_memory_says_what_to_change() {
    if !can_emulate() {
        return;
    }
    let machine = machine();
    let device = Device::new(machine.clone());
    let _held = device.matrix(Element::F32, 1000, 1000).unwrap();
    machine.fail_allocation_after(Some(0));
    let error = device.matrix(Element::F32, 1 << 10, 1 << 10).unwrap_err();
    let refused = error.downcast_ref::<OutOfMemory>().unwrap();
    assert_eq!((refused.wanted, refused.live, refused.peak), (4 << 20, 4_000_256, 4_000_256));
    assert_eq!(
        error.to_string(),
        "the emulated machine is out of memory: 4.0 MiB more were wanted with 3.8 MiB in use (at most 3.8 MiB); lower \
         micro_batch_size, set checkpoint = \"block\", shorten max_length, or quantize the base"
    );
}

#[test]
fn dry_counts_what_the_emulated_machine_uses() {
    if !can_emulate() {
        return;
    }
    let trace = |machine: Arc<dyn Machine>| {
        let device = Device::new(machine);
        let seen = Arc::new(Mutex::new(Vec::<Usage>::new()));
        let sink = seen.clone();
        device.watch(move |usage| sink.lock().unwrap().push(usage));
        work(&device).unwrap();
        let usage = device.usage();
        device.reset_peak();
        assert_eq!((usage.live, device.usage().peak), (0, 0));
        (seen.lock().unwrap().clone(), usage)
    };
    let dry = trace(Arc::new(Dry::default()));
    assert_eq!(dry, trace(machine()));
    assert_eq!((dry.0.len(), dry.1.allocations, dry.1.peak), (21, 21, 1024 + 10 * 2048 + 1024));
    assert_eq!(Device::dry().upload_f32(&[1.0], 1, 1).unwrap().to_f32().unwrap(), [0.0]);
}

#[test]
fn compiled_kernels_are_kept_shared_and_made_again_when_damaged() {
    if !can_emulate() {
        return;
    }
    let cache = TempDir::new().unwrap();
    let chain = |folder: &str| Toolchain { cache: cache.path().join(folder), ..Toolchain::from_environment() };
    let text = with_prelude("struct One { float* y; };\nKERNEL(one, One, 32) { store(a.y, 1.f); }");
    let files = |folder: &str| {
        let all = std::fs::read_dir(cache.path().join(folder)).unwrap();
        all.map(|e| e.unwrap().path()).collect::<Vec<_>>()
    };
    Emulated::with(&text, &chain("a")).unwrap();
    let [made] = &files("a")[..] else { panic!("one file") };
    // Of another folder, so that this process has not loaded it yet.
    for (folder, bytes) in [("b", &std::fs::read(made).unwrap()[..9000]), ("c", &b"no library"[..]), ("d", &b""[..])] {
        let damaged = cache.path().join(folder).join(made.file_name().unwrap());
        std::fs::create_dir_all(damaged.parent().unwrap()).unwrap();
        std::fs::write(&damaged, bytes).unwrap();
        Emulated::with(&text, &chain(folder)).unwrap();
        assert_eq!(files(folder), std::slice::from_ref(&damaged));
        assert!(std::fs::metadata(&damaged).unwrap().len() > 5000, "{folder} was made again");
    }
    // A good file is used as it is.
    let copy = cache.path().join("e").join(made.file_name().unwrap());
    std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
    std::fs::copy(made, &copy).unwrap();
    let before = std::fs::metadata(&copy).unwrap().modified().unwrap();
    Emulated::with(&text, &chain("e")).unwrap();
    assert_eq!(std::fs::metadata(&copy).unwrap().modified().unwrap(), before);
}

#[test]
fn without_a_compiler_or_with_a_wrong_text_the_error_helps() {
    if !can_emulate() {
        return;
    }
    let cache = TempDir::new().unwrap();
    let none = Toolchain { compilers: vec!["no-such-compiler".into()], cache: cache.path().into() };
    let error = Emulated::with("", &none).err().unwrap().to_string();
    assert!(error.contains("no C++ compiler (tried no-such-compiler)") && error.contains("apt install g++"), "{error}");
    let toolchain = Toolchain { cache: cache.path().into(), ..Toolchain::from_environment() };
    let error = format!("{:#}", Emulated::with(&with_prelude("\nnonsense;"), &toolchain).err().unwrap());
    assert!(error.contains("test.cu:2"), "{error}");
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0, "nothing stays behind");
    let readonly = Toolchain { cache: "/proc/nowhere".into(), ..toolchain };
    assert!(format!("{:#}", Emulated::with(&with_prelude(""), &readonly).err().unwrap()).contains("cannot write to"));
}

/// Two processes compile one text into one folder at the same time. The second process is this test again.
#[test]
fn two_processes_compile_at_once() {
    if !can_emulate() {
        return;
    }
    let (variable, text) = ("FOURFOLD_TEST_CACHE", with_prelude(TEXT));
    let open = |cache: &std::path::Path| {
        let toolchain = Toolchain { cache: cache.into(), ..Toolchain::from_environment() };
        let device = Device::new(Arc::new(Emulated::with(&text, &toolchain).unwrap()));
        let x = device.upload_f32(&[1.0; 100], 1, 100).unwrap();
        assert_eq!(scale(&device, &x, 100, Element::F32).unwrap().to_f32().unwrap(), [3.0; 100]);
    };
    if let Some(cache) = std::env::var_os(variable) {
        return open(cache.as_ref());
    }
    let cache = TempDir::new().unwrap();
    let mut other = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "emulated::two_processes_compile_at_once"])
        .env(variable, cache.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    open(cache.path());
    assert!(other.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 1);
}

#[test]
fn several_threads_may_use_one_device() {
    if !can_emulate() {
        return;
    }
    let device = device();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let device = &device;
            scope.spawn(move || {
                for _ in 0..20 {
                    let values = noise(2000, seed);
                    let x = device.upload_f32(&values, 1, 2000).unwrap();
                    let y = scale(device, &x, 2000, Element::F32).unwrap().to_f32().unwrap();
                    assert!(y.iter().zip(&values).all(|(y, x)| *y == 3.0 * x));
                }
            });
        }
    });
    assert_eq!(device.usage().live, 0);
}

//! Recorded launches as a CUDA graph: a chain of kernel nodes, each after the one before it, as the stream would run them. The
//! graph is built node by node and not captured from the stream: so nothing that is issued meanwhile, on this or another
//! thread, can be forbidden or end up in it. It does not depend on operations. Read `mod.rs` beside it for the use.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use anyhow::{Context, Result};
use cudarc::driver::sys;

use crate::device::machine::Launch;

/// A graph that is destroyed with the value; what was instantiated from it lives on.
struct Graph(sys::CUgraph);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it is used for the last time.
        unsafe { sys::cuGraphDestroy(self.0) }.result().ok();
    }
}

/// The executable graph of launches and their functions. The driver copies each launch's arguments into its node.
///
/// # Safety
/// The context is bound, and each function takes the struct that its launch points to.
pub(super) unsafe fn instantiate(launches: &[(Launch<'_>, sys::CUfunction)]) -> Result<u64> {
    let mut graph = null_mut();
    // SAFETY: the pointer is valid for the call.
    unsafe { sys::cuGraphCreate(&mut graph, 0) }.result().context("a CUDA graph")?;
    let graph = Graph(graph);
    let mut before: sys::CUgraphNode = null_mut();
    for (launch, function) in launches {
        let [x, y, z] = launch.grid;
        let mut arguments: [*mut c_void; 1] = [launch.arguments.cast_mut()];
        let node = sys::CUDA_KERNEL_NODE_PARAMS {
            func: *function,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            kernelParams: arguments.as_mut_ptr(),
            extra: null_mut(),
            kern: null_mut(),
            ctx: null_mut(),
        };
        let (after, count) = if before.is_null() { (null(), 0) } else { (&raw const before, 1) };
        let mut added = null_mut();
        // SAFETY: the graph is alive, `after` is a node of it or absent, and the driver copies the arguments.
        unsafe { sys::cuGraphAddKernelNode_v2(&mut added, graph.0, after, count, &node) }
            .result()
            .with_context(|| format!("kernel {} in a CUDA graph", launch.kernel))?;
        before = added;
    }
    let mut executable = null_mut();
    // SAFETY: the graph is alive.
    unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph.0, 0) }
        .result()
        .with_context(|| format!("a CUDA graph of {} kernels", launches.len()))?;
    Ok(executable as u64)
}

/// Issues the graph to a stream, in order with what was issued to the stream before and comes after.
///
/// # Safety
/// The context is bound, the stream is alive, the graph comes from [`instantiate`], and the memory of its arguments is alive.
pub(super) unsafe fn launch(graph: u64, stream: sys::CUstream) -> Result<()> {
    // SAFETY: promised by the caller.
    unsafe { sys::cuGraphLaunch(graph as sys::CUgraphExec, stream) }.result().context("a CUDA graph")
}

/// Gives the graph back. One that still runs is destroyed by the driver when it is done.
///
/// # Safety
/// The context is bound, and the graph comes from [`instantiate`] and is used for the last time.
pub(super) unsafe fn destroy(graph: u64) {
    // SAFETY: promised by the caller.
    unsafe { sys::cuGraphExecDestroy(graph as sys::CUgraphExec) }.result().ok();
}

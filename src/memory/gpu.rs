//! The memory of an NVIDIA GPU that this process has taken: its pool, which lends to tensors and
//! gets back.

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::result::mem_pool;
use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute as Attribute};
use candle_core::cuda_backend::{CudaDevice, WrapErr};

/// The pool, where the driver has any.
fn pool(gpu: &CudaDevice) -> Result<Option<sys::CUmemoryPool>> {
    let context = gpu.cuda_stream().context().clone();
    context.bind_to_thread().w()?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: the pointers are to variables of the types that it writes.
    #[allow(unsafe_code)]
    let found = unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()) };
    if !context.has_async_alloc() {
        return Ok(None);
    }
    found.result().w()?;
    Ok(Some(pool))
}

fn attribute(gpu: &CudaDevice, attribute: Attribute) -> Option<u64> {
    let (pool, mut value) = (pool(gpu).ok()??, 0u64);
    // SAFETY: the sizes of a pool are 64-bit numbers.
    #[allow(unsafe_code)]
    unsafe { mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }.ok()?;
    Some(value)
}

/// Lets the pool keep freed memory for the next allocations: returning it at every synchronisation
/// and getting it again takes longer than a small step.
pub fn keep(gpu: &CudaDevice) -> Result<()> {
    let Some(pool) = pool(gpu)? else { return Ok(()) };
    let mut all = u64::MAX;
    // SAFETY: the threshold is a 64-bit number.
    #[allow(unsafe_code)]
    unsafe { mem_pool::set_attribute(pool, Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut all).cast()) }.w()
}

/// Bytes that no one has, or the pool alone.
pub fn free(gpu: &CudaDevice) -> Option<u64> {
    let (free, _) = gpu.cuda_stream().context().mem_get_info().ok()?;
    let kept = attribute(gpu, Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT).unwrap_or(0);
    let lent = attribute(gpu, Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT).unwrap_or(0);
    Some(free as u64 + kept.saturating_sub(lent))
}

/// The most bytes that tensors have had at a time.
pub fn peak(gpu: &CudaDevice) -> Option<u64> {
    attribute(gpu, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
}

//! CUDA kernels and their launches; `build.rs` compiles the .cu files to PTX.
//!
//! [`bf16`] is for inference, with f32 inside and no backward passes; [`f32`] has backward passes,
//! and also serves inference in f32. All run on GPUs of compute capability 8.0 and later. Operands
//! that they do not support take the compositions of candle's operations.

pub(crate) mod bf16;
pub(crate) mod f32;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, DevicePtr, DeviceRepr, DeviceSlice, LaunchConfig,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::{DType, Device, Layout, Result, Tensor, bail};

pub(super) use bf16::{
    HEAD_DIMS, add_product, attention, conv2d, dequantize, group_norm, has_row_stride, project_heads, supports_bf16,
    supports_conv2d, supports_group_norm,
};
pub use bf16::{MAX_TOP_K, Sample, sample};
pub(super) use f32::{select, supports_f32};

/// bf16 numbers in 16 bytes, which a thread reads at once.
const VECTOR: usize = 8;
/// Threads per block of most kernels.
const THREADS: u32 = 256;

/// Whether a tensor on `device` is bf16, not empty, and needs no gradient.
fn is_bf16(t: &Tensor, device: &Device) -> bool {
    t.dtype() == DType::BF16 && t.elem_count() > 0 && !t.track_op() && t.device().same_device(device)
}

/// Whether a tensor begins at an address aligned to 16 bytes.
fn aligned(t: &Tensor) -> bool {
    (t.layout().start_offset() * t.dtype().size_in_bytes()).is_multiple_of(16)
}

/// Whether a GPU has the instructions of the kernels for Hopper.
fn hopper(device: &CudaDevice) -> bool {
    device.cuda_stream().context().compute_capability().is_ok_and(|(major, _)| major == 9)
}

/// The address of an operand. All work is on one stream, so it is valid for as long as the operand
/// lives.
fn address<T>(x: &CudaView<T>) -> u64 {
    let stream = x.stream().clone();
    let (address, _) = x.device_ptr(&stream);
    address
}

/// The elements of a contiguous operand.
fn operand<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!("a kernel needs a contiguous operand, got strides {:?}", layout.stride()),
    }
}

/// Uninitialised memory for a kernel's output.
fn uninit<T: DeviceRepr>(device: &CudaDevice, count: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every kernel writes all of its output before anything reads it.
    #[allow(unsafe_code)]
    unsafe {
        device.alloc(count)
    }
}

fn blocks(grid: (usize, usize, usize), threads: u32, shared_mem_bytes: usize) -> LaunchConfig {
    let grid_dim = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
    LaunchConfig { grid_dim, block_dim: (threads, 1, 1), shared_mem_bytes: shared_mem_bytes as u32 }
}

/// A kernel by the PTX module and its name.
macro_rules! kernel {
    ($device:expr, $module:expr, $name:expr) => {
        $device.get_or_load_custom_func($name, $module.0, $module.1)?
    };
}

/// Launches `$function` over `$blocks` with the arguments after it.
macro_rules! launch {
    ($function:expr, $blocks:expr, $($argument:expr),+ $(,)?) => {{
        use candle_core::cuda_backend::WrapErr;
        use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
        let function = $function;
        let mut builder = function.builder();
        $(builder.arg($argument);)+
        // SAFETY: the types and the order of the arguments are those of the kernel in the .cu file,
        // and the grid stays within the operands, whose sizes the caller has checked.
        #[allow(unsafe_code)]
        unsafe { builder.launch($blocks) }.w()?;
    }};
}

use {kernel, launch};

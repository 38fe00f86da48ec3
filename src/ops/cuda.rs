//! Kernels for CUDA: launches of what `build.rs` compiles from the folder of this name. What draws is in bf16 with f32 inside,
//! what [trains](training) in f32.
//!
//! They run on GPUs of compute capability 8.0 and later. Where they do not take an operand, the plain composition does.

mod attention;
mod blocks;
mod boxes;
mod image;
mod sample;
mod step;
#[cfg(test)]
mod tests;
pub(super) mod training;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, DevicePtr, DeviceRepr, DeviceSlice, LaunchConfig,
};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::{DType, Device, Layout, Result, Tensor, bail};

pub(super) use attention::{HEAD_DIMS, attention, project_heads};
pub(super) use blocks::to_bf16;
pub(super) use image::{conv2d, convolves, group_norm, normalises};
pub use sample::{MAX_TOP_K, Sample, sample};
pub(super) use step::{add_product, in_rows, rms_norm, rope, swiglu};

/// Numbers in 16 bytes: what a thread reads at once.
const VECTOR: usize = 8;
/// Threads of a block, of most kernels.
const THREADS: u32 = 256;

/// The GPU of these operands, if the kernels take them: bf16 of one device, not to be trained, none empty, in rows of whole
/// vectors that begin where a vector may.
fn device(tensors: &[&Tensor]) -> Option<CudaDevice> {
    let first = tensors.first()?.device();
    let Device::Cuda(device) = first else { return None };
    let whole = |t: &&Tensor| t.dims().last().is_some_and(|d| d.is_multiple_of(VECTOR));
    tensors.iter().all(|t| plain(t, first) && aligned(t) && whole(t)).then(|| device.clone())
}

/// Whether the kernels take these operands.
pub(super) fn takes(tensors: &[&Tensor]) -> bool {
    device(tensors).is_some()
}

/// Whether a tensor is of bf16 numbers, some at least, on a device, and no gradient flows into it.
fn plain(t: &Tensor, device: &Device) -> bool {
    t.dtype() == DType::BF16 && t.elem_count() > 0 && !t.track_op() && t.device().same_device(device)
}

/// Whether the first number of a tensor lies where 16 bytes can be read.
fn aligned(t: &Tensor) -> bool {
    (t.layout().start_offset() * t.dtype().size_in_bytes()).is_multiple_of(16)
}

/// Whether a GPU has the instructions of the kernels for Hopper.
fn hopper(device: &CudaDevice) -> bool {
    device.cuda_stream().context().compute_capability().is_ok_and(|(major, _)| major == 9)
}

/// Where an operand begins. All work is on one stream, so that is good for as long as the operand is there.
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

fn room<T: DeviceRepr>(device: &CudaDevice, count: usize) -> Result<CudaSlice<T>> {
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

/// A compiled kernel, by its name.
macro_rules! kernel {
    ($device:expr, $module:expr, $name:expr) => {
        $device.get_or_load_custom_func($name, $module.0, $module.1)?
    };
}

/// Launches `$function` over `$blocks` with the arguments after it.
///
/// What makes it sound: the types and order of the arguments are those of the kernel in the .cu file, and the grid covers
/// the operands, whose sizes the caller has checked.
macro_rules! launch {
    ($function:expr, $blocks:expr, $($argument:expr),+ $(,)?) => {{
        use candle_core::cuda_backend::WrapErr;
        use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
        let function = $function;
        let mut builder = function.builder();
        $(builder.arg($argument);)+
        #[allow(unsafe_code)]
        unsafe { builder.launch($blocks) }.w()?;
    }};
}

use {kernel, launch};

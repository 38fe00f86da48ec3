//! Kernels for f32, forward and backward: training, and inference in f32. Products are cuBLAS's.

mod attention;
mod image;
mod rows;
#[cfg(test)]
mod tests;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

use super::{THREADS, address, blocks, kernel, launch, operand, uninit};

pub(crate) use attention::{attention, attention_back, linear, linear_back};
pub(crate) use image::{conv2d, conv2d_back, group_norm, group_norm_back};
#[cfg(feature = "train")]
pub(crate) use rows::{cross_entropy, cross_entropy_back};
pub(crate) use rows::{
    gelu, gelu_back, layer_norm, layer_norm_back, rms_norm, rms_norm_back, rope, rope_back, select, swiglu, swiglu_back,
};

const F32: (&str, &str) = ("f32", include_str!(concat!(env!("OUT_DIR"), "/f32.ptx")));

/// Rows per block where each has a warp.
const WARPS: usize = THREADS as usize / 32;

/// An operand of an operation.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// Whether the kernels support these operands: f32 on one GPU, none empty.
pub(crate) fn supports_f32(tensors: &[&Tensor]) -> bool {
    let supported = |t: &&Tensor| {
        t.dtype() == DType::F32
            && t.elem_count() > 0
            && t.device().is_cuda()
            && t.device().same_device(tensors[0].device())
    };
    !tensors.is_empty() && tensors.iter().all(supported)
}

/// The GPU that holds a tensor.
fn gpu(t: &Tensor) -> Result<CudaDevice> {
    match t.device() {
        Device::Cuda(device) => Ok(device.clone()),
        _ => bail!("a kernel for a GPU got a tensor of another device"),
    }
}

/// The address of a contiguous tensor. All work is on one stream, so it is valid for as long as the
/// tensor lives.
fn start<T: CudaDType>(t: &Tensor) -> Result<u64> {
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => Ok(address(&operand::<T>(storage, layout)?)),
        _ => bail!("a kernel for a GPU got a tensor of another device"),
    }
}

fn stored(numbers: CudaSlice<f32>, device: &CudaDevice) -> CudaStorage {
    CudaStorage::wrap_cuda_slice(numbers, device.clone())
}

fn tensor(numbers: CudaSlice<f32>, device: &CudaDevice, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(stored(numbers, device)), shape, BackpropOp::none(), false)
}

/// A grid with a thread for each of `count` numbers.
fn each(count: usize) -> (usize, usize, usize) {
    (count.div_ceil(THREADS as usize), 1, 1)
}

/// An operand of this shape with its dimensions in another order, contiguous.
fn arranged((storage, layout): Operand, shape: impl Into<Shape>, order: &[usize]) -> Result<CudaStorage> {
    let Some((first, _)) = layout.contiguous_offsets() else { bail!("an operand is not contiguous") };
    let layout = Layout::contiguous_with_offset(shape, first).permute(order)?;
    // SAFETY: the copy initialises all of it.
    #[allow(unsafe_code)]
    let mut out = unsafe { storage.device().alloc_uninit(layout.shape(), DType::F32)? };
    storage.copy_strided_src(&mut out, 0, &layout)?;
    Ok(out)
}

/// The sums of the columns of x (..., width): (width).
fn column_sums(x: &Tensor, width: usize) -> Result<Tensor> {
    /// Rows of a part, whose sums are summed in a second pass.
    const PART: usize = 256;
    let (device, rows) = (gpu(x)?, x.elem_count() / width);
    let x = x.contiguous()?;
    let sum = |x: u64, rows: usize, part: usize| -> Result<CudaSlice<f32>> {
        let mut sums = uninit(&device, rows.div_ceil(part) * width)?;
        let grid = (width.div_ceil(32), rows.div_ceil(part), 1);
        let (rows, columns, part) = (rows as i64, width as i32, part as i32);
        let function = kernel!(device, F32, "column_sums_f32");
        launch!(function, blocks(grid, THREADS, 0), &x, &mut sums, &rows, &columns, &part);
        Ok(sums)
    };
    let parts = sum(start::<f32>(&x)?, rows, PART)?;
    let sums = sum(address(&parts.slice(..)), rows.div_ceil(PART), rows)?;
    Ok(tensor(sums, &device, width))
}

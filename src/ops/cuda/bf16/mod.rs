//! Kernels for bf16 with f32 inside, forward only: what drawing needs.

mod attention;
mod elementwise;
mod image;
mod quants;
mod sample;
mod tensor_map;
#[cfg(test)]
mod tests;

use candle_core::cuda_backend::CudaDevice;
use candle_core::{Device, Tensor};

use super::{THREADS, VECTOR, address, aligned, blocks, hopper, is_bf16, kernel, launch, operand, uninit};

pub(crate) use attention::{HEAD_DIMS, attention, project_heads};
pub(crate) use elementwise::{add_product, has_row_stride, rms_norm, rope, swiglu};
pub(crate) use image::{conv2d, group_norm, supports_conv2d, supports_group_norm};
pub(crate) use quants::dequantize;
pub use sample::{MAX_TOP_K, Sample, sample};

/// The GPU of these operands if the kernels support them: bf16 on one device, not empty, without
/// gradients, and in rows of whole aligned vectors.
fn device(tensors: &[&Tensor]) -> Option<CudaDevice> {
    let first = tensors.first()?.device();
    let Device::Cuda(device) = first else { return None };
    let whole = |t: &&Tensor| t.dims().last().is_some_and(|d| d.is_multiple_of(VECTOR));
    tensors.iter().all(|t| is_bf16(t, first) && aligned(t) && whole(t)).then(|| device.clone())
}

/// Whether the kernels support these operands.
pub(crate) fn supports_bf16(tensors: &[&Tensor]) -> bool {
    device(tensors).is_some()
}

//! GGML's blocks to bf16.

use candle_core::cuda_backend::CudaStorage;
use candle_core::op::BackpropOp;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Storage, Tensor};
use half::bf16;

use super::{THREADS, VECTOR, blocks, kernel, launch, uninit};

const QUANTS: (&str, &str) = ("quants", include_str!(concat!(env!("OUT_DIR"), "/quants.ptx")));

/// The numbers of blocks on a GPU as bf16, of the same shape. None for a type without a kernel.
pub(crate) fn dequantize(x: &QTensor) -> Result<Option<Tensor>> {
    let name = match x.dtype() {
        GgmlDType::Q8_0 => "q8_0_to_bf16",
        GgmlDType::Q4_0 => "q4_0_to_bf16",
        GgmlDType::Q4K => "q4_k_to_bf16",
        _ => return Ok(None),
    };
    let Device::Cuda(device) = x.device() else { return Ok(None) };
    let count = x.shape().elem_count();
    let (bytes, vectors) = (x.device_ptr()? as u64, (count / VECTOR) as i64);
    let mut out = uninit::<bf16>(&device, count)?;
    let blocks = blocks(((count / VECTOR).div_ceil(THREADS as usize), 1, 1), THREADS, 0);
    launch!(kernel!(device, QUANTS, name), blocks, &bytes, &mut out, &vectors);
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device));
    Ok(Some(Tensor::from_storage(storage, x.shape().clone(), BackpropOp::none(), false)))
}

//! Sampling of codes on the GPU that holds the logits.

use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Result, Storage, Tensor};
use half::bf16;

use super::{THREADS, blocks, kernel, launch, operand, supports_bf16};

const SAMPLE: (&str, &str) = ("sample", include_str!(concat!(env!("OUT_DIR"), "/sample.ptx")));

/// The largest `top_k` of [`sample`].
pub const MAX_TOP_K: usize = 1536;

/// Settings of [`sample`].
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Classifier-free guidance t: (1 + t) conditional - t unconditional.
    pub guidance: f32,
    /// 0 is argmax.
    pub temperature: f32,
    /// At most [`MAX_TOP_K`].
    pub top_k: usize,
    /// 1 is off.
    pub top_p: f32,
}

/// Samples a code for each of T positions from bf16 logits (R, T, codes), conditional and, if R is
/// 2, unconditional, with the uniform numbers `noise` (T): (T) u32, as
/// [`crate::generate::sampler::sample`]. A code is [`u32::MAX`] where logits are not finite. None
/// for operands that are not supported.
pub fn sample(logits: &Tensor, sample: &Sample, noise: &[f64]) -> Result<Option<Tensor>> {
    let (rows, tokens, columns) = logits.dims3()?;
    if !supports_bf16(&[logits]) || sample.top_k > MAX_TOP_K || noise.len() != tokens {
        return Ok(None);
    }
    let logits = logits.contiguous()?;
    let (storage, layout) = logits.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { return Ok(None) };
    let (device, all) = (&storage.device, operand::<bf16>(storage, layout)?);
    let row = |row: usize| all.slice(row * tokens * columns..(row + 1) * tokens * columns);
    let guided = rows > 1 && sample.guidance != 0.0;
    // Without guidance the kernel does not read the second operand.
    let (conditional, unconditional) = (row(0), row(usize::from(guided)));
    let noise = device.clone_htod(noise)?;
    let mut codes = device.alloc_zeros::<u32>(tokens)?;
    let (guidance, temperature) = (if guided { sample.guidance } else { 0.0 }, sample.temperature);
    let (columns, top_k, top_p) = (columns as i32, sample.top_k as i32, sample.top_p);
    launch!(
        kernel!(device, SAMPLE, "sample_bf16"),
        blocks((tokens, 1, 1), THREADS, 0),
        &conditional,
        &unconditional,
        &noise,
        &mut codes,
        &columns,
        &guidance,
        &temperature,
        &top_k,
        &top_p,
    );
    let codes = Storage::Cuda(CudaStorage::wrap_cuda_slice(codes, device.clone()));
    Ok(Some(Tensor::from_storage(codes, tokens, BackpropOp::none(), false)))
}

//! Codes drawn where the logits are.

use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Result, Storage, Tensor};
use half::bf16;

use super::{THREADS, blocks, kernel, launch, operand, takes};

const SAMPLE: (&str, &str) = ("sample", include_str!(concat!(env!("OUT_DIR"), "/sample.ptx")));

/// The most candidates that [`sample`] is asked for.
pub const MAX_TOP_K: usize = 1536;

/// What [`sample`] does with logits.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// (1 + t) conditional - t unconditional.
    pub guidance: f32,
    /// 0 takes the largest.
    pub temperature: f32,
    /// At most [`MAX_TOP_K`].
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
}

/// One code for each of T positions, by bf16 logits (R, T, codes) as [`crate::generate::sampler::sample`] draws it with the
/// numbers `noise` of (0, 1): (T) u32, [`u32::MAX`] where logits are not finite. None if they are not what the kernels take.
pub fn sample(logits: &Tensor, sample: &Sample, noise: &[f64]) -> Result<Option<Tensor>> {
    let (rows, tokens, columns) = logits.dims3()?;
    if !takes(&[logits]) || sample.top_k > MAX_TOP_K || noise.len() != tokens {
        return Ok(None);
    }
    let logits = logits.contiguous()?;
    let (storage, layout) = logits.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { return Ok(None) };
    let (device, all) = (&storage.device, operand::<bf16>(storage, layout)?);
    let row = |row: usize| all.slice(row * tokens * columns..(row + 1) * tokens * columns);
    let guided = rows > 1 && sample.guidance != 0.0;
    // Without guidance the second operand is there, but not read.
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

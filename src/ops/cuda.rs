//! Kernels for CUDA, in bf16 with f32 inside: launches of what `build.rs` compiles from the folder of this name.
//!
//! They run on GPUs of compute capability 8.0 and later. Where they do not take an operand, the plain composition does.

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Layout, Result, Shape, Storage, Tensor, bail};
use half::bf16;

const ATTENTION: (&str, &str) = ("attention", include_str!(concat!(env!("OUT_DIR"), "/attention.ptx")));
const STEP: (&str, &str) = ("step", include_str!(concat!(env!("OUT_DIR"), "/step.ptx")));
const SAMPLE: (&str, &str) = ("sample", include_str!(concat!(env!("OUT_DIR"), "/sample.ptx")));

/// Numbers in 16 bytes: what a thread reads at once.
const VECTOR: usize = 8;
/// Threads of a block, of all kernels but attention.
const THREADS: u32 = 256;

/// Whether the kernels take these operands: bf16 on a GPU that is new enough, none empty, in rows of whole vectors.
pub(super) fn takes(tensors: &[&Tensor]) -> bool {
    let fits = |t: &&Tensor| {
        let whole = t.dims().last().is_some_and(|d| d.is_multiple_of(VECTOR));
        t.dtype() == DType::BF16 && t.elem_count() > 0 && whole
    };
    let Some(Device::Cuda(device)) = tensors.first().map(|t| t.device()) else { return false };
    let capability = device.cuda_stream().context().compute_capability();
    tensors.iter().all(fits) && capability.is_ok_and(|(major, _)| major >= 8)
}

/// The elements of a contiguous operand.
fn operand<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(storage.as_cuda_slice::<T>()?.slice(start..end)),
        None => bail!("a kernel needs a contiguous operand, got strides {:?}", layout.stride()),
    }
}

fn room(device: &CudaDevice, count: usize) -> Result<CudaSlice<bf16>> {
    // SAFETY: every kernel writes all of its output before anything reads it.
    #[allow(unsafe_code)]
    unsafe {
        device.alloc(count)
    }
}

fn blocks(grid: (usize, usize), threads: u32, shared_mem_bytes: usize) -> LaunchConfig {
    let grid_dim = (grid.0 as u32, grid.1 as u32, 1);
    LaunchConfig { grid_dim, block_dim: (threads, 1, 1), shared_mem_bytes: shared_mem_bytes as u32 }
}

/// A compiled kernel, by its name.
macro_rules! kernel {
    ($device:expr, $module:expr, $name:expr) => {
        $device.get_or_load_custom_func($name, $module.0, $module.1)?
    };
}

/// Launches `$function` over `$blocks` with the arguments behind it.
///
/// What makes it sound: the types and order of the arguments are those of the kernel in the .cu file, and the grid covers
/// the operands, whose sizes the caller has checked.
macro_rules! launch {
    ($function:expr, $blocks:expr, $($argument:expr),+ $(,)?) => {{
        let function = $function;
        let mut builder = function.builder();
        $(builder.arg($argument);)+
        #[allow(unsafe_code)]
        unsafe { builder.launch($blocks) }.w()?;
    }};
}

/// [`rms_norm`](super::rms_norm()) of x (..., D).
pub(super) fn rms_norm(
    (x, lx): (&CudaStorage, &Layout),
    (w, lw): (&CudaStorage, &Layout),
    eps: f32,
) -> Result<(CudaStorage, Shape)> {
    let (device, hidden) = (&x.device, lw.shape().elem_count());
    let count = lx.shape().elem_count();
    let (x, w) = (operand::<bf16>(x, lx)?, operand::<bf16>(w, lw)?);
    let mut out = room(device, count)?;
    let (grid, hidden) = ((count / hidden, 1), hidden as i32);
    launch!(kernel!(device, STEP, "rms_norm_bf16"), blocks(grid, THREADS, 0), &x, &w, &mut out, &hidden, &eps);
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lx.shape().clone()))
}

/// [`swiglu`](super::swiglu()).
pub(super) fn swiglu(
    (gate, lg): (&CudaStorage, &Layout),
    (up, lu): (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let (device, count) = (&gate.device, lg.shape().elem_count());
    let (gate, up) = (operand::<bf16>(gate, lg)?, operand::<bf16>(up, lu)?);
    let mut out = room(device, count)?;
    let vectors = (count / VECTOR) as i64;
    let grid = ((count / VECTOR).div_ceil(THREADS as usize), 1);
    launch!(kernel!(device, STEP, "swiglu_bf16"), blocks(grid, THREADS, 0), &gate, &up, &mut out, &vectors);
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lg.shape().clone()))
}

/// [`rope`](super::rope()) of x (B, T, H, D).
pub(super) fn rope(
    (x, lx): (&CudaStorage, &Layout),
    (cos, lc): (&CudaStorage, &Layout),
    (sin, ls): (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let (device, (b, t, heads, d)) = (&x.device, lx.shape().dims4()?);
    let positions = (lc.shape().elem_count() / (d / 2)) as i32;
    let (x, cos, sin) = (operand::<bf16>(x, lx)?, operand::<f32>(cos, lc)?, operand::<f32>(sin, ls)?);
    let mut out = room(device, lx.shape().elem_count())?;
    let (grid, heads, d) = ((b * t, 1), heads as i32, d as i32);
    let rope = kernel!(device, STEP, "rope_bf16");
    launch!(rope, blocks(grid, THREADS, 0), &x, &cos, &sin, &mut out, &positions, &heads, &d);
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lx.shape().clone()))
}

/// [`group_norm`](super::group_norm()) of x (B, C, ...).
pub(super) fn group_norm(
    (x, lx): (&CudaStorage, &Layout),
    (w, lw): (&CudaStorage, &Layout),
    (b, lb): (&CudaStorage, &Layout),
    (groups, eps, silu): (usize, f32, bool),
) -> Result<(CudaStorage, Shape)> {
    /// A group is read by one block.
    const GROUP_THREADS: u32 = 1024;
    let (device, dims) = (&x.device, lx.dims());
    let (channels, area) = ((dims[1] / groups) as i32, dims[2..].iter().product::<usize>() as i64);
    let (x, w, b) = (operand::<bf16>(x, lx)?, operand::<bf16>(w, lw)?, operand::<bf16>(b, lb)?);
    let mut out = room(device, lx.shape().elem_count())?;
    let (grid, silu) = ((groups, dims[0]), i32::from(silu));
    let norm = kernel!(device, STEP, "group_norm_bf16");
    launch!(norm, blocks(grid, GROUP_THREADS, 0), &x, &w, &b, &mut out, &channels, &area, &eps, &silu);
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lx.shape().clone()))
}

/// Head sizes that [`attention`] is compiled for.
pub(super) const HEAD_DIMS: [usize; 3] = [32, 64, 128];

/// [`attention`](super::attention()) without a mask or with the causal one: q (B, T, H, D), contiguous; k and v (B, S, KV, D)
/// of any batch stride.
pub(super) fn attention(
    (q, lq): (&CudaStorage, &Layout),
    (k, lk): (&CudaStorage, &Layout),
    (v, lv): (&CudaStorage, &Layout),
    (scale, causal): (f32, bool),
) -> Result<(CudaStorage, Shape)> {
    /// Queries of a block, which it takes over all keys, and keys at a time; two of these tiles are on their way.
    const TILE: usize = 64;
    const WARPS: u32 = 4;
    let (device, (b, t, heads, d)) = (&q.device, lq.shape().dims4()?);
    let (_, s, kv, _) = lk.shape().dims4()?;
    let rows = t * (heads / kv);
    let shared = TILE * d * 2 * 5;
    let name = format!("attention_bf16_d{d}");
    let attention = kernel!(device, ATTENTION, &name);
    attention.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32).w()?;
    let blocks = blocks((rows.div_ceil(TILE), kv), 32 * WARPS, shared);
    let q = operand::<bf16>(q, lq)?;
    let (k, v) = (k.as_cuda_slice::<bf16>()?, v.as_cuda_slice::<bf16>()?);
    let mut out = room(device, lq.shape().elem_count())?;
    let (keys, tokens, causal) = (s as i32, t as i32, i32::from(causal));
    let (heads_of, kv_of) = (heads as i32, kv as i32);
    for row in 0..b {
        let part = t * heads * d;
        let q = q.slice(row * part..(row + 1) * part);
        let of = |layout: &Layout| {
            let start = layout.start_offset() + row * layout.stride()[0];
            start..start + s * kv * d
        };
        let (k, v) = (k.slice(of(lk)), v.slice(of(lv)));
        let mut out = out.slice_mut(row * part..(row + 1) * part);
        launch!(&attention, blocks, &q, &k, &v, &mut out, &keys, &tokens, &heads_of, &kv_of, &scale, &causal);
    }
    Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), lq.shape().clone()))
}

/// The most candidates that [`sample`] sorts.
pub const MAX_TOP_K: usize = 1024;

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
        blocks((tokens, 1), THREADS, 0),
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

#[cfg(test)]
mod tests;

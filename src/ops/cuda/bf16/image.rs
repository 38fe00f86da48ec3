//! Convolution and group norm of images that are channels-last in memory: (B, C, H, W) with the
//! strides of (B, H, W, C).

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute as Attribute;
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{Result, Storage, Tensor, bail};
use half::bf16;

use super::elementwise::ELEMENTWISE;
use super::tensor_map::TensorMap;
use super::{THREADS, VECTOR, address, aligned, blocks, hopper, is_bf16, kernel, launch, operand, uninit};

const CONV: (&str, &str) = ("conv", include_str!(concat!(env!("OUT_DIR"), "/conv.ptx")));
const HOPPER: (&str, &str) = ("conv_hopper", include_str!(concat!(env!("OUT_DIR"), "/conv_hopper.ptx")));

/// Output channels per block of the kernel for a few of them.
const FEW: usize = 32;
/// Numbers per thread of group norm, which sums them in f32.
const SUMMED: usize = 256;

/// Whether the kernels support an image and the other operands: bf16 on one GPU, channels in whole
/// vectors.
fn supports_image(x: &Tensor, others: &[&Tensor]) -> bool {
    let channels = x.dims().get(1).is_some_and(|c| c.is_multiple_of(VECTOR));
    x.device().is_cuda() && channels && others.iter().chain([&x]).all(|t| is_bf16(t, x.device()))
}

/// (B, C, H, W) to contiguous (B, H, W, C), without a copy if it is that in memory.
fn channels_last(x: &Tensor) -> Result<Tensor> {
    let x = x.permute((0, 2, 3, 1))?.contiguous()?;
    if aligned(&x) { Ok(x) } else { x.copy() }
}

/// Whether [`conv2d`] supports these operands: an odd kernel at stride 1 with same padding.
pub(crate) fn supports_conv2d(x: &Tensor, w: &Tensor, b: &Tensor, stride: usize, padding: [usize; 4]) -> bool {
    let side = w.dims()[2];
    supports_image(x, &[w, b]) && stride == 1 && side % 2 == 1 && padding == [side / 2; 4]
}

/// [`conv2d`](crate::ops::conv2d()) of x (B, C, H, W), with `doubled` enlarged by repeating every
/// pixel in both directions, plus the residual (B, O, H', W'), if any: (B, O, H', W').
pub(crate) fn conv2d(x: &Tensor, w: &Tensor, b: &Tensor, doubled: bool, residual: Option<&Tensor>) -> Result<Tensor> {
    let ((batch, channels, height, width), (outputs, _, side, _)) = (x.dims4()?, w.dims4()?);
    let up = usize::from(doubled);
    let (height, width) = (height << up, width << up);
    if residual.is_some_and(|r| r.dims() != [batch, outputs, height, width] || !is_bf16(r, x.device())) {
        bail!("conv2d: {:?} cannot be added to {:?}", residual.map(Tensor::dims), (batch, outputs, height, width));
    }
    let (x, w, b) = (channels_last(x)?, channels_last(w)?, b.contiguous()?);
    let residual = residual.map(channels_last).transpose()?;
    let borrowed = [&x, &w, &b, residual.as_ref().unwrap_or(&x)].map(|t| t.storage_and_layout());
    let [Storage::Cuda(x), Storage::Cuda(w), Storage::Cuda(b), Storage::Cuda(more)] =
        borrowed.each_ref().map(|(s, _)| &**s)
    else {
        bail!("conv2d: not on a GPU");
    };
    let (device, layouts) = (x.device.clone(), borrowed.each_ref().map(|(_, l)| *l));
    let (x, w) = (operand::<bf16>(x, layouts[0])?, operand::<bf16>(w, layouts[1])?);
    let (b, more) = (operand::<bf16>(b, layouts[2])?, operand::<bf16>(more, layouts[3])?);
    let pixels = batch * height * width;
    let mut out = uninit::<bf16>(&device, pixels * outputs)?;
    let [h, wide, c, o, of, double] = [height, width, channels, outputs, side, up].map(|n| n as i32);
    // A null pointer is none.
    let residual = if residual.is_some() { address(&more) } else { 0 };
    if hopper(&device) && !doubled && channels % 64 == 0 && outputs > FEW {
        // Pixels and output channels per block, and four stages of 64 input channels of a tap of
        // both, with two barriers each.
        let (across, down, kernels, stages) = (16, 8, 256, 4);
        let shared = stages * ((across * down + kernels) * 64 * 2 + 16);
        let boxes = (
            TensorMap::new(address(&x), [channels, width, height, batch], [64, across as u32, down as u32, 1])?,
            TensorMap::new(address(&w), [side * side * channels, outputs], [64, kernels as u32])?,
        );
        let blocks =
            blocks((batch * height.div_ceil(down) * width.div_ceil(across), outputs.div_ceil(kernels), 1), 384, shared);
        let function = kernel!(device, HOPPER, "conv_hopper");
        function.set_attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32).w()?;
        launch!(&function, blocks, &boxes.0, &boxes.1, &b, &residual, &mut out, &h, &wide, &c, &o, &of);
    } else {
        // Two stages.
        let (name, kernels) = if outputs > FEW { ("conv_bf16_256", 256) } else { ("conv_bf16_32", FEW) };
        let shared = 2 * (128 + kernels) * 64 * 2;
        let function = kernel!(device, CONV, name);
        function.set_attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32).w()?;
        let blocks = blocks((pixels.div_ceil(128), outputs.div_ceil(kernels), 1), THREADS, shared);
        let pixels = pixels as i32;
        launch!(&function, blocks, &x, &w, &b, &residual, &mut out, &pixels, &h, &wide, &c, &o, &of, &double);
    }
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device));
    Tensor::from_storage(storage, (batch, height, width, outputs), BackpropOp::none(), false).permute((0, 3, 1, 2))
}

/// Whether [`group_norm`] supports these operands: groups of whole vectors.
pub(crate) fn supports_group_norm(x: &Tensor, w: &Tensor, b: &Tensor, groups: usize) -> bool {
    let channels = x.dims().get(1).copied().unwrap_or(0);
    let most = VECTOR * THREADS as usize;
    x.rank() == 4
        && supports_image(x, &[w, b])
        && aligned(w)
        && aligned(b)
        && channels <= most
        && (channels / groups).is_multiple_of(VECTOR)
}

/// [`group_norm`](crate::ops::group_norm()) of x (B, C, H, W).
pub(crate) fn group_norm(
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
    (groups, eps, silu): (usize, f32, bool),
) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let (x, w, b) = (channels_last(x)?, w.contiguous()?, b.contiguous()?);
    let borrowed = [&x, &w, &b].map(|t| t.storage_and_layout());
    let [Storage::Cuda(x), Storage::Cuda(w), Storage::Cuda(b)] = borrowed.each_ref().map(|(s, _)| &**s) else {
        bail!("group_norm: not on a GPU");
    };
    let (device, layouts) = (x.device.clone(), borrowed.each_ref().map(|(_, l)| *l));
    let (x, w, b) = (operand::<bf16>(x, layouts[0])?, operand::<bf16>(w, layouts[1])?, operand::<bf16>(b, layouts[2])?);
    let area = height * width;
    let mut sums = device.alloc_zeros::<f64>(batch * groups * 2)?;
    let mut out = uninit::<bf16>(&device, batch * area * channels)?;
    let pixels = SUMMED / VECTOR * (THREADS as usize / (channels / VECTOR));
    let blocks = blocks((area.div_ceil(pixels), batch, 1), THREADS, 0);
    let [area, channels, size, pixels] = [area, channels, channels / groups, pixels].map(|n| n as i32);
    launch!(kernel!(device, ELEMENTWISE, "group_sums_bf16"), blocks, &x, &mut sums, &area, &channels, &size, &pixels);
    let (norm, silu) = (kernel!(device, ELEMENTWISE, "group_norm_bf16"), i32::from(silu));
    launch!(norm, blocks, &x, &sums, &w, &b, &mut out, &area, &channels, &size, &pixels, &eps, &silu);
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device));
    Tensor::from_storage(storage, (batch, height, width, channels as usize), BackpropOp::none(), false)
        .permute((0, 3, 1, 2))
}

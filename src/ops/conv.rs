//! Two-dimensional convolution.

mod filters;

pub use filters::Filters;

use candle_core::{Result, Shape, Tensor, bail};

use super::activation::add;
use super::cpu::columns::filled;
use super::cpu::direct_conv;
use super::cpu::im2col::{self, Geometry};
use super::cpu::operand::Operand;
use super::custom_op::{Op, apply3, supports_f32};

/// The most numbers of unfolded patches at a time on a GPU, and where candle unfolds.
const UNFOLDED: usize = 1 << 28;

/// Convolves x (B, C, H, W) with w (O, C, K, K) and adds b (O), at `stride` and with zero padding
/// of `[top, bottom, left, right]` pixels: (B, O, H', W'), of x's dtype.
///
/// Errors: shapes that do not fit, a stride of zero, or a kernel larger than the padded image.
pub fn conv2d(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stride: usize, padding: [usize; 4]) -> Result<Tensor> {
    let o = check(x, w, b, stride, padding)?;
    #[cfg(feature = "cuda")]
    if let Some(b) = b.filter(|b| super::cuda::supports_conv2d(x, w, b, stride, padding)) {
        return super::cuda::conv2d(x, w, b, false, None);
    }
    let patches = x.elem_count() * w.dims()[2] * w.dims()[2] / (stride * stride);
    let fits = x.device().is_cpu() || patches <= UNFOLDED;
    if !fits || !supports_f32(&[x, w, b.unwrap_or(w)]) {
        return composed(x, w, b, stride, padding);
    }
    let zeros = || Tensor::zeros(o, x.dtype(), x.device());
    let b = b.map_or_else(zeros, |b| Ok(b.clone()))?;
    apply3(Conv { stride, padding }, x, w, &b)
}

/// The number of output channels.
fn check(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stride: usize, padding: [usize; 4]) -> Result<usize> {
    let (_, c, height, width) = x.dims4()?;
    let (o, wc, k, kw) = w.dims4()?;
    let [top, bottom, left, right] = padding;
    if wc != c || k != kw || b.is_some_and(|b| b.dims() != [o]) {
        bail!("conv2d: {:?} does not fit kernels {:?} and bias {:?}", x.dims(), w.dims(), b.map(Tensor::dims));
    }
    if stride == 0 || k == 0 || height + top + bottom < k || width + left + right < k {
        bail!("conv2d: a kernel of {k} at stride {stride} does not fit {height}x{width} padded by {padding:?}");
    }
    Ok(o)
}

/// `residual` (B, O, H, W) plus [`conv2d`] of x (B, C, H, W) with w (O, C, K, K) of an odd K and b
/// (O), at stride 1 with same padding: (B, O, H, W).
///
/// Errors: shapes that do not fit.
pub fn add_conv2d(residual: &Tensor, x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    let padding = [w.dim(2)? / 2; 4];
    check(x, w, Some(b), 1, padding)?;
    #[cfg(feature = "cuda")]
    if super::cuda::supports_conv2d(x, w, b, 1, padding) {
        return super::cuda::conv2d(x, w, b, false, Some(residual));
    }
    add(residual, &conv2d(x, w, Some(b), 1, padding)?)
}

/// [`conv2d`] of x (B, C, H, W), enlarged by repeating every pixel in both directions, with w
/// (O, C, K, K) of an odd K and b (O), at stride 1 with same padding: (B, O, 2H, 2W).
///
/// Errors: shapes that do not fit.
pub fn upsampled_conv2d(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    let padding = [w.dim(2)? / 2; 4];
    check(x, w, Some(b), 1, padding)?;
    #[cfg(feature = "cuda")]
    if super::cuda::supports_conv2d(x, w, b, 1, padding) {
        return super::cuda::conv2d(x, w, b, true, None);
    }
    conv2d(&upsample_nearest2x(x)?, w, Some(b), 1, padding)
}

/// (B, C, H, W) to (B, C, 2H, 2W), by repeating pixels.
fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if !x.track_op() {
        return x.upsample_nearest2d(2 * h, 2 * w);
    }
    // The backward pass of candle's overwrites the gradient of x in place of adding to it.
    x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?.reshape((b, c, 2 * h, 2 * w))
}

fn composed(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stride: usize, padding: [usize; 4]) -> Result<Tensor> {
    let [top, bottom, left, right] = padding;
    let (k, width) = (w.dim(2)?, x.dim(3)?);
    let rows = UNFOLDED / (x.dim(0)? * x.dim(1)? * k * k * (width + left + right).div_ceil(stride)).max(1);
    let y = match padding == [top; 4] && rows * stride >= x.dim(2)? {
        true => x.conv2d(w, top, stride, 1, 1)?,
        false => in_strips(&x.pad_with_zeros(2, top, bottom)?.pad_with_zeros(3, left, right)?, w, stride, rows.max(1))?,
    };
    b.map_or(Ok(y.clone()), |b| y.broadcast_add(&b.reshape((1, (), 1, 1))?))
}

/// A convolution without padding, `rows` rows of the output at a time: candle unfolds all patches
/// of an image at once, which at 1024 pixels are several gigabytes.
fn in_strips(x: &Tensor, w: &Tensor, stride: usize, rows: usize) -> Result<Tensor> {
    let k = w.dim(2)?;
    let all = (x.dim(2)? - k) / stride + 1;
    if rows >= all {
        return x.conv2d(w, 0, stride, 1, 1);
    }
    let strip = |first: usize| {
        let rows = rows.min(all - first);
        x.narrow(2, first * stride, (rows - 1) * stride + k)?.contiguous()?.conv2d(w, 0, stride, 1, 1)
    };
    let strips: Vec<Tensor> = (0..all).step_by(rows).map(strip).collect::<Result<_>>()?;
    Tensor::cat(&strips, 2)
}

/// Of x (B, C, H, W), w (O, C, K, K) and b (O).
pub(super) struct Conv {
    stride: usize,
    padding: [usize; 4],
}

impl Conv {
    pub(super) fn geometry(&self, x: &Shape, w: &Shape) -> Result<Geometry> {
        let ((_, c, h, width), (o, _, k, _)) = (x.dims4()?, w.dims4()?);
        let [top, bottom, left, right] = self.padding;
        let out = |size: usize| (size - k) / self.stride + 1;
        let (out_h, out_w) = (out(h + top + bottom), out(width + left + right));
        Ok(Geometry { c, h, w: width, o, k, stride: self.stride, top, left, out_h, out_w })
    }
}

impl Op<3> for Conv {
    const NAME: &'static str = "conv2d";

    fn forward(&self, [x, w, b]: [Operand; 3]) -> Result<(Vec<f32>, Shape)> {
        let g = self.geometry(x.shape(), w.shape())?;
        let batch = x.dims()[0];
        let shape = Shape::from((batch, g.o, g.out_h, g.out_w));
        let (x, w, b) = (x.slice()?, w.slice()?, b.slice()?);
        let y = match direct_conv::supports(&g) {
            true => filled(batch * g.o * g.out_area(), |y| direct_conv::convolve(&g, x, w, b, y))?,
            false => im2col::convolve(&g, x, w, b),
        };
        Ok((y, shape))
    }

    fn backward(&self, [x, w, _]: [Operand; 3], wanted: [bool; 3], dy: &[f32]) -> Result<[Option<Vec<f32>>; 3]> {
        let g = self.geometry(x.shape(), w.shape())?;
        let [want_x, want_w, _] = wanted;
        Ok(im2col::convolve_back(&g, x.slice()?, w.slice()?, dy, (want_x, want_w)).map(Some))
    }
}

#[cfg(test)]
mod tests;

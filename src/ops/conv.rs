//! Two-dimensional convolution: as a matrix product over unfolded patches, or, at stride 1, place by place.

mod filters;
mod places;

pub use filters::Filters;

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::activation::add;
use super::columns::filled;
use super::resize::upsample_nearest2x;
use super::slice::{self, Borrowed, Into, Matrix, MatrixMut, gemm};

/// Floats of unfolded patches per thread: what bounds memory and stays near the caches.
const PATCHES: usize = 1 << 20;
/// Numbers of unfolded patches at a time on a GPU, and where candle does it.
const UNFOLDED: usize = 1 << 28;

/// Convolves x (B, C, H, W) with w (O, C, K, K) and adds b (O), at `stride` and with zero padding of `[top, bottom,
/// left, right]` pixels: (B, O, H', W'), of x's dtype.
///
/// Errors when the shapes do not fit, the stride is zero, or the kernel is larger than the padded image.
pub fn conv2d(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stride: usize, padding: [usize; 4]) -> Result<Tensor> {
    let o = check(x, w, b, stride, padding)?;
    #[cfg(feature = "cuda")]
    if let Some(b) = b.filter(|b| super::cuda::convolves(x, w, b, stride, padding)) {
        return super::cuda::conv2d(x, w, b, false, None);
    }
    let patches = x.elem_count() * w.dims()[2] * w.dims()[2] / (stride * stride);
    let fits = x.device().is_cpu() || patches <= UNFOLDED;
    if !fits || !slice::trained(&[x, w, b.unwrap_or(w)]) {
        return plain(x, w, b, stride, padding);
    }
    let b = b.map_or_else(|| Tensor::zeros(o, x.dtype(), x.device()), Tensor::contiguous)?;
    x.contiguous()?.apply_op3(&w.contiguous()?, &b, Conv { stride, padding })
}

/// How many kernels there are, if they fit.
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

/// `base` (B, O, H, W) and [`conv2d`] of x (B, C, H, W) with w (O, C, K, K) of an odd side and b (O), padded so that the image
/// keeps its size: (B, O, H, W).
///
/// Errors when the shapes do not fit.
pub fn add_conv2d(base: &Tensor, x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    let padding = [w.dim(2)? / 2; 4];
    check(x, w, Some(b), 1, padding)?;
    #[cfg(feature = "cuda")]
    if super::cuda::convolves(x, w, b, 1, padding) {
        return super::cuda::conv2d(x, w, b, false, Some(base));
    }
    add(base, &conv2d(x, w, Some(b), 1, padding)?)
}

/// As [`conv2d`] of x (B, C, H, W) with every pixel repeated in both directions and w (O, C, K, K) of an odd side, padded so
/// that this image keeps its size: (B, O, 2H, 2W).
///
/// Errors when the shapes do not fit.
pub fn upsampled_conv2d(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    let padding = [w.dim(2)? / 2; 4];
    check(x, w, Some(b), 1, padding)?;
    #[cfg(feature = "cuda")]
    if super::cuda::convolves(x, w, b, 1, padding) {
        return super::cuda::conv2d(x, w, b, true, None);
    }
    conv2d(&upsample_nearest2x(x)?, w, Some(b), 1, padding)
}

fn plain(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stride: usize, padding: [usize; 4]) -> Result<Tensor> {
    let [top, bottom, left, right] = padding;
    let (k, width) = (w.dim(2)?, x.dim(3)?);
    let rows = UNFOLDED / (x.dim(0)? * x.dim(1)? * k * k * (width + left + right).div_ceil(stride)).max(1);
    let y = match padding == [top; 4] && rows * stride >= x.dim(2)? {
        true => x.conv2d(w, top, stride, 1, 1)?,
        false => in_strips(&x.pad_with_zeros(2, top, bottom)?.pad_with_zeros(3, left, right)?, w, stride, rows.max(1))?,
    };
    b.map_or(Ok(y.clone()), |b| y.broadcast_add(&b.reshape((1, (), 1, 1))?))
}

/// A convolution without padding, `rows` rows of the result at a time: candle unfolds all patches of an image at once, which
/// at 1024 pixels are several gigabytes.
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

struct Conv {
    stride: usize,
    padding: [usize; 4],
}

/// The sizes of one convolution.
pub(super) struct Geometry {
    pub(super) c: usize,
    pub(super) h: usize,
    pub(super) w: usize,
    pub(super) o: usize,
    pub(super) k: usize,
    pub(super) stride: usize,
    pub(super) top: usize,
    pub(super) left: usize,
    pub(super) out_h: usize,
    pub(super) out_w: usize,
}

impl Geometry {
    fn new(op: &Conv, x: &Shape, w: &Shape) -> Result<Self> {
        let ((_, c, h, width), (o, _, k, _)) = (x.dims4()?, w.dims4()?);
        let [top, bottom, left, right] = op.padding;
        let out = |size: usize| (size - k) / op.stride + 1;
        let (out_h, out_w) = (out(h + top + bottom), out(width + left + right));
        Ok(Self { c, h, w: width, o, k, stride: op.stride, top, left, out_h, out_w })
    }

    /// Elements of one patch, the inner dimension of the product.
    pub(super) fn patch(&self) -> usize {
        self.c * self.k * self.k
    }

    pub(super) fn out_area(&self) -> usize {
        self.out_h * self.out_w
    }

    /// Whether the image is its own matrix of patches.
    fn pointwise(&self) -> bool {
        self.k == 1 && self.stride == 1 && self.out_area() == self.h * self.w
    }

    /// Output rows that are unfolded at once.
    fn band(&self) -> usize {
        (PATCHES / (self.patch() * self.out_w)).clamp(1, self.out_h)
    }

    fn bands(&self) -> impl Iterator<Item = Range<usize>> {
        let (band, end) = (self.band(), self.out_h);
        (0..end).step_by(band).map(move |first| first..(first + band).min(end))
    }

    fn scratch(&self) -> Vec<f32> {
        vec![0f32; if self.pointwise() { 0 } else { self.patch() * self.band() * self.out_w }]
    }

    /// For each tap (i, j) and output row: its place among a channel's patches, its input row if that is not
    /// padding, the output columns whose input is not, and the input column of the first of them.
    fn taps(&self, rows: &Range<usize>) -> impl Iterator<Item = (usize, Option<usize>, Range<usize>, usize)> {
        let inside = |tap: usize, pad: usize, size: usize, out: usize| {
            let end = (size + pad).saturating_sub(tap).div_ceil(self.stride).min(out);
            pad.saturating_sub(tap).div_ceil(self.stride).min(end)..end
        };
        let (rows, count) = (rows.clone(), rows.len());
        (0..self.k * self.k).flat_map(move |tap| {
            let (i, j) = (tap / self.k, tap % self.k);
            let ys = inside(i, self.top, self.h, self.out_h);
            let xs = inside(j, self.left, self.w, self.out_w);
            rows.clone().enumerate().map(move |(n, y)| {
                let row = ys.contains(&y).then(|| y * self.stride + i - self.top);
                let first = (xs.start * self.stride + j).saturating_sub(self.left);
                ((tap * count + n) * self.out_w, row, xs.clone(), first)
            })
        })
    }

    /// Unfolds the patches of output `rows` into `patches` (C·K·K, rows · out_w).
    fn unfold(&self, x: &[f32], rows: &Range<usize>, patches: &mut [f32], all: bool) {
        let channel = self.k * self.k * rows.len() * self.out_w;
        let channels = patches.par_chunks_mut(channel).zip(x.par_chunks(self.h * self.w));
        channels.with_min_len(if all { 1 } else { self.c }).for_each(|(patches, x)| {
            self.taps(rows).for_each(|(at, row, xs, first)| {
                let out = &mut patches[at..at + self.out_w];
                let Some(row) = row.filter(|_| !xs.is_empty()) else {
                    return out.fill(0.0);
                };
                let line = &x[row * self.w..][first..self.w.max(first)];
                out[..xs.start].fill(0.0);
                out[xs.end..].fill(0.0);
                let out = &mut out[xs];
                match self.stride {
                    1 => out.copy_from_slice(&line[..out.len()]),
                    stride => out.iter_mut().zip(line.iter().step_by(stride)).for_each(|(out, x)| *out = *x),
                }
            });
        });
    }

    /// Adds the gradients of the patches of output `rows` to those of the image: the transpose of `unfold`.
    fn fold(&self, patches: &[f32], rows: &Range<usize>, dx: &mut [f32], all: bool) {
        let channel = self.k * self.k * rows.len() * self.out_w;
        let channels = dx.par_chunks_mut(self.h * self.w).zip(patches.par_chunks(channel));
        channels.with_min_len(if all { 1 } else { self.c }).for_each(|(dx, patches)| {
            self.taps(rows).for_each(|(at, row, xs, first)| {
                let Some(row) = row.filter(|_| !xs.is_empty()) else { return };
                let grads = &patches[at..at + self.out_w][xs];
                let line = &mut dx[row * self.w..(row + 1) * self.w][first..];
                match self.stride {
                    1 => line.iter_mut().zip(grads).for_each(|(dx, g)| *dx += g),
                    stride => line.iter_mut().step_by(stride).zip(grads).for_each(|(dx, g)| *dx += g),
                }
            });
        });
    }
}

impl CustomOp3 for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let g = Geometry::new(self, l1.shape(), l2.shape())?;
        let (x, w): (&[f32], &[f32]) = (slice::contiguous(s1, l1)?, slice::contiguous(s2, l2)?);
        let bias: &[f32] = slice::contiguous(s3, l3)?;
        let (n, area, batch) = (g.patch(), g.out_area(), l1.dims()[0]);
        if places::suits(&g) {
            let y = filled(batch * g.o * area, |y| places::convolve(&g, x, w, bias, y))?;
            return Ok((CpuStorage::F32(y), Shape::from((batch, g.o, g.out_h, g.out_w))));
        }
        // Images share nothing; where they are too few for all threads, each is split.
        let all = batch < rayon::current_num_threads();
        let mut y = vec![0f32; batch * g.o * area];
        y.par_chunks_mut(g.o * area).zip(x.par_chunks(g.c * g.h * g.w)).for_each_init(
            || g.scratch(),
            |scratch, (y, x)| {
                y.chunks_exact_mut(area).zip(bias).for_each(|(y, b)| y.fill(*b));
                let kernels = Matrix::new(w, g.o, n);
                if g.pointwise() {
                    return gemm(MatrixMut::new(y, g.o, area), Into::Add, kernels, Matrix::new(x, n, area), 1.0, all);
                }
                for rows in g.bands() {
                    let cols = rows.len() * g.out_w;
                    let patches = &mut scratch[..n * cols];
                    g.unfold(x, &rows, patches, all);
                    let y = MatrixMut::strided(&mut y[rows.start * g.out_w..], g.o, cols, area);
                    gemm(y, Into::Add, kernels, Matrix::new(patches, n, cols), 1.0, all);
                }
            },
        );
        Ok((CpuStorage::F32(y), Shape::from((batch, g.o, g.out_h, g.out_w))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        super::cuda::training::conv2d(&Geometry::new(self, l1.shape(), l2.shape())?, (s1, l1), (s2, l2), (s3, l3))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let g = Geometry::new(self, x.shape(), w.shape())?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let [dx, dw, db] = super::cuda::training::conv2d_back(&g, x, w, b, dy)?;
            return Ok((dx, dw, db));
        }
        let dy = dy.contiguous()?;
        let (bx, bw, bdy) = (Borrowed::of(x), Borrowed::of(w), Borrowed::of(&dy));
        let (xs, ws, dys) = (bx.slice::<f32>()?, bw.slice::<f32>()?, bdy.slice::<f32>()?);
        let (n, area, image) = (g.patch(), g.out_area(), g.c * g.h * g.w);
        let all = x.dim(0)? < rayon::current_num_threads();
        let (need_dx, need_dw) = (x.track_op(), w.track_op());
        let mut dx = vec![0f32; xs.len()];
        let images = dx.par_chunks_mut(image).zip(xs.par_chunks(image)).zip(dys.par_chunks(g.o * area));
        let start = || (vec![0f32; g.o * n], vec![0f32; g.o], g.scratch());
        let sums = images.fold(start, |(mut dw, mut db, mut scratch), ((dx, x), dy)| {
            db.iter_mut().zip(dy.chunks_exact(area)).for_each(|(db, dy)| *db += slice::sum(dy, dy, |dy, _| dy));
            let kernels = Matrix::new(ws, g.o, n);
            let mut product = |dy: Matrix, patches: Matrix| {
                gemm(MatrixMut::new(&mut dw, g.o, n), Into::Add, dy, patches.t(), 1.0, all);
            };
            if g.pointwise() {
                let dy = Matrix::new(dy, g.o, area);
                product(dy, Matrix::new(x, n, area));
                gemm(MatrixMut::new(dx, n, area), Into::Overwrite, kernels.t(), dy, 1.0, all);
                return (dw, db, scratch);
            }
            for rows in g.bands() {
                let cols = rows.len() * g.out_w;
                let patches = &mut scratch[..n * cols];
                let dy = Matrix::strided(&dy[rows.start * g.out_w..], g.o, cols, area);
                if need_dw {
                    g.unfold(x, &rows, patches, all);
                    product(dy, Matrix::new(patches, n, cols));
                }
                if need_dx {
                    gemm(MatrixMut::new(patches, n, cols), Into::Overwrite, kernels.t(), dy, 1.0, all);
                    g.fold(patches, &rows, dx, all);
                }
            }
            (dw, db, scratch)
        });
        let zeros = || (vec![0f32; g.o * n], vec![0f32; g.o]);
        let join = |(dw, db), (more_dw, more_db)| (slice::add(dw, more_dw), slice::add(db, more_db));
        let (dw, db) = sums.map(|(dw, db, _)| (dw, db)).reduce(zeros, join);
        Ok((slice::gradient(x, dx)?, slice::gradient(w, dw)?, slice::gradient(b, db)?))
    }
}

#[cfg(test)]
mod tests;

//! Normalisation over the last dimension.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendStorage};
use rayon::prelude::*;

use super::slice::{self, Borrowed};

/// Elements one thread takes at a time, in whole rows: fewer are not worth waking another.
const CHUNK: usize = 1 << 15;

/// `x / sqrt(mean(x²) + eps) * w` over the last dimension of x (..., D), with w (D): x's shape and dtype.
///
/// Errors when `w` does not fit.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    check("rms_norm", x, w)?;
    match slice::kernels(&[x, w]) {
        true => x.contiguous()?.apply_op2(&w.contiguous()?, RmsNorm { eps }),
        false => plain_rms(x, w, eps),
    }
}

/// `(x - mean) / sqrt(variance + eps) * w + b` over the last dimension of x (..., D), with w and b (D): x's shape and
/// dtype.
///
/// Errors when `w` or `b` does not fit.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    check("layer_norm", x, w)?;
    check("layer_norm", x, b)?;
    match slice::trained(&[x, w, b]) {
        true => x.contiguous()?.apply_op3(&w.contiguous()?, &b.contiguous()?, LayerNorm { eps: eps as f32 }),
        false => plain_layer(x, w, b, eps),
    }
}

fn check(name: &str, x: &Tensor, w: &Tensor) -> Result<()> {
    if w.rank() != 1 || x.dims().last() != w.dims().last() {
        bail!("{name}: {:?} does not fit weights {:?}", x.dims(), w.dims());
    }
    Ok(())
}

fn plain_rms(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let rms = (wide.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
    wide.broadcast_div(&rms)?.to_dtype(x.dtype())?.broadcast_mul(w)
}

fn plain_layer(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    centred.broadcast_div(&deviation)?.to_dtype(x.dtype())?.broadcast_mul(w)?.broadcast_add(b)
}

/// Mean and inverse standard deviation, in two passes over `x`.
#[inline(always)]
pub(super) fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = slice::sum(x, x, |x, _| x) / n;
    let variance = slice::sum(x, x, |x, _| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (slice::sum(x, x, |a, b| a * b) / x.len() as f32 + eps).sqrt()
}

/// About [`CHUNK`] elements in rows of `d`.
fn whole_rows(d: usize) -> usize {
    d * (CHUNK / d).max(1)
}

/// The rows of `x` with those of an output of its shape, on all threads.
fn map_rows(x: &[f32], d: usize, row: impl Fn(&mut [f32], &[f32]) + Sync) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    out.par_chunks_mut(whole_rows(d)).zip(x.par_chunks(whole_rows(d))).for_each(|(out, x)| {
        slice::wide(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    row(out, x);
                }
            },
        );
    });
    out
}

/// The backward pass of rows: `row` gets dx, x, dy and the sums that `width` floats of weight gradient need.
fn map_rows_back(
    x: &[f32],
    dy: &[f32],
    d: usize,
    width: usize,
    row: impl Fn(&mut [f32], &[f32], &[f32], &mut [f32]) + Sync,
) -> (Vec<f32>, Vec<f32>) {
    let mut dx = vec![0f32; x.len()];
    let zeros = || vec![0f32; width];
    let blocks = dx.par_chunks_mut(whole_rows(d)).zip(x.par_chunks(whole_rows(d))).zip(dy.par_chunks(whole_rows(d)));
    let block = |mut sums: Vec<f32>, ((dx, x), dy): ((&mut [f32], &[f32]), &[f32])| {
        for ((dx, x), dy) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d)) {
            row(dx, x, dy, &mut sums);
        }
        sums
    };
    let sums = blocks.fold(zeros, block).reduce(zeros, slice::add);
    (dx, sums)
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (slice::contiguous(s1, l1)?, slice::contiguous::<f32>(s2, l2)?);
        let y = map_rows(x, w.len(), |y, x| {
            let r = inverse_rms(x, self.eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
        });
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        match s1.dtype() {
            DType::F32 => super::cuda::training::rms_norm((s1, l1), (s2, l2), self.eps),
            _ => super::cuda::rms_norm((s1, l1), (s2, l2), self.eps),
        }
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (dx, dw) = super::cuda::training::rms_norm_back(x, w, dy, self.eps)?;
            return Ok((Some(dx), Some(dw)));
        }
        let dy = dy.contiguous()?;
        let (bx, bw, bdy) = (Borrowed::of(x), Borrowed::of(w), Borrowed::of(&dy));
        let ws = bw.slice::<f32>()?;
        let d = ws.len();
        let (dx, dw) = map_rows_back(bx.slice()?, bdy.slice()?, d, d, |dx, x, dy, dw| {
            let r = inverse_rms(x, self.eps);
            for ((((dx, x), dy), w), dw) in dx.iter_mut().zip(x).zip(dy).zip(ws).zip(dw) {
                *dx = dy * w;
                *dw += dy * x * r;
            }
            let c = slice::sum(dx, x, |a, b| a * b) * r * r * r / d as f32;
            dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = *dx * r - x * c);
        });
        Ok((slice::gradient(x, dx)?, slice::gradient(w, dw)?))
    }
}

struct LayerNorm {
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
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
        let (x, w, b) = (slice::contiguous(s1, l1)?, slice::contiguous::<f32>(s2, l2)?, slice::contiguous(s3, l3)?);
        let y = map_rows(x, w.len(), |y, x| {
            let (mean, r) = moments(x, self.eps);
            y.iter_mut().zip(x).zip(w).zip(b).for_each(|(((y, x), w), b): (_, &f32)| *y = (x - mean) * r * w + b);
        });
        Ok((CpuStorage::F32(y), l1.shape().clone()))
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
        super::cuda::training::layer_norm((s1, l1), (s2, l2), (s3, l3), self.eps)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            let (dx, dw, db) = super::cuda::training::layer_norm_back(x, w, dy, self.eps)?;
            return Ok((Some(dx), Some(dw), Some(db)));
        }
        let dy = dy.contiguous()?;
        let (bx, bw, bdy) = (Borrowed::of(x), Borrowed::of(w), Borrowed::of(&dy));
        let ws = bw.slice::<f32>()?;
        let d = ws.len();
        let (dx, mut dw) = map_rows_back(bx.slice()?, bdy.slice()?, d, 2 * d, |dx, x, dy, sums| {
            let (mean, r) = moments(x, self.eps);
            let (dw, db) = sums.split_at_mut(d);
            for (((((dx, x), dy), w), dw), db) in dx.iter_mut().zip(x).zip(dy).zip(ws).zip(dw).zip(db) {
                *dx = dy * w;
                *dw += dy * (x - mean) * r;
                *db += dy;
            }
            let shift = slice::sum(dx, x, |dx, _| dx) / d as f32;
            let slope = slice::sum(dx, x, |dx, x| dx * (x - mean)) * r * r / d as f32;
            dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = r * (*dx - shift - (x - mean) * slope));
        });
        let db = dw.split_off(d);
        Ok((slice::gradient(x, dx)?, slice::gradient(w, dw)?, slice::gradient(b, db)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{random, same};
    use super::*;

    #[test]
    fn match_the_compositions() {
        for d in [5, 16, 43] {
            let (x, w, b) = (random((2, 70, d), 1), random(d, 2), random(d, 3));
            same(&[&x, &w], || rms_norm(&x, &w, 1e-6), || plain_rms(&x, &w, 1e-6));
            same(&[&x, &w, &b], || layer_norm(&x, &w, &b, 1e-6), || plain_layer(&x, &w, &b, 1e-6));
            let turned = || x.transpose(0, 1);
            same(&[&x, &w], || rms_norm(&turned()?, &w, 1e-6), || plain_rms(&turned()?, &w, 1e-6));
        }
    }

    #[test]
    fn reject_weights_that_do_not_fit() {
        let (x, w, b) = (random((2, 6), 1), random(6, 2), random(2, 3));
        assert!(rms_norm(&x, &b, 1e-6).is_err());
        assert!(layer_norm(&x, &w, &b, 1e-6).is_err());
    }
}

//! Group normalisation with an optional SiLU after it.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::exp::exp;
use super::norm::moments;
use super::slice::{self, Borrowed};

/// Normalises x (B, C, ...) over each of `groups` groups of channels, scales by w (C), shifts by b (C) and, with
/// `silu`, applies `y * sigmoid(y)`: x's shape and dtype.
///
/// Errors when `groups` does not divide C, or `w` or `b` does not fit.
pub fn group_norm(x: &Tensor, w: &Tensor, b: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    let c = x.dim(1)?;
    if groups == 0 || c % groups != 0 || w.dims() != [c] || b.dims() != [c] {
        bail!("group_norm: {:?} in {groups} groups does not fit {:?} and {:?}", x.dims(), w.dims(), b.dims());
    }
    #[cfg(feature = "cuda")]
    if super::cuda::normalises(x, w, b, groups) {
        return super::cuda::group_norm(x, w, b, (groups, eps as f32, silu));
    }
    if x.rank() < 3 || !slice::trained(&[x, w, b]) {
        return plain(x, w, b, groups, eps, silu);
    }
    let op = GroupNorm { groups, eps: eps as f32, silu };
    x.contiguous()?.apply_op3(&w.contiguous()?, &b.contiguous()?, op)
}

fn plain(x: &Tensor, w: &Tensor, b: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?.reshape((x.dim(0)?, groups, ()))?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(2)?)?;
    let normed = centred.broadcast_div(&(centred.sqr()?.mean_keepdim(2)? + eps)?.sqrt()?)?;
    let mut per_channel = vec![1; x.rank()];
    per_channel[1] = x.dim(1)?;
    let (w, b) = (w.reshape(per_channel.clone())?, b.reshape(per_channel)?);
    let y = normed.reshape(x.shape())?.to_dtype(x.dtype())?.broadcast_mul(&w)?.broadcast_add(&b)?;
    if silu { y.silu() } else { Ok(y) }
}

struct GroupNorm {
    groups: usize,
    eps: f32,
    silu: bool,
}

/// Elements of one channel and channels of one group.
fn sizes(dims: &[usize], groups: usize) -> (usize, usize) {
    (dims[2..].iter().product(), dims[1] / groups)
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group-norm"
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
        let x: &[f32] = slice::contiguous(s1, l1)?;
        let (w, b): (&[f32], &[f32]) = (slice::contiguous(s2, l2)?, slice::contiguous(s3, l3)?);
        let (area, channels) = sizes(l1.dims(), self.groups);
        let group = area * channels;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(group).zip(x.par_chunks(group)).enumerate().for_each(|(i, (out, x))| {
            let (mean, r) = moments(x, self.eps);
            let first = i % self.groups * channels;
            let weights = w[first..].iter().zip(&b[first..]);
            for ((out, x), (w, b)) in out.chunks_exact_mut(area).zip(x.chunks_exact(area)).zip(weights) {
                let (scale, shift) = (w * r, b - mean * r * w);
                let affine = out.iter_mut().zip(x.iter().map(|x| x * scale + shift));
                match self.silu {
                    true => affine.for_each(|(out, y)| *out = y / (1.0 + exp(-y))),
                    false => affine.for_each(|(out, y)| *out = y),
                }
            }
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
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
        let choices = (self.groups, self.eps, self.silu);
        super::cuda::training::group_norm((s1, l1), (s2, l2), (s3, l3), choices)
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
            let choices = (self.groups, self.eps, self.silu);
            let [dx, dw, db] = super::cuda::training::group_norm_back([x, w, b, dy], choices)?;
            return Ok((Some(dx), Some(dw), Some(db)));
        }
        let dy = dy.contiguous()?;
        let (bx, bw, bb, bdy) = (Borrowed::of(x), Borrowed::of(w), Borrowed::of(b), Borrowed::of(&dy));
        let (xs, ws, bs, dys) = (bx.slice::<f32>()?, bw.slice::<f32>()?, bb.slice::<f32>()?, bdy.slice::<f32>()?);
        let (area, channels) = sizes(x.dims(), self.groups);
        let (group, c) = (area * channels, ws.len());
        let mut dx = vec![0f32; xs.len()];
        let zeros = || vec![0f32; 2 * c];
        let blocks = dx.par_chunks_mut(group).zip(xs.par_chunks(group)).zip(dys.par_chunks(group)).enumerate();
        let sums = blocks.fold(zeros, |mut sums, (i, ((dx, x), dy))| {
            let (mean, r) = moments(x, self.eps);
            let first = i % self.groups * channels;
            let (dw, db) = sums.split_at_mut(c);
            let (mut slope, mut shift) = (0.0, 0.0);
            for k in 0..channels {
                let ch = first + k;
                let span = k * area..(k + 1) * area;
                let (dx, x, dy) = (&mut dx[span.clone()], &x[span.clone()], &dy[span]);
                match self.silu {
                    true => silu_back(dx, x, dy, ws[ch] * r, bs[ch] - mean * r * ws[ch]),
                    false => dx.copy_from_slice(dy),
                }
                let along = slice::sum(dx, x, |dx, x| dx * (x - mean)) * r;
                let total = slice::sum(dx, x, |dx, _| dx);
                dw[ch] += along;
                db[ch] += total;
                slope += along * ws[ch];
                shift += total * ws[ch];
            }
            let (slope, shift) = (slope * r / group as f32, shift / group as f32);
            let channels = dx.chunks_exact_mut(area).zip(x.chunks_exact(area)).zip(&ws[first..]);
            for ((dx, x), w) in channels {
                dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = r * (*dx * w - shift - (x - mean) * slope));
            }
            sums
        });
        let mut dw = sums.reduce(zeros, slice::add);
        let db = dw.split_off(c);
        Ok((slice::gradient(x, dx)?, slice::gradient(w, dw)?, slice::gradient(b, db)?))
    }
}

/// Takes `dy` back through the SiLU of `y = x * scale + shift`.
fn silu_back(dx: &mut [f32], x: &[f32], dy: &[f32], scale: f32, shift: f32) {
    for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
        let y = x * scale + shift;
        let s = 1.0 / (1.0 + exp(-y));
        *dx = dy * s * (1.0 + y * (1.0 - s));
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{random, same};
    use super::*;

    #[test]
    fn matches_the_composition() {
        let (x, w, b) = (random((3, 6, 5, 3), 1), random(6, 2), random(6, 3));
        for (groups, silu) in [(1, false), (2, true), (6, true)] {
            let kernel = || group_norm(&x, &w, &b, groups, 1e-6, silu);
            same(&[&x, &w, &b], kernel, || plain(&x, &w, &b, groups, 1e-6, silu));
        }
    }

    #[test]
    fn rejects_groups_that_do_not_divide() {
        let (x, w) = (random((1, 6, 2, 2), 1), random(6, 2));
        assert!(group_norm(&x, &w, &w, 4, 1e-6, false).is_err());
        assert!(group_norm(&x, &w, &w, 0, 1e-6, false).is_err());
    }
}

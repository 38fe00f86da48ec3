//! Group normalisation with an optional SiLU after it.

use candle_core::{Module, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::exp::exp;
use super::cpu::operand::Operand;
use super::cpu::reduce::{self, moments};
use super::custom_op::{Op, apply3, supports_f32};

/// Normalises x (B, C, ...) over each of `groups` groups of channels, scales by w (C), shifts by b
/// (C) and, with `silu`, applies `y * sigmoid(y)`: x's shape and dtype.
///
/// Errors: `groups` that do not divide C, a `w` or `b` of another shape, or an x without pixels.
pub fn group_norm(x: &Tensor, w: &Tensor, b: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    let c = x.dim(1)?;
    if groups == 0 || c % groups != 0 || w.dims() != [c] || b.dims() != [c] || x.rank() < 3 {
        bail!("group_norm: {:?} in {groups} groups does not fit {:?} and {:?}", x.dims(), w.dims(), b.dims());
    }
    #[cfg(feature = "cuda")]
    if super::cuda::supports_group_norm(x, w, b, groups) {
        return super::cuda::group_norm(x, w, b, (groups, eps as f32, silu));
    }
    if !supports_f32(&[x, w, b]) {
        return composed(x, w, b, groups, eps, silu);
    }
    apply3(GroupNorm { groups, eps: eps as f32, silu }, x, w, b)
}

fn composed(x: &Tensor, w: &Tensor, b: &Tensor, groups: usize, eps: f64, silu: bool) -> Result<Tensor> {
    let y = candle_nn::GroupNorm::new(w.clone(), b.clone(), x.dim(1)?, groups, eps)?.forward(x)?;
    if silu { y.silu() } else { Ok(y) }
}

pub(super) struct GroupNorm {
    pub(super) groups: usize,
    pub(super) eps: f32,
    pub(super) silu: bool,
}

impl GroupNorm {
    /// Elements of one channel, and channels of one group.
    fn sizes(&self, dims: &[usize]) -> (usize, usize) {
        (dims[2..].iter().product(), dims[1] / self.groups)
    }
}

impl Op<3> for GroupNorm {
    const NAME: &'static str = "group-norm";

    fn forward(&self, [x, w, b]: [Operand; 3]) -> Result<(Vec<f32>, Shape)> {
        let ((area, channels), shape) = (self.sizes(x.dims()), x.shape().clone());
        let (x, w, b) = (x.slice::<f32>()?, w.slice::<f32>()?, b.slice::<f32>()?);
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
        Ok((out, shape))
    }

    fn backward(&self, [x, w, b]: [Operand; 3], _: [bool; 3], dy: &[f32]) -> Result<[Option<Vec<f32>>; 3]> {
        let (area, channels) = self.sizes(x.dims());
        let (x, w, b) = (x.slice::<f32>()?, w.slice::<f32>()?, b.slice::<f32>()?);
        let (group, c) = (area * channels, w.len());
        let mut dx = vec![0f32; x.len()];
        let zeros = || vec![0f32; 2 * c];
        let blocks = dx.par_chunks_mut(group).zip(x.par_chunks(group)).zip(dy.par_chunks(group)).enumerate();
        let mut dw = reduce::sums_in_order(blocks, zeros, |mut sums, (i, ((dx, x), dy))| {
            let (mean, r) = moments(x, self.eps);
            let first = i % self.groups * channels;
            let (dw, db) = sums.split_at_mut(c);
            let (mut slope, mut shift) = (0.0, 0.0);
            for k in 0..channels {
                let ch = first + k;
                let span = k * area..(k + 1) * area;
                let (dx, x, dy) = (&mut dx[span.clone()], &x[span.clone()], &dy[span]);
                match self.silu {
                    true => silu_back(dx, x, dy, w[ch] * r, b[ch] - mean * r * w[ch]),
                    false => dx.copy_from_slice(dy),
                }
                let along = reduce::sum(dx, x, |dx, x| dx * (x - mean)) * r;
                let total = reduce::sum(dx, x, |dx, _| dx);
                dw[ch] += along;
                db[ch] += total;
                slope += along * w[ch];
                shift += total * w[ch];
            }
            let (slope, shift) = (slope * r / group as f32, shift / group as f32);
            let channels = dx.chunks_exact_mut(area).zip(x.chunks_exact(area)).zip(&w[first..]);
            for ((dx, x), w) in channels {
                dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = r * (*dx * w - shift - (x - mean) * slope));
            }
            sums
        });
        let db = dw.split_off(c);
        Ok([Some(dx), Some(dw), Some(db)])
    }
}

/// Propagates `dy` through the SiLU of `y = x * scale + shift`.
fn silu_back(dx: &mut [f32], x: &[f32], dy: &[f32], scale: f32, shift: f32) {
    for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
        let y = x * scale + shift;
        let s = 1.0 / (1.0 + exp(-y));
        *dx = dy * s * (1.0 + y * (1.0 - s));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{random, same};
    use super::*;

    #[test]
    fn norms_are_those_of_candle_nn() {
        let (x, w, b) = (random((3, 6, 5, 3), 1), random(6, 2), random(6, 3));
        for (groups, silu) in [(1, false), (2, true), (6, true)] {
            let kernel = || group_norm(&x, &w, &b, groups, 1e-6, silu);
            same(&[&x, &w, &b], kernel, || composed(&x, &w, &b, groups, 1e-6, silu));
        }
    }

    #[test]
    fn groups_that_do_not_divide_are_refused() {
        let (x, w) = (random((1, 6, 2, 2), 1), random(6, 2));
        assert!(group_norm(&x, &w, &w, 4, 1e-6, false).is_err());
        assert!(group_norm(&x, &w, &w, 0, 1e-6, false).is_err());
        assert!(group_norm(&random((1, 6), 1), &w, &w, 2, 1e-6, false).is_err());
    }
}

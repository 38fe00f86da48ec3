//! What adaptive layer norms (AdaLN) do to a residual stream: a norm whose scale and shift belong
//! to the row, and a sum with a gate that does.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::operand::{Operand, are_f32};
use super::cpu::reduce::{moments, vectorized};

/// Elements one thread takes at a time, in whole positions: fewer are not worth waking another.
const CHUNK: usize = 1 << 15;

/// `(x - mean) / sqrt(variance + eps) * (1 + scale) + shift` over the last dimension of x
/// (R, T, C), with a scale and a shift (R, C) for each row: x's shape, in f32.
///
/// Errors when the shapes do not fit.
pub fn modulated_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f64) -> Result<Tensor> {
    check("modulated_norm", x, scale)?;
    check("modulated_norm", x, shift)?;
    match are_f32(&[x, scale, shift]) {
        true => {
            let op = Modulate::Norm { eps: eps as f32 };
            x.contiguous()?.apply_op3_no_bwd(&scale.contiguous()?, &shift.contiguous()?, &op)
        }
        false => plain_norm(x, scale, shift, eps),
    }
}

/// `x + gate * y` for x and y (R, T, C) and a gate (R, C) for each row: x's shape, in f32.
///
/// Errors when the shapes do not fit.
pub fn add_gated(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    check("add_gated", x, gate)?;
    if x.dims() != y.dims() {
        bail!("add_gated: {:?} and {:?} differ", x.dims(), y.dims());
    }
    match are_f32(&[x, y, gate]) {
        true => x.contiguous()?.apply_op3_no_bwd(&y.contiguous()?, &gate.contiguous()?, &Modulate::Add),
        false => plain_add(x, y, gate),
    }
}

fn check(name: &str, x: &Tensor, of_row: &Tensor) -> Result<()> {
    let (r, _, c) = x.dims3()?;
    if of_row.dims() != [r, c] {
        bail!("{name}: {:?} does not fit {:?}", of_row.dims(), x.dims());
    }
    Ok(())
}

fn plain_norm(x: &Tensor, scale: &Tensor, shift: &Tensor, eps: f64) -> Result<Tensor> {
    let of_row = |t: &Tensor| t.to_dtype(DType::F32)?.unsqueeze(1);
    let x = x.to_dtype(DType::F32)?;
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    centred.broadcast_div(&deviation)?.broadcast_mul(&(of_row(scale)? + 1.0)?)?.broadcast_add(&of_row(shift)?)
}

fn plain_add(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let gated = y.to_dtype(DType::F32)?.broadcast_mul(&gate.to_dtype(DType::F32)?.unsqueeze(1)?)?;
    x.to_dtype(DType::F32)? + gated
}

enum Modulate {
    /// Of x, scale and shift.
    Norm { eps: f32 },
    /// Of x, y and the gate.
    Add,
}

/// `f` of the index of its row for every position of (R, T, C), on all threads.
fn positions(out: &mut [f32], (tokens, c): (usize, usize), f: impl Fn(usize, usize, &mut [f32]) + Sync) {
    let at_once = (CHUNK / c).max(1);
    out.par_chunks_mut(at_once * c).enumerate().for_each(|(chunk, out)| {
        vectorized(
            #[inline(always)]
            || {
                for (i, out) in out.chunks_exact_mut(c).enumerate() {
                    let position = chunk * at_once + i;
                    f(position / tokens, position, out);
                }
            },
        );
    });
}

impl CustomOp3 for Modulate {
    fn name(&self) -> &'static str {
        "modulate"
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
        let [x, a, b] = [(s1, l1), (s2, l2), (s3, l3)].map(|(s, l)| Operand::new(s, l).slice::<f32>());
        let (x, a, b) = (x?, a?, b?);
        let (_, tokens, c) = l1.shape().dims3()?;
        let mut y = vec![0f32; x.len()];
        match *self {
            Self::Norm { eps } => positions(&mut y, (tokens, c), |row, position, y| {
                let x = &x[position * c..][..c];
                let (mean, r) = moments(x, eps);
                let (scale, shift) = (&a[row * c..][..c], &b[row * c..][..c]);
                for (((y, x), scale), shift) in y.iter_mut().zip(x).zip(scale).zip(shift) {
                    *y = (x - mean) * r * (1.0 + scale) + shift;
                }
            }),
            Self::Add => positions(&mut y, (tokens, c), |row, position, y| {
                let (x, added, gate) = (&x[position * c..][..c], &a[position * c..][..c], &b[row * c..][..c]);
                for (((y, x), added), gate) in y.iter_mut().zip(x).zip(added).zip(gate) {
                    *y = x + gate * added;
                }
            }),
        }
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::random;
    use super::*;

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn match_the_compositions() -> Result<()> {
        for (rows, tokens, c) in [(1, 1, 5), (3, 7, 16), (2, 700, 96)] {
            let (x, y) = (random((rows, tokens, c), 1).detach(), random((rows, tokens, c), 2).detach());
            let (a, b) = (random((rows, c), 3).detach(), random((rows, c), 4).detach());
            assert!(far(&modulated_norm(&x, &a, &b, 1e-6)?, &plain_norm(&x, &a, &b, 1e-6)?) < 1e-5);
            assert!(far(&add_gated(&x, &y, &a)?, &plain_add(&x, &y, &a)?) < 1e-6);
        }
        Ok(())
    }

    #[test]
    fn reject_rows_that_do_not_fit() {
        let (x, one) = (random((2, 3, 8), 1), random((1, 8), 2));
        assert!(modulated_norm(&x, &one, &one, 1e-6).is_err() && add_gated(&x, &x, &one).is_err());
        assert!(add_gated(&x, &random((2, 4, 8), 1), &random((2, 8), 2)).is_err());
    }
}

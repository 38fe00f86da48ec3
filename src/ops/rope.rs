//! Rotary position embedding.

use candle_core::{D, DType, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::operand::Operand;
use super::cpu::reduce::vectorized;
use super::custom_op::{Op, apply3, supports};

/// Rotates the halves of each head of x (B, T, H, D) by the angles whose cosines and sines are
/// given, (T, D/2) or (B, T, D/2): x's shape and dtype. No gradient flows into the angles.
///
/// Errors: shapes that do not fit, or an odd D.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, t, _, d) = x.dims4()?;
    let fits = |dims: &[usize]| dims == [t, d / 2] || dims == [b, t, d / 2];
    if d % 2 != 0 || !fits(cos.dims()) || sin.dims() != cos.dims() {
        bail!("rope: {:?} does not fit angles {:?} and {:?}", x.dims(), cos.dims(), sin.dims());
    }
    let angles = [cos, sin].iter().all(|t| t.dtype() == DType::F32);
    if angles && supports(&[x]) { apply3(Rope, x, cos, sin) } else { composed(x, cos, sin) }
}

/// Splits the product x (R, T, (H + 2 KV) D) of a joint projection into heads, in one kernel: adds
/// `bias`, rotates queries and keys, and writes keys and values into the caches, a pair of
/// (1, capacity, KV, D) and the position to write at for every row. Returns the queries
/// (R, T, H, D). None where there is no kernel: the CPU, other dtypes than bf16, and operands that
/// are not aligned.
///
/// Errors: shapes that do not fit, and caches without room for T more positions.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub fn project_heads(
    x: &Tensor,
    bias: Option<&Tensor>,
    (cos, sin): (&Tensor, &Tensor),
    caches: &[(&Tensor, &Tensor, usize)],
) -> Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    return super::cuda::project_heads(x, bias, (cos, sin), caches);
    #[cfg(not(feature = "cuda"))]
    Ok(None)
}

/// candle-nn's differentiable `rope_slow` takes neither angles of each batch row nor half
/// precision.
fn composed(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let wide = x.to_dtype(DType::F32)?;
    let angle = |t: &Tensor| t.detach().to_dtype(DType::F32)?.unsqueeze(D::Minus2);
    let (cos, sin) = (angle(cos)?, angle(sin)?);
    let (a, b) = (wide.narrow(D::Minus1, 0, half)?, wide.narrow(D::Minus1, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)?.to_dtype(x.dtype())
}

/// Elements per task, in whole positions: fewer are not worth waking another thread.
const CHUNK: usize = 1 << 15;

/// Rotates each position by its angles; backwards if `sign` is -1.
fn rotate(x: &[f32], (heads, d): (usize, usize), cos: &[f32], sin: &[f32], sign: f32) -> Vec<f32> {
    let half = d / 2;
    let positions = cos.len() / half;
    let mut out = vec![0f32; x.len()];
    let chunks = (out.par_chunks_mut(heads * d), x.par_chunks(heads * d));
    chunks.0.zip(chunks.1).enumerate().with_min_len((CHUNK / (heads * d)).max(1)).for_each(|(i, (out, x))| {
        let at = i % positions * half;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
        vectorized(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    let ((out_a, out_b), (a, b)) = (out.split_at_mut(half), x.split_at(half));
                    let pairs = out_a.iter_mut().zip(out_b).zip(a.iter().zip(b));
                    for (((out_a, out_b), (a, b)), (c, s)) in pairs.zip(cos.iter().zip(sin)) {
                        *out_a = a * c + b * s * -sign;
                        *out_b = b * c + a * s * sign;
                    }
                }
            },
        );
    });
    out
}

/// Rotates, in place, the first `heads` heads of size `d` in every row of x, the rows `stride`
/// apart, by the angles of their position, of which there are as many as rows or as in one sequence
/// of a batch; backwards if `sign` is -1.
pub(super) fn rotate_rows(
    x: &mut [f32],
    stride: usize,
    (heads, d): (usize, usize),
    (cos, sin): (&[f32], &[f32]),
    sign: f32,
) {
    let half = d / 2;
    let positions = cos.len() / half;
    let rows = (CHUNK / stride).max(1);
    x.par_chunks_mut(rows * stride).enumerate().for_each(|(chunk, x)| {
        vectorized(
            #[inline(always)]
            || {
                for (row, x) in x.chunks_exact_mut(stride).enumerate() {
                    let at = (chunk * rows + row) % positions * half;
                    for x in x.chunks_exact_mut(d).take(heads) {
                        let (a, b) = x.split_at_mut(half);
                        for ((a, b), (c, s)) in a.iter_mut().zip(b).zip(cos[at..at + half].iter().zip(&sin[at..])) {
                            (*a, *b) = (*a * c + *b * s * -sign, *b * c + *a * s * sign);
                        }
                    }
                }
            },
        );
    });
}

pub(super) struct Rope;

impl Op<3> for Rope {
    const NAME: &'static str = "rope";

    fn forward(&self, [x, cos, sin]: [Operand; 3]) -> Result<(Vec<f32>, Shape)> {
        let (_, _, heads, d) = x.shape().dims4()?;
        Ok((rotate(x.slice()?, (heads, d), cos.slice()?, sin.slice()?, 1.0), x.shape().clone()))
    }

    fn backward(&self, [x, cos, sin]: [Operand; 3], _: [bool; 3], dy: &[f32]) -> Result<[Option<Vec<f32>>; 3]> {
        let (_, _, heads, d) = x.shape().dims4()?;
        Ok([Some(rotate(dy, (heads, d), cos.slice()?, sin.slice()?, -1.0)), None, None])
    }
}

#[cfg(test)]
mod tests {
    use candle_nn::rotary_emb::{rope_slow, rope_thd};

    use super::super::testing::{agree, random, same};
    use super::*;

    #[test]
    fn matches_the_composition() {
        let x = random((2, 5, 3, 14), 1);
        for shape in [vec![5, 7], vec![2, 5, 7]] {
            let (c, s) = (random(shape.clone(), 2), random(shape, 3));
            same(&[&x], || rope(&x, &c, &s), || composed(&x, &c, &s));
        }
    }

    #[test]
    fn rotations_are_those_of_candle_nn() -> Result<()> {
        let (x, c, s) = (random((2, 5, 3, 14), 1), random((5, 7), 2), random((5, 7), 3));
        same(&[&x], || rope(&x, &c, &s), || rope_slow(&x.transpose(1, 2)?, &c, &s)?.transpose(1, 2));
        let (c, s) = (random((2, 5, 7), 2), random((2, 5, 7), 3));
        agree("angles of each batch row", &rope(&x, &c, &s)?, &rope_thd(&x, &c, &s)?)
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (odd, x, c) = (random((1, 4, 1, 5), 1), random((1, 4, 1, 6), 1), random((4, 2), 2));
        assert!(rope(&odd, &c, &c).is_err());
        assert!(rope(&x, &c, &c).is_err());
    }
}

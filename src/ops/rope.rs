//! Rotary position embedding.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendStorage};
use rayon::prelude::*;

use super::slice::{self, Borrowed};

/// Rotates the halves of each head of x (B, T, H, D) by the angles whose cosines and sines are given, (T, D/2) or
/// (B, T, D/2): x's shape and dtype. The angles are constants: no gradient flows into them.
///
/// Errors when the shapes do not fit or D is odd.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, t, _, d) = x.dims4()?;
    let fits = |dims: &[usize]| dims == [t, d / 2] || dims == [b, t, d / 2];
    if d % 2 != 0 || !fits(cos.dims()) || sin.dims() != cos.dims() {
        bail!("rope: {:?} does not fit angles {:?} and {:?}", x.dims(), cos.dims(), sin.dims());
    }
    let angles = [cos, sin].iter().all(|t| t.dtype() == DType::F32);
    match angles && slice::kernels(&[x]) {
        true => x.contiguous()?.apply_op3(&cos.contiguous()?, &sin.contiguous()?, Rope),
        false => plain(x, cos, sin),
    }
}

/// Heads of the product x (R, T, (H + 2 KV) D) of a joint projection, and of its bias: queries, rotated, (R, T, H, D). Keys,
/// rotated, and values are written into the keys and values (1, capacity, KV, D) of every row, from the position on that is
/// given with them. None where there is no kernel for that.
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

fn plain(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let wide = x.to_dtype(DType::F32)?;
    let angle = |t: &Tensor| t.detach().to_dtype(DType::F32)?.unsqueeze(D::Minus2);
    let (cos, sin) = (angle(cos)?, angle(sin)?);
    let (a, b) = (wide.narrow(D::Minus1, 0, half)?, wide.narrow(D::Minus1, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)?.to_dtype(x.dtype())
}

/// Elements one thread takes at a time, in whole positions: fewer are not worth waking another.
const CHUNK: usize = 1 << 15;

/// Rotates each position by its angles, or back with `sign` -1.
fn rotate(x: &[f32], heads: usize, d: usize, cos: &[f32], sin: &[f32], sign: f32) -> Vec<f32> {
    let half = d / 2;
    let positions = cos.len() / half;
    let mut out = vec![0f32; x.len()];
    let chunks = (out.par_chunks_mut(heads * d), x.par_chunks(heads * d));
    chunks.0.zip(chunks.1).enumerate().with_min_len((CHUNK / (heads * d)).max(1)).for_each(|(i, (out, x))| {
        let at = i % positions * half;
        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
        for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            let ((out_a, out_b), (a, b)) = (out.split_at_mut(half), x.split_at(half));
            let turn = |out: &mut [f32], x: &[f32], y: &[f32], sign: f32| {
                for (((out, x), y), (c, s)) in out.iter_mut().zip(x).zip(y).zip(cos.iter().zip(sin)) {
                    *out = x * c + y * s * sign;
                }
            };
            turn(out_a, a, b, -sign);
            turn(out_b, b, a, sign);
        }
    });
    out
}

struct Rope;

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
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
        let (_, _, heads, d) = l1.shape().dims4()?;
        let (x, cos, sin) = (slice::contiguous(s1, l1)?, slice::contiguous(s2, l2)?, slice::contiguous(s3, l3)?);
        Ok((CpuStorage::F32(rotate(x, heads, d, cos, sin, 1.0)), l1.shape().clone()))
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
        match s1.dtype() {
            DType::F32 => super::cuda::training::rope((s1, l1), (s2, l2), (s3, l3)),
            _ => super::cuda::rope((s1, l1), (s2, l2), (s3, l3)),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return Ok((Some(super::cuda::training::rope_back(dy, cos, sin)?), None, None));
        }
        let (_, _, heads, d) = x.dims4()?;
        let dy = dy.contiguous()?;
        let (bcos, bsin, bdy) = (Borrowed::of(cos), Borrowed::of(sin), Borrowed::of(&dy));
        let dx = rotate(bdy.slice()?, heads, d, bcos.slice()?, bsin.slice()?, -1.0);
        Ok((slice::gradient(x, dx)?, None, None))
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{random, same};
    use super::*;

    #[test]
    fn matches_the_composition() {
        let x = random((2, 5, 3, 14), 1);
        for shape in [vec![5, 7], vec![2, 5, 7]] {
            let (c, s) = (random(shape.clone(), 2), random(shape, 3));
            same(&[&x], || rope(&x, &c, &s), || plain(&x, &c, &s));
        }
    }

    #[test]
    fn rejects_shapes_that_do_not_fit() {
        let (odd, x, c) = (random((1, 4, 1, 5), 1), random((1, 4, 1, 6), 1), random((4, 2), 2));
        assert!(rope(&odd, &c, &c).is_err());
        assert!(rope(&x, &c, &c).is_err());
    }
}

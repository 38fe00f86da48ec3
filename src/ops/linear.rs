//! The linear layer.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::product::{Rows, product};
use super::slice::{self, Borrowed, Into, Matrix, MatrixMut, gemm};

/// Rows one thread sums at a time.
const ROWS: usize = 64;

/// `x wᵀ + b` for x (..., in), w (out, in) and b (out): (..., out), of x's dtype.
///
/// Errors when the shapes do not fit.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = w.dims2()?;
    if x.dims().last() != Some(&inner) || b.is_some_and(|b| b.dims() != [out]) {
        bail!("linear: {:?} does not fit weights {:?} and bias {:?}", x.dims(), w.dims(), b.map(Tensor::dims));
    }
    if !slice::fused(&[x, w, b.unwrap_or(w)]) {
        return plain(x, w, b);
    }
    // An op has a fixed number of operands: no bias is an empty one.
    let b = b.map_or_else(|| Tensor::zeros(0, DType::F32, x.device()), Tensor::contiguous)?;
    x.contiguous()?.apply_op3(&w.contiguous()?, &b, Linear)
}

fn plain(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = w.dims2()?;
    let y = x.reshape(((), inner))?.matmul(&w.t()?)?;
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(out);
    let y = y.reshape(dims)?;
    b.map_or(Ok(y.clone()), |b| y.broadcast_add(b))
}

struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
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
        let (x, w, b) = (slice::contiguous(s1, l1)?, slice::contiguous(s2, l2)?, slice::contiguous(s3, l3)?);
        let (out, inner) = l2.shape().dims2()?;
        let bias = if b.is_empty() { None } else { Some(b) };
        let y = product(x, Rows::Plain(w), bias, (out, inner))?;
        let mut dims = l1.dims().to_vec();
        dims.pop();
        dims.push(out);
        Ok((CpuStorage::F32(y), Shape::from(dims)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (out, inner) = w.dims2()?;
        let rows = x.elem_count() / inner;
        let (bx, bw, bdy) = (Borrowed::of(x), Borrowed::of(w), Borrowed::of(&dy));
        let (xs, ws, dys) = (bx.slice()?, bw.slice()?, bdy.slice::<f32>()?);
        let grad = Matrix::new(dys, rows, out);
        let product = |of: &Tensor, lhs: Matrix, rhs: Matrix, rows: usize| {
            if !of.track_op() {
                return Ok(None);
            }
            let mut d = vec![0f32; of.elem_count()];
            gemm(MatrixMut::new(&mut d, rows, inner), Into::Overwrite, lhs, rhs, 1.0, true);
            slice::gradient(of, d)
        };
        let dx = product(x, grad, Matrix::new(ws, out, inner), rows)?;
        let dw = product(w, grad.t(), Matrix::new(xs, rows, inner), out)?;
        let db = if b.track_op() && b.elem_count() > 0 { slice::gradient(b, column_sums(dys, out))? } else { None };
        Ok((dx, dw, db))
    }
}

fn column_sums(values: &[f32], cols: usize) -> Vec<f32> {
    let zeros = || vec![0f32; cols];
    let block = |mut sums: Vec<f32>, block: &[f32]| {
        for row in block.chunks_exact(cols) {
            sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
        }
        sums
    };
    values.par_chunks(cols * ROWS).fold(zeros, block).reduce(zeros, slice::add)
}

#[cfg(test)]
mod tests {
    use super::super::check::{random, same};
    use super::*;

    #[test]
    fn matches_the_composition() {
        let (x, w, b) = (random((3, 45, 37), 1), random((29, 37), 2), random(29, 3));
        same(&[&x, &w, &b], || linear(&x, &w, Some(&b)), || plain(&x, &w, Some(&b)));
        same(&[&x, &w], || linear(&x, &w, None), || plain(&x, &w, None));
        let part = || w.narrow(0, 5, 11);
        same(&[&x, &w], || linear(&x, &part()?, None), || plain(&x, &part()?, None));
    }

    #[test]
    fn rejects_shapes_that_do_not_fit() {
        let (x, w, b) = (random((2, 3), 1), random((4, 3), 2), random(3, 3));
        assert!(linear(&x, &w, Some(&b)).is_err());
        assert!(linear(&x, &random((4, 2), 2), None).is_err());
    }

    #[test]
    fn other_dtypes_compose() -> Result<()> {
        let (x, w) = (random((2, 3), 1).to_dtype(DType::F64)?, random((4, 3), 2).to_dtype(DType::F64)?);
        assert_eq!(linear(&x, &w, None)?.dtype(), DType::F64);
        Ok(())
    }
}

//! The linear layer.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
#[cfg(target_arch = "x86_64")]
use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::columns::filled;
use super::product::{Rows, product};
use super::slice::{self, Borrowed, Into, Matrix, MatrixMut, gemm};
#[cfg(target_arch = "x86_64")]
use super::{layout, panels};

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
    apply(x, w, b, Linear { rounded: false })
}

/// As [`linear`], but where the processor multiplies bf16 all factors are rounded to it, in the backward pass too: mixed
/// precision, with weights, sums and gradients in f32.
pub(super) fn mixed_linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = w.dims2()?;
    if x.dims().last() != Some(&inner) || !rounds(out, inner) {
        return linear(x, w, b);
    }
    apply(x, w, b, Linear { rounded: true })
}

/// Whether products of such weights, and those of the backward pass, can be of bf16.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
fn rounds(out: usize, inner: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    return panels::suits(GgmlDType::BF16, out) && panels::suits(GgmlDType::BF16, inner);
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn apply(x: &Tensor, w: &Tensor, b: Option<&Tensor>, linear: Linear) -> Result<Tensor> {
    if !slice::trained(&[x, w, b.unwrap_or(w)]) {
        return plain(x, w, b);
    }
    // An op has a fixed number of operands: no bias is an empty one.
    let b = b.map_or_else(|| Tensor::zeros(0, DType::F32, x.device()), Tensor::contiguous)?;
    x.contiguous()?.apply_op3(&w.contiguous()?, &b, linear)
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

struct Linear {
    /// All factors are bf16: [`rounds`] says that they can be.
    rounded: bool,
}

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
        let y = match self.rounded {
            #[cfg(target_arch = "x86_64")]
            true => product(x, Rows::Blocks(&layout::rounded(w), GgmlDType::BF16), bias, (out, inner))?,
            _ => product(x, Rows::Plain(w), bias, (out, inner))?,
        };
        let mut dims = l1.dims().to_vec();
        dims.pop();
        dims.push(out);
        Ok((CpuStorage::F32(y), Shape::from(dims)))
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
        super::cuda::training::linear((s1, l1), (s2, l2), (s3, l3))
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
            let [dx, dw, db] = super::cuda::training::linear_back(x, w, b, dy)?;
            return Ok((dx, dw, db));
        }
        let dy = dy.contiguous()?;
        let (out, inner) = w.dims2()?;
        let rows = x.elem_count() / inner;
        let (bx, bw, bdy) = (Borrowed::of(x), Borrowed::of(w), Borrowed::of(&dy));
        let (xs, ws, dys) = (bx.slice()?, bw.slice()?, bdy.slice::<f32>()?);
        let (dx, dw) = match self.rounded {
            #[cfg(target_arch = "x86_64")]
            true => (
                of(x, &|| {
                    let w = layout::rounded_columns(ws, (out, inner));
                    product(dys, Rows::Blocks(&w, GgmlDType::BF16), None, (inner, out))
                })?,
                of(w, &|| {
                    let x = layout::rounded_columns(xs, (rows, inner));
                    filled(out * inner, |dw| panels::products_of_columns(dw, &x, dys, (rows, out)))
                })?,
            ),
            _ => {
                let grad = Matrix::new(dys, rows, out);
                let product = |lhs: Matrix, rhs: Matrix, rows: usize| {
                    let mut d = vec![0f32; rows * inner];
                    gemm(MatrixMut::new(&mut d, rows, inner), Into::Overwrite, lhs, rhs, 1.0, true);
                    Ok(d)
                };
                let dx = of(x, &|| product(grad, Matrix::new(ws, out, inner), rows))?;
                (dx, of(w, &|| product(grad.t(), Matrix::new(xs, rows, inner), out))?)
            }
        };
        let db = if b.track_op() && b.elem_count() > 0 { slice::gradient(b, column_sums(dys, out))? } else { None };
        Ok((dx, dw, db))
    }
}

/// The gradient of a tensor, unless it is a constant.
fn of(tensor: &Tensor, values: &dyn Fn() -> Result<Vec<f32>>) -> Result<Option<Tensor>> {
    if tensor.track_op() { slice::gradient(tensor, values()?) } else { Ok(None) }
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
    use super::super::check::{agree, random, same};
    use super::*;
    use candle_core::Var;

    #[test]
    fn matches_the_composition() {
        let (x, w, b) = (random((3, 45, 37), 1), random((29, 37), 2), random(29, 3));
        same(&[&x, &w, &b], || linear(&x, &w, Some(&b)), || plain(&x, &w, Some(&b)));
        same(&[&x, &w], || linear(&x, &w, None), || plain(&x, &w, None));
        let part = || w.narrow(0, 5, 11);
        same(&[&x, &w], || linear(&x, &part()?, None), || plain(&x, &part()?, None));
    }

    /// Whatever the sizes, nothing but rounding: here all factors are bf16 already.
    #[test]
    fn mixed_precision_loses_no_more_than_rounding() -> Result<()> {
        let bf16 = |x: &Tensor| Var::from_tensor(&x.to_dtype(DType::BF16)?.to_dtype(DType::F32)?);
        for (rows, out, inner) in [(45, 64, 96), (9, 32, 32), (1100, 96, 64), (5, 160, 32)] {
            let (x, w, b) = (bf16(&random((rows, inner), 1))?, bf16(&random((out, inner), 2))?, random(out, 3));
            let dy = bf16(&random((rows, out), 4))?;
            let grads = |y: Tensor| (y * dy.as_tensor())?.sum_all()?.backward();
            let (got, want) = (grads(mixed_linear(&x, &w, Some(&b))?)?, grads(linear(&x, &w, Some(&b))?)?);
            agree("value", &mixed_linear(&x, &w, Some(&b))?, &linear(&x, &w, Some(&b))?)?;
            for input in [&x, &w, &b] {
                agree("gradient", got.get(input).unwrap(), want.get(input).unwrap())?;
            }
        }
        Ok(())
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

//! The linear layer over dense weights.

use candle_core::{DType, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::cpu::gemm::{Matrix, MatrixMut, Update, gemm, product};
use super::cpu::matmul::{matmul, portable};
use super::cpu::operand::Operand;
use super::cpu::quants::WeightRows;
use super::cpu::reduce::{self, vectorized};
use super::custom_op::{Op, apply3, supports_f32};

/// Rows that one thread sums at a time.
const ROWS: usize = 64;

/// `x wᵀ + b` for x (..., in), w (out, in) and b (out): (..., out), of x's dtype.
///
/// Errors: shapes that do not fit.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = w.dims2()?;
    if x.dims().last() != Some(&inner) || b.is_some_and(|b| b.dims() != [out]) {
        bail!("linear: {:?} does not fit weights {:?} and bias {:?}", x.dims(), w.dims(), b.map(Tensor::dims));
    }
    apply(x, w, b, false)
}

/// [`linear`] in mixed precision: weights, sums and gradients are f32, but where the CPU multiplies
/// bf16 all factors are rounded to it, in the backward pass too.
pub(super) fn mixed_linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = w.dims2()?;
    if x.dims().last() != Some(&inner) || !bf16::supports(out, inner) {
        return linear(x, w, b);
    }
    apply(x, w, b, true)
}

fn apply(x: &Tensor, w: &Tensor, b: Option<&Tensor>, bf16: bool) -> Result<Tensor> {
    if !supports_f32(&[x, w, b.unwrap_or(w)]) {
        return composed(x, w, b);
    }
    // An op has a fixed number of operands: an empty bias is none.
    let empty = || Tensor::zeros(0, DType::F32, x.device());
    let b = b.map_or_else(empty, |b| Ok(b.clone()))?;
    let trains = x.track_op() || w.track_op();
    apply3(Linear { bf16, trains }, x, w, &b)
}

fn composed(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = w.dims2()?;
    let y = x.reshape(((), inner))?.matmul(&w.t()?)?.reshape(with_last(x.dims(), out))?;
    b.map_or(Ok(y.clone()), |b| y.broadcast_add(b))
}

/// Dimensions with another last one.
pub(super) fn with_last(dims: &[usize], last: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    dims.pop();
    dims.push(last);
    dims
}

/// Of x (..., in), w (out, in) and b (out) or (0).
pub(super) struct Linear {
    /// All factors are rounded to bf16: [`bf16::supports`] the sizes.
    bf16: bool,
    /// A backward pass follows. Then there are many rows, for which the crate `gemm` is the
    /// fastest.
    trains: bool,
}

impl Op<3> for Linear {
    const NAME: &'static str = "linear";

    fn forward(&self, [x, w, b]: [Operand; 3]) -> Result<(Vec<f32>, Shape)> {
        let (out, inner) = w.shape().dims2()?;
        let shape = Shape::from(with_last(x.dims(), out));
        let bias = Some(b.slice::<f32>()?).filter(|bias| !bias.is_empty());
        Ok((self.product(x.slice()?, w.slice()?, bias, (out, inner))?, shape))
    }

    fn backward(&self, [x, w, b]: [Operand; 3], wanted: [bool; 3], dy: &[f32]) -> Result<[Option<Vec<f32>>; 3]> {
        let (out, inner) = w.shape().dims2()?;
        let (biased, x, w) = (b.dims() == [out], x.slice::<f32>()?, w.slice::<f32>()?);
        let dx = || self.input_gradient(dy, w, (out, inner));
        let dw = || self.weight_gradient(dy, x, (out, inner));
        let [want_x, want_w, want_b] = wanted;
        let db = (want_b && biased).then(|| column_sums(dy, out));
        Ok([want_x.then(dx).transpose()?, want_w.then(dw).transpose()?, db])
    }
}

/// The products, for weights (out, inner).
impl Linear {
    /// For a backward pass, with weights (out, inner) of these `shapes`: in mixed precision where
    /// the CPU multiplies bf16.
    pub(super) fn training(mixed: bool, shapes: &[(usize, usize)]) -> Self {
        Self { bf16: mixed && shapes.iter().all(|&(out, inner)| bf16::supports(out, inner)), trains: true }
    }

    /// `x wᵀ` and the bias of x (N, inner): (N, out).
    pub(super) fn product(
        &self,
        x: &[f32],
        w: &[f32],
        bias: Option<&[f32]>,
        shape: (usize, usize),
    ) -> Result<Vec<f32>> {
        match self.bf16 {
            true => bf16::forward(x, w, bias, shape),
            false if self.trains => Ok(portable(x, w, bias, shape)),
            false => matmul(x, WeightRows::F32(w), bias, shape),
        }
    }

    /// Adds `x wᵀ` to `y` (N, out).
    pub(super) fn add_product(&self, y: &mut [f32], x: &[f32], w: &[f32], (out, inner): (usize, usize)) -> Result<()> {
        if self.bf16 {
            add_assign(y, &bf16::forward(x, w, None, (out, inner))?);
            return Ok(());
        }
        let rows = x.len() / inner;
        let (x, w) = (Matrix::new(x, rows, inner), Matrix::new(w, out, inner));
        gemm(MatrixMut::new(y, rows, out), Update::Add, x, w.t(), 1.0, true);
        Ok(())
    }

    /// The gradient of x for dy (N, out): (N, inner).
    pub(super) fn input_gradient(&self, dy: &[f32], w: &[f32], (out, inner): (usize, usize)) -> Result<Vec<f32>> {
        match self.bf16 {
            true => bf16::input_gradient(dy, w, (out, inner)),
            false => Ok(product(Matrix::new(dy, dy.len() / out, out), Matrix::new(w, out, inner))),
        }
    }

    /// The gradient of the weights for dy (N, out): (out, inner).
    pub(super) fn weight_gradient(&self, dy: &[f32], x: &[f32], (out, inner): (usize, usize)) -> Result<Vec<f32>> {
        let rows = x.len() / inner;
        match self.bf16 {
            true => bf16::weight_gradient(dy, x, (out, inner)),
            false => Ok(product(Matrix::new(dy, rows, out).t(), Matrix::new(x, rows, inner))),
        }
    }
}

/// `y += x`, on all threads.
pub(super) fn add_assign(y: &mut [f32], x: &[f32]) {
    const CHUNK: usize = 1 << 15;
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| {
        vectorized(
            #[inline(always)]
            || y.iter_mut().zip(x).for_each(|(y, x)| *y += x),
        );
    });
}

pub(super) fn column_sums(values: &[f32], cols: usize) -> Vec<f32> {
    let zeros = || vec![0f32; cols];
    let block = |mut sums: Vec<f32>, block: &[f32]| {
        for row in block.chunks_exact(cols) {
            sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
        }
        sums
    };
    reduce::sums_in_order(values.par_chunks(cols * ROWS), zeros, block)
}

/// The products of mixed precision, where the CPU multiplies bf16.
#[cfg(target_arch = "x86_64")]
mod bf16 {
    use candle_core::Result;
    use candle_core::quantized::GgmlDType;

    use crate::ops::cpu::columns::filled;
    use crate::ops::cpu::matmul::matmul;
    use crate::ops::cpu::quants::WeightRows;
    use crate::ops::cpu::{avx512, gemm_bf16, pack_bf16};

    /// Whether the products with weights of this shape, and those of the backward pass, can be of
    /// bf16.
    pub(super) fn supports(out: usize, inner: usize) -> bool {
        avx512::supports_bf16(out) && avx512::supports_bf16(inner)
    }

    pub(super) fn forward(x: &[f32], w: &[f32], bias: Option<&[f32]>, shape: (usize, usize)) -> Result<Vec<f32>> {
        matmul(x, WeightRows::Blocks(&pack_bf16::rounded(w), GgmlDType::BF16), bias, shape)
    }

    pub(super) fn input_gradient(dy: &[f32], w: &[f32], (out, inner): (usize, usize)) -> Result<Vec<f32>> {
        let w = pack_bf16::rounded_columns(w, (out, inner));
        matmul(dy, WeightRows::Blocks(&w, GgmlDType::BF16), None, (inner, out))
    }

    pub(super) fn weight_gradient(dy: &[f32], x: &[f32], (out, inner): (usize, usize)) -> Result<Vec<f32>> {
        let rows = x.len() / inner;
        let x = pack_bf16::rounded_columns(x, (rows, inner));
        filled(out * inner, |dw| gemm_bf16::gemm_columns(dw, &x, dy, (rows, out)))
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod bf16 {
    use candle_core::{Result, bail};

    pub(super) fn supports(_: usize, _: usize) -> bool {
        false
    }

    pub(super) fn forward(_: &[f32], _: &[f32], _: Option<&[f32]>, _: (usize, usize)) -> Result<Vec<f32>> {
        bail!("this CPU does not multiply bf16")
    }

    pub(super) fn input_gradient(_: &[f32], _: &[f32], _: (usize, usize)) -> Result<Vec<f32>> {
        bail!("this CPU does not multiply bf16")
    }

    pub(super) fn weight_gradient(_: &[f32], _: &[f32], _: (usize, usize)) -> Result<Vec<f32>> {
        bail!("this CPU does not multiply bf16")
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{agree, random, same};
    use super::*;
    use candle_core::Var;

    #[test]
    fn matches_the_composition() {
        let (x, w, b) = (random((3, 45, 37), 1), random((29, 37), 2), random(29, 3));
        same(&[&x, &w, &b], || linear(&x, &w, Some(&b)), || composed(&x, &w, Some(&b)));
        same(&[&x, &w], || linear(&x, &w, None), || composed(&x, &w, None));
        let part = || w.narrow(0, 5, 11);
        same(&[&x, &w], || linear(&x, &part()?, None), || composed(&x, &part()?, None));
    }

    /// All factors are bf16 already: sizes of every kind lose nothing but the rounding of sums.
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
    fn shapes_that_do_not_fit_are_refused() {
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

//! Linear layers over weight matrices.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{DType, Error, Module, Result, Tensor, bail};
use rayon::prelude::*;

use super::WeightMatrix;
use crate::ops::activation::{add, swiglu};
use crate::ops::cpu::int8::{self, Int8Matrix};
use crate::ops::cpu::matmul::{gated_matmul, gated_packed, packed_matmul_each};
use crate::ops::cpu::operand::{Borrowed, are_f32};
use crate::ops::cpu::packed_blocks::PackedBlocks;
use crate::ops::cpu::quants::WeightRows;
use crate::ops::linear::{linear, with_last};

/// [`WeightMatrix::linear`] of one x (..., columns) with several matrices, each with its own number
/// of rows and its own bias: a (..., rows) of each. Faster than one by one with few rows of x, and
/// activations that are rounded to integers are so once.
///
/// Errors: shapes that do not fit.
pub fn linear_each<const N: usize>(x: &Tensor, layers: [(&WeightMatrix, Option<&Tensor>); N]) -> Result<[Tensor; N]> {
    let int8 =
        layers.iter().filter_map(|&(w, bias)| if let WeightMatrix::Int8(w) = w { Some((w, bias)) } else { None });
    if let Ok(layers) = <[_; N]>::try_from(int8.collect::<Vec<_>>()) {
        return int8_linear_each(x, layers);
    }
    let packed =
        layers.iter().filter_map(|&(w, bias)| if let WeightMatrix::Packed(w) = w { Some((w, bias)) } else { None });
    if let Ok(layers) = <[_; N]>::try_from(packed.collect::<Vec<_>>()) {
        return packed_linear_each(x, layers);
    }
    let products: Vec<Tensor> = match x.device().is_cpu() {
        // A product of a few rows is too small for all threads.
        true => layers.par_iter().map(|(w, bias)| w.linear(x, *bias)).collect::<Result<_>>()?,
        false => layers.iter().map(|(w, bias)| w.linear(x, *bias)).collect::<Result<_>>()?,
    };
    array(products)
}

pub(super) fn int8_linear_each<const N: usize>(
    x: &Tensor,
    layers: [(&Int8Matrix, Option<&Tensor>); N],
) -> Result<[Tensor; N]> {
    rounded_linear_each(x, layers, Int8Matrix::shape, int8::matmul_each)
}

pub(super) fn packed_linear_each<const N: usize>(
    x: &Tensor,
    layers: [(&PackedBlocks, Option<&Tensor>); N],
) -> Result<[Tensor; N]> {
    rounded_linear_each(x, layers, PackedBlocks::shape, packed_matmul_each)
}

/// By the `products` of x, all layers (matrices and biases) and x's columns.
fn rounded_linear_each<const N: usize, W>(
    x: &Tensor,
    layers: [(&W, Option<&Tensor>); N],
    shape: impl Fn(&W) -> (usize, usize),
    products: impl FnOnce(&[f32], &[(&W, Option<&[f32]>)], usize) -> Result<Vec<Vec<f32>>>,
) -> Result<[Tensor; N]> {
    for (w, bias) in layers {
        check(x, shape(w), bias)?;
    }
    let x = contiguous(x)?;
    let biases: Vec<Option<Tensor>> =
        layers.iter().map(|(_, b)| b.map(contiguous).transpose()).collect::<Result<_>>()?;
    let biases: Vec<Option<Borrowed>> = biases.iter().map(|bias| bias.as_ref().map(Borrowed::of)).collect();
    let mut each = Vec::new();
    for ((w, _), bias) in layers.iter().zip(&biases) {
        each.push((*w, bias.as_ref().map(|bias| bias.slice::<f32>()).transpose()?));
    }
    let inputs = Borrowed::of(&x);
    let products = products(inputs.slice()?, &each, x.dims()[x.rank() - 1])?;
    let products = products.into_iter().zip(&each).map(|(y, (w, _))| tensor_like(&x, y, shape(w).0));
    array(products.collect::<Result<_>>()?)
}

fn array<const N: usize>(tensors: Vec<Tensor>) -> Result<[Tensor; N]> {
    tensors.try_into().map_err(|_| Error::Msg(format!("not {N} tensors")))
}

pub(super) fn contiguous(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F32)?.contiguous()
}

/// Errors unless x (..., columns) and the bias (rows) fit a matrix (rows, columns).
pub(super) fn check(x: &Tensor, (rows, columns): (usize, usize), bias: Option<&Tensor>) -> Result<()> {
    if x.dims().last() != Some(&columns) || bias.is_some_and(|b| b.dims() != [rows]) {
        let bias = bias.map(Tensor::dims);
        bail!("linear: {:?} does not fit {rows} rows of {columns} and bias {bias:?}", x.dims());
    }
    Ok(())
}

/// `residual + x wᵀ + bias` for a residual (..., rows), x (..., columns), w (rows, columns) and a
/// bias (rows): (..., rows). On a GPU it may be in the residual's memory, which nothing else may
/// use.
///
/// Errors: shapes that do not fit.
pub fn add_linear(residual: Tensor, x: &Tensor, w: &WeightMatrix, bias: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (WeightMatrix::Dense(w), None) = (w, bias)
        && crate::ops::cuda::add_product(&residual, x, w)?
    {
        return Ok(residual);
    }
    add(&residual, &w.linear(x, bias)?)
}

/// [`swiglu`] of the products of x (..., columns) with two matrices of one shape (rows, columns):
/// (..., rows). Mostly one kernel on a CPU.
///
/// Errors: shapes that do not fit.
pub fn gated_linear(x: &Tensor, gate: &WeightMatrix, up: &WeightMatrix) -> Result<Tensor> {
    let fused = match (gate, up) {
        (WeightMatrix::Blocks { .. }, WeightMatrix::Blocks { .. }) => gated_blocks(x, gate, up)?,
        (WeightMatrix::Int8(gate), WeightMatrix::Int8(up)) if gate.shape() == up.shape() => {
            check(x, gate.shape(), None)?;
            let x = contiguous(x)?;
            let y = int8::gated_matmul(Borrowed::of(&x).slice()?, gate, up)?;
            Some(tensor_like(&x, y, gate.shape().0)?)
        }
        (WeightMatrix::Packed(gate), WeightMatrix::Packed(up)) if gate.is_aligned_with(up) => {
            check(x, gate.shape(), None)?;
            let x = contiguous(x)?;
            let y = gated_packed(Borrowed::of(&x).slice()?, gate, up)?;
            Some(tensor_like(&x, y, gate.shape().0)?)
        }
        (WeightMatrix::Dense(gate), WeightMatrix::Dense(up)) => gated_dense(x, gate, up)?,
        _ => None,
    };
    match fused {
        Some(y) => Ok(y),
        None => swiglu(&gate.linear(x, None)?, &up.linear(x, None)?),
    }
}

/// None unless both are whole matrices on the CPU, for which one kernel is faster.
fn gated_blocks(x: &Tensor, gate: &WeightMatrix, up: &WeightMatrix) -> Result<Option<Tensor>> {
    let (
        WeightMatrix::Blocks { blocks: gate, first: 0, rows, .. },
        WeightMatrix::Blocks { blocks: up, first: 0, rows: same, .. },
    ) = (gate, up)
    else {
        return Ok(None);
    };
    let (count, columns) = gate.shape().dims2()?;
    let fits = x.dims().last() == Some(&columns) && gate.shape() == up.shape() && (count, rows) == (*rows, same);
    if !fits || !x.device().is_cpu() {
        return Ok(None);
    }
    let x = contiguous(x)?;
    let (inputs, gate_data, up_data) = (Borrowed::of(&x), gate.data()?, up.data()?);
    let (gate, up) = (WeightRows::Blocks(&gate_data, gate.dtype()), WeightRows::Blocks(&up_data, up.dtype()));
    let y = gated_matmul(inputs.slice()?, gate, up, (count, columns))?;
    y.map(|y| tensor_like(&x, y, count)).transpose()
}

/// None unless all are f32 on the CPU without gradients, and one kernel is faster.
fn gated_dense(x: &Tensor, gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    let fits = gate.dims() == up.dims() && x.dims().last() == gate.dims().last();
    if !fits || !are_f32(&[x, gate, up]) || [x, gate, up].iter().any(|t| t.track_op()) {
        return Ok(None);
    }
    let (x, gate, up) = (x.contiguous()?, gate.contiguous()?, up.contiguous()?);
    let (inputs, shape) = (Borrowed::of(&x), gate.dims2()?);
    let (gate, up) = (Borrowed::of(&gate), Borrowed::of(&up));
    let y = gated_matmul(inputs.slice()?, WeightRows::F32(gate.slice()?), WeightRows::F32(up.slice()?), shape)?;
    y.map(|y| tensor_like(&x, y, shape.0)).transpose()
}

/// x (..., columns) times whole blocks (rows, columns) on a GPU: (..., rows), of x's dtype.
pub(super) fn linear_on_gpu(x: &Tensor, blocks: &Arc<QTensor>) -> Result<Tensor> {
    /// With more rows of x than candle's kernels take, dequantising the weights first is faster.
    const MAX_ROWS: usize = 8;
    let (_, columns) = blocks.shape().dims2()?;
    if x.elem_count() / columns <= MAX_ROWS {
        return QMatMul::from_arc(blocks.clone())?.forward(&contiguous(x)?)?.to_dtype(x.dtype());
    }
    #[cfg(feature = "cuda")]
    if let Some(w) = crate::ops::cuda::dequantize(blocks)? {
        return linear(x, &w.to_dtype(x.dtype())?, None);
    }
    linear(x, &blocks.dequantize_f16(x.device())?.to_dtype(x.dtype())?, None)
}

/// A tensor of x's dimensions but the last, which is `last`.
pub(super) fn tensor_like(x: &Tensor, values: Vec<f32>, last: usize) -> Result<Tensor> {
    Tensor::from_vec(values, with_last(x.dims(), last), x.device())
}

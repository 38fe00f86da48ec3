//! The weight matrix of a layer in any type it may be stored in, and the linear layers over it.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Error, Module, Result, Tensor, bail};
use rayon::prelude::*;

use super::activation::{add, swiglu};
use super::cpu::int8::{self, Int8Matrix};
use super::cpu::matmul::{gated_matmul, gated_packed, matmul, packed_matmul_each};
use super::cpu::operand::{Borrowed, are_f32};
use super::cpu::packed_blocks::PackedBlocks;
use super::cpu::quants::{WeightRows, dequantize, size_in_bytes};
use super::linear::{linear, mixed_linear, with_last};
use super::select::select;

/// The weights (rows, columns) of a linear layer, or a table of rows.
#[derive(Clone, Debug)]
pub enum WeightMatrix {
    /// A tensor.
    Dense(Tensor),
    /// For training in mixed precision: f32, with products of bf16 where the CPU multiplies bf16.
    Mixed(Tensor),
    /// Bytes with a scale per row, on a CPU that has a kernel for them. Activations are f32.
    Int8(Int8Matrix),
    /// GGML's blocks of 8 and 4 bits, on a CPU that has a kernel for them. Activations are f32.
    Packed(PackedBlocks),
    /// A range of rows of a matrix in GGML's blocks. Activations are f32, or bf16 on a GPU.
    Blocks {
        /// The whole matrix.
        blocks: Arc<QTensor>,
        /// A copy of a GPU's blocks on the host, made when a row is first selected.
        host: Arc<OnceLock<Vec<u8>>>,
        /// The first row.
        first: usize,
        /// The number of rows.
        rows: usize,
    },
}

impl From<Tensor> for WeightMatrix {
    fn from(weights: Tensor) -> Self {
        Self::Dense(weights)
    }
}

impl From<QTensor> for WeightMatrix {
    fn from(blocks: QTensor) -> Self {
        if let (true, &[rows, columns]) = (blocks.device().is_cpu(), blocks.shape().dims())
            && let Ok(data) = blocks.data()
            && let Ok(packed) = PackedBlocks::new(&data, blocks.dtype(), (rows, columns))
        {
            return Self::Packed(packed);
        }
        let rows = blocks.shape().dims().first().copied().unwrap_or(0);
        Self::Blocks { blocks: Arc::new(blocks), host: Arc::default(), first: 0, rows }
    }
}

impl WeightMatrix {
    /// From GGML's blocks, row by row, of a matrix of `shape` (rows, columns), onto `device`.
    ///
    /// Errors: bytes that do not fit the shape.
    pub fn from_blocks(bytes: Cow<[u8]>, dtype: GgmlDType, shape: (usize, usize), device: &Device) -> Result<Self> {
        if device.is_cpu() && PackedBlocks::supports(dtype, shape.1) {
            return PackedBlocks::new(&bytes, dtype, shape).map(Self::Packed);
        }
        Ok(QTensor::new(QStorage::from_data(bytes, device, dtype)?, shape)?.into())
    }

    /// Dtype of the activations.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(tensor) | Self::Mixed(tensor) => tensor.dtype(),
            Self::Int8(_) | Self::Packed(_) => DType::F32,
            Self::Blocks { blocks, .. } if blocks.device().is_cpu() => DType::F32,
            Self::Blocks { .. } => DType::BF16,
        }
    }

    /// `count` rows from `start` on, which share the memory of this matrix, except for blocks on a
    /// GPU.
    ///
    /// Errors: rows that do not exist.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        match self {
            Self::Dense(tensor) => tensor.narrow(0, start, count).map(Self::Dense),
            Self::Mixed(tensor) => tensor.narrow(0, start, count).map(Self::Mixed),
            Self::Int8(matrix) => matrix.narrow(start, count).map(Self::Int8),
            Self::Packed(matrix) => matrix.narrow(start, count).map(Self::Packed),
            Self::Blocks { blocks, host, first, rows } if start.checked_add(count).is_some_and(|end| end <= *rows) => {
                let device = blocks.device();
                if device.is_cpu() || count == *rows {
                    return Ok(Self::Blocks {
                        blocks: blocks.clone(),
                        host: host.clone(),
                        first: first + start,
                        rows: count,
                    });
                }
                // candle's kernels multiply whole matrices only.
                let (_, columns) = blocks.shape().dims2()?;
                let (data, bytes) = (blocks.data()?, size_in_bytes(blocks.dtype(), columns));
                let part = &data[(first + start) * bytes..][..count * bytes];
                Self::from_blocks(part.into(), blocks.dtype(), (count, columns), &device)
            }
            Self::Blocks { rows, .. } => bail!("rows {start} to {start} + {count} of {rows}"),
        }
    }

    /// Its rows in another order, of which `order` names each.
    ///
    /// Errors: a row that is not there, and int8, which is laid out for products.
    pub fn reordered(&self, order: &[u32]) -> Result<Self> {
        match self {
            // One broadcast number, of weights that are only planned.
            Self::Dense(tensor) if tensor.stride().iter().all(|&stride| stride == 0) => Ok(self.clone()),
            Self::Dense(tensor) => tensor.index_select(&Tensor::new(order, tensor.device())?, 0).map(Self::Dense),
            Self::Blocks { blocks, first, rows, .. } => {
                let (_, columns) = blocks.shape().dims2()?;
                let (data, bytes) = (blocks.data()?, size_in_bytes(blocks.dtype(), columns));
                let mut part = Vec::with_capacity(order.len() * bytes);
                for row in order.iter().map(|&row| row as usize) {
                    if row >= *rows {
                        bail!("row {row} of {rows}");
                    }
                    part.extend_from_slice(&data[(first + row) * bytes..][..bytes]);
                }
                Self::from_blocks(part.into(), blocks.dtype(), (order.len(), columns), &blocks.device())
            }
            Self::Packed(matrix) => matrix.reordered(order).map(Self::Packed),
            _ => bail!("rows of these weights stay where they are"),
        }
    }

    /// `count` columns from `start` on, in memory of their own: in the same blocks if these begin
    /// and end there, else as f32.
    ///
    /// Errors: columns that do not exist.
    pub fn columns(&self, start: usize, count: usize) -> Result<Self> {
        match self {
            // One number that stands for all, of weights that are only planned.
            Self::Dense(tensor) if tensor.stride().iter().all(|&stride| stride == 0) => {
                tensor.narrow(1, start, count).map(Self::Dense)
            }
            Self::Dense(tensor) => tensor.narrow(1, start, count)?.force_contiguous().map(Self::Dense),
            Self::Mixed(tensor) => tensor.narrow(1, start, count)?.force_contiguous().map(Self::Mixed),
            Self::Blocks { blocks, first, rows, .. } => {
                let (_, columns) = blocks.shape().dims2()?;
                let side = blocks.dtype().block_size();
                if start.checked_add(count).is_none_or(|end| end > columns) {
                    bail!("columns {start} to {start} + {count} of {columns}");
                }
                if !start.is_multiple_of(side) || !count.is_multiple_of(side) {
                    return self.dequantized_columns(*rows, start, count);
                }
                let bytes = |count: usize| size_in_bytes(blocks.dtype(), count);
                let data = blocks.data()?;
                let row = |row: usize| &data[(first + row) * bytes(columns) + bytes(start)..][..bytes(count)];
                let part: Vec<u8> = (0..*rows).flat_map(row).copied().collect();
                Self::from_blocks(part.into(), blocks.dtype(), (*rows, count), &blocks.device())
            }
            Self::Int8(matrix) => self.dequantized_columns(matrix.shape().0, start, count),
            Self::Packed(matrix) => match matrix.columns(start, count)? {
                Some(part) => Ok(Self::Packed(part)),
                None => self.dequantized_columns(matrix.shape().0, start, count),
            },
        }
    }

    fn dequantized_columns(&self, rows: usize, start: usize, count: usize) -> Result<Self> {
        let all = self.select(&Tensor::arange(0, rows as u32, &Device::Cpu)?)?;
        all.narrow(1, start, count)?.force_contiguous().map(Self::Dense)
    }

    /// The rows `ids` (N) u32: (N, columns).
    ///
    /// Errors: an id that is not below the number of rows.
    pub fn select(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) | Self::Mixed(tensor) => select(tensor, ids),
            Self::Int8(matrix) => {
                let (ids, mut out) = (ids.to_vec1::<u32>()?, Vec::new());
                ids.iter().try_for_each(|&id| matrix.dequantize_row(id as usize, &mut out))?;
                Tensor::from_vec(out, (ids.len(), matrix.shape().1), &Device::Cpu)
            }
            Self::Packed(matrix) => {
                let (ids, (_, columns)) = (ids.to_vec1::<u32>()?, matrix.shape());
                let (mut out, mut bytes) = (vec![0f32; ids.len() * columns], Vec::new());
                for (out, &id) in out.chunks_exact_mut(columns).zip(&ids) {
                    matrix.dequantize_row(id as usize, 0..columns, &mut bytes, out)?;
                }
                Tensor::from_vec(out, (ids.len(), columns), &Device::Cpu)
            }
            Self::Blocks { blocks, host, first, rows } => {
                let (_, columns) = blocks.shape().dims2()?;
                let bytes = size_in_bytes(blocks.dtype(), columns);
                let data = match host.get() {
                    Some(copy) => Cow::Borrowed(copy.as_slice()),
                    None => match blocks.data()? {
                        Cow::Owned(data) => Cow::Borrowed(host.get_or_init(|| data).as_slice()),
                        data => data,
                    },
                };
                let ids = ids.to_vec1::<u32>()?;
                let mut out = vec![0f32; ids.len() * columns];
                for (out, id) in out.chunks_exact_mut(columns).zip(&ids) {
                    let row = *id as usize;
                    if row >= *rows {
                        bail!("row {row} of {rows}");
                    }
                    dequantize(&data[(first + row) * bytes..][..bytes], blocks.dtype(), out)?;
                }
                Tensor::from_vec(out, (ids.len(), columns), &blocks.device())?.to_dtype(self.dtype())
            }
        }
    }

    /// `x wᵀ + bias` for x (..., columns) and a bias (rows): (..., rows).
    ///
    /// Errors: shapes that do not fit.
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => linear(x, tensor, bias),
            Self::Mixed(tensor) => mixed_linear(x, tensor, bias),
            Self::Int8(w) => int8_linear_each(x, [(w, bias)]).map(|[y]| y),
            Self::Packed(w) => packed_linear_each(x, [(w, bias)]).map(|[y]| y),
            Self::Blocks { blocks, first, rows, .. } => {
                let (_, columns) = blocks.shape().dims2()?;
                check(x, (*rows, columns), bias)?;
                if !x.device().is_cpu() {
                    let y = linear_on_gpu(x, blocks)?;
                    return bias.map_or(Ok(y.clone()), |b| y.broadcast_add(b));
                }
                let (x, bias) = (contiguous(x)?, bias.map(contiguous).transpose()?);
                let (inputs, bias) = (Borrowed::of(&x), bias.as_ref().map(Borrowed::of));
                let (data, bytes) = (blocks.data()?, size_in_bytes(blocks.dtype(), columns));
                let w = WeightRows::Blocks(&data[first * bytes..][..rows * bytes], blocks.dtype());
                let bias = bias.as_ref().map(|b| b.slice::<f32>()).transpose()?;
                let y = matmul(inputs.slice()?, w, bias, (*rows, columns))?;
                tensor_like(&x, y, *rows)
            }
        }
    }
}

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

fn int8_linear_each<const N: usize>(x: &Tensor, layers: [(&Int8Matrix, Option<&Tensor>); N]) -> Result<[Tensor; N]> {
    rounded_linear_each(x, layers, Int8Matrix::shape, int8::matmul_each)
}

fn packed_linear_each<const N: usize>(
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

fn contiguous(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F32)?.contiguous()
}

/// Errors unless x (..., columns) and the bias (rows) fit a matrix (rows, columns).
fn check(x: &Tensor, (rows, columns): (usize, usize), bias: Option<&Tensor>) -> Result<()> {
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
        && super::cuda::add_product(&residual, x, w)?
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
fn linear_on_gpu(x: &Tensor, blocks: &Arc<QTensor>) -> Result<Tensor> {
    /// With more rows of x than candle's kernels take, dequantising the weights first is faster.
    const MAX_ROWS: usize = 8;
    let (_, columns) = blocks.shape().dims2()?;
    if x.elem_count() / columns <= MAX_ROWS {
        return QMatMul::from_arc(blocks.clone())?.forward(&contiguous(x)?)?.to_dtype(x.dtype());
    }
    #[cfg(feature = "cuda")]
    if let Some(w) = super::cuda::dequantize(blocks)? {
        return linear(x, &w.to_dtype(x.dtype())?, None);
    }
    linear(x, &blocks.dequantize_f16(x.device())?.to_dtype(x.dtype())?, None)
}

/// A tensor of x's dimensions but the last, which is `last`.
fn tensor_like(x: &Tensor, values: Vec<f32>, last: usize) -> Result<Tensor> {
    Tensor::from_vec(values, with_last(x.dims(), last), x.device())
}

#[cfg(test)]
mod tests;

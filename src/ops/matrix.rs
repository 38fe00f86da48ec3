//! The weight matrix of a layer in any type it may be stored in; [`products`] has the linear layers
//! over several.

mod products;

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor, bail};

use super::cpu::int8::Int8Matrix;
use super::cpu::matmul::matmul;
use super::cpu::operand::Borrowed;
use super::cpu::packed_blocks::PackedBlocks;
use super::cpu::quants::{WeightRows, dequantize, size_in_bytes};
use super::linear::{linear, mixed_linear};
use super::select::select;
pub use products::{add_linear, gated_linear, linear_each};
use products::{check, contiguous, int8_linear_each, linear_on_gpu, packed_linear_each, tensor_like};

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

#[cfg(test)]
mod tests;

//! A matrix of weights as it is kept: a tensor, or blocks of few bits a number.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor, bail};
use rayon::prelude::*;

use super::blocks::dequantise;
use super::linear;
use super::slice::{Borrowed, Into, Matrix, MatrixMut, gemm};

/// Rows of weights that a thread turns into f32 at a time: few enough to stay in its cache, and more where many inputs
/// are to be packed anew for every tile.
const TILE: [usize; 2] = [32, 256];
/// Inputs that are many.
const MANY: usize = 16;

/// The weights (rows, columns) of a linear layer, or a table of rows.
#[derive(Clone, Debug)]
pub enum WeightMatrix {
    /// One number after the other.
    Dense(Tensor),
    /// Some rows of a matrix in blocks; activations are f32.
    Blocks {
        /// The whole matrix.
        blocks: Arc<QTensor>,
        /// The first of the rows.
        first: usize,
        /// Their number.
        rows: usize,
    },
}

impl From<QTensor> for WeightMatrix {
    fn from(blocks: QTensor) -> Self {
        let rows = blocks.shape().dims().first().copied().unwrap_or(0);
        Self::Blocks { blocks: Arc::new(blocks), first: 0, rows }
    }
}

impl WeightMatrix {
    /// Type of what goes in and comes out.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(tensor) => tensor.dtype(),
            Self::Blocks { .. } => DType::F32,
        }
    }

    /// `count` rows from `start` on, sharing their memory.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        match self {
            Self::Dense(tensor) => tensor.narrow(0, start, count).map(Self::Dense),
            Self::Blocks { blocks, first, rows } if start.checked_add(count).is_some_and(|end| end <= *rows) => {
                Ok(Self::Blocks { blocks: blocks.clone(), first: first + start, rows: count })
            }
            Self::Blocks { rows, .. } => bail!("rows {start} to {start} + {count} of {rows}"),
        }
    }

    /// The rows `ids` (u32, N): (N, columns).
    pub fn select(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => tensor.index_select(ids, 0),
            Self::Blocks { blocks, first, rows } => {
                let (_, columns) = blocks.shape().dims2()?;
                let (data, bytes) = (blocks.data()?, row_bytes(blocks, columns));
                let ids = ids.to_vec1::<u32>()?;
                let mut out = vec![0f32; ids.len() * columns];
                for (out, id) in out.chunks_exact_mut(columns).zip(&ids) {
                    let row = *id as usize;
                    if row >= *rows {
                        bail!("row {row} of {rows}");
                    }
                    dequantise(&data[(first + row) * bytes..][..bytes], blocks.dtype(), out)?;
                }
                Tensor::from_vec(out, (ids.len(), columns), &blocks.device())
            }
        }
    }

    /// `x wᵀ + b` as [`linear`](super::linear()): x (..., columns) and b (rows) give (..., rows).
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => linear(x, tensor, bias),
            Self::Blocks { blocks, first, rows } => {
                let (_, columns) = blocks.shape().dims2()?;
                if x.dims().last() != Some(&columns) {
                    bail!("linear: {:?} does not fit weights {:?}", x.dims(), blocks.shape());
                }
                let y = match x.device() {
                    Device::Cpu => tiled(x, blocks, *first, *rows)?,
                    // candle's kernels know whole matrices only.
                    _ => QMatMul::from_arc(blocks.clone())?.forward(x)?.narrow(x.rank() - 1, *first, *rows)?,
                };
                bias.map_or(Ok(y.clone()), |b| y.broadcast_add(b))
            }
        }
    }
}

fn row_bytes(blocks: &QTensor, columns: usize) -> usize {
    columns / blocks.dtype().block_size() * blocks.dtype().type_size()
}

/// Every thread turns a tile of rows into f32 and multiplies it with all inputs: a weight is read from memory once, in
/// its few bits.
fn tiled(x: &Tensor, blocks: &QTensor, first: usize, rows: usize) -> Result<Tensor> {
    thread_local!(static TILES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) });
    let (_, columns) = blocks.shape().dims2()?;
    let x = x.to_dtype(DType::F32)?.contiguous()?;
    let borrowed = Borrowed::of(&x);
    let inputs = borrowed.slice::<f32>()?;
    let count = inputs.len() / columns.max(1);
    let (data, bytes) = (blocks.data()?, row_bytes(blocks, columns));
    let data = &data[first * bytes..][..rows * bytes];
    let tile = TILE[usize::from(count > MANY)];
    let mut transposed = vec![0f32; rows * count];
    transposed.par_chunks_mut((tile * count).max(1)).zip(data.par_chunks(tile * bytes)).try_for_each(|(y, data)| {
        TILES.with_borrow_mut(|weights| {
            let rows = data.len() / bytes;
            if weights.len() < rows * columns {
                weights.resize(rows * columns, 0.0);
            }
            let weights = &mut weights[..rows * columns];
            dequantise(data, blocks.dtype(), weights)?;
            let (w, x) = (Matrix::new(weights, rows, columns), Matrix::new(inputs, count, columns));
            gemm(MatrixMut::new(y, rows, count), Into::Overwrite, w, x.t(), 1.0, false);
            Ok::<_, candle_core::Error>(())
        })
    })?;
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(rows);
    Tensor::from_vec(transposed, (rows, count), x.device())?.t()?.contiguous()?.reshape(dims)
}

#[cfg(test)]
mod tests {
    use super::super::blocks::quantise;
    use super::super::check::random;
    use super::*;
    use candle_core::quantized::GgmlDType;

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn blocks_multiply_as_the_numbers_that_they_hold() -> Result<()> {
        let (w, b) = (random((300, 256), 1), random(300, 2));
        let values = w.flatten_all()?.to_vec1::<f32>()?;
        for dtype in [GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q4K] {
            let blocks = quantise(&values, (300, 256), dtype, &Device::Cpu)?;
            let dense = WeightMatrix::Dense(blocks.dequantize(&Device::Cpu)?);
            let blocks = WeightMatrix::from(blocks);
            for inputs in [1, 5, 40] {
                let x = random((2, inputs, 256), 3);
                assert!(far(&blocks.linear(&x, Some(&b))?, &dense.linear(&x, Some(&b))?) < 1e-4, "{dtype:?}");
                let part = |m: &WeightMatrix| m.narrow(7, 100)?.narrow(1, 70)?.linear(&x, None);
                assert!(far(&part(&blocks)?, &part(&dense)?) < 1e-4, "{dtype:?}");
            }
            let ids = Tensor::new(&[0u32, 299, 5], &Device::Cpu)?;
            assert_eq!(far(&blocks.select(&ids)?, &dense.select(&ids)?), 0.0);
        }
        Ok(())
    }

    #[test]
    fn rows_that_are_not_there_are_an_error() -> Result<()> {
        let values = random((4, 32), 1).flatten_all()?.to_vec1::<f32>()?;
        let w = WeightMatrix::from(quantise(&values, (4, 32), GgmlDType::Q8_0, &Device::Cpu)?);
        assert!(w.narrow(2, 3).is_err() && w.narrow(usize::MAX, 2).is_err());
        assert!(w.select(&Tensor::new(&[4u32], &Device::Cpu)?).is_err());
        assert!(w.linear(&random((2, 31), 2), None).is_err());
        Ok(())
    }
}

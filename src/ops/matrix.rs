//! A matrix of weights as it is kept: a tensor, or blocks of few bits a number.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use candle_core::quantized::{QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Error, Module, Result, Tensor, bail};
use rayon::prelude::*;

use super::activation::{add, swiglu};
use super::blocks::dequantise;
use super::bytes::{self, Bytes};
use super::linear::{linear, mixed_linear};
use super::product::{Rows, gated, product};
use super::select::select;
use super::slice::{self, Borrowed};

/// The weights (rows, columns) of a linear layer, or a table of rows.
#[derive(Clone, Debug)]
pub enum WeightMatrix {
    /// One number after the other.
    Dense(Tensor),
    /// To be trained in mixed precision: f32, but products are of bf16 where the processor has them.
    Mixed(Tensor),
    /// Bytes with a scale per row, on a CPU that has a kernel for them; what goes in and comes out is f32.
    Bytes(Bytes),
    /// Some rows of a matrix in blocks; what goes in and comes out is f32, or bf16 on a GPU.
    Blocks {
        /// The whole matrix.
        blocks: Arc<QTensor>,
        /// What the blocks of a GPU hold, once some row was asked for.
        host: Arc<OnceLock<Vec<u8>>>,
        /// The first of the rows.
        first: usize,
        /// Their number.
        rows: usize,
    },
}

impl From<QTensor> for WeightMatrix {
    fn from(blocks: QTensor) -> Self {
        let rows = blocks.shape().dims().first().copied().unwrap_or(0);
        Self::Blocks { blocks: Arc::new(blocks), host: Arc::default(), first: 0, rows }
    }
}

impl WeightMatrix {
    /// Type of what goes in and comes out.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(tensor) | Self::Mixed(tensor) => tensor.dtype(),
            Self::Bytes(_) => DType::F32,
            Self::Blocks { blocks, .. } => activations(blocks),
        }
    }

    /// `count` rows from `start` on, sharing their memory, but for blocks on a GPU.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        match self {
            Self::Dense(tensor) => tensor.narrow(0, start, count).map(Self::Dense),
            Self::Mixed(tensor) => tensor.narrow(0, start, count).map(Self::Mixed),
            Self::Bytes(bytes) => bytes.narrow(start, count).map(Self::Bytes),
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
                // candle's kernels know whole matrices only.
                let (_, columns) = blocks.shape().dims2()?;
                let (data, bytes) = (blocks.data()?, row_bytes(blocks, columns));
                let part = &data[(first + start) * bytes..][..count * bytes];
                let storage = QStorage::from_data(part.into(), &device, blocks.dtype())?;
                Ok(QTensor::new(storage, (count, columns))?.into())
            }
            Self::Blocks { rows, .. } => bail!("rows {start} to {start} + {count} of {rows}"),
        }
    }

    /// Its rows in another order, of which `order` names each.
    ///
    /// Errors: a row that is not there, and bytes, which are laid out for products.
    pub fn reordered(&self, order: &[u32]) -> Result<Self> {
        match self {
            // One number that stands for all, of weights that are only planned.
            Self::Dense(tensor) if tensor.stride().iter().all(|&stride| stride == 0) => Ok(self.clone()),
            Self::Dense(tensor) => tensor.index_select(&Tensor::new(order, tensor.device())?, 0).map(Self::Dense),
            Self::Mixed(_) | Self::Bytes(_) => bail!("rows of these weights stay where they are"),
            Self::Blocks { blocks, first, rows, .. } => {
                let (_, columns) = blocks.shape().dims2()?;
                let (data, bytes) = (blocks.data()?, row_bytes(blocks, columns));
                let mut part = Vec::with_capacity(order.len() * bytes);
                for row in order.iter().map(|&row| row as usize) {
                    if row >= *rows {
                        bail!("row {row} of {rows}");
                    }
                    part.extend_from_slice(&data[(first + row) * bytes..][..bytes]);
                }
                let storage = QStorage::from_data(part.into(), &blocks.device(), blocks.dtype())?;
                Ok(QTensor::new(storage, (order.len(), columns))?.into())
            }
        }
    }

    /// The rows `ids` (u32, N): (N, columns).
    pub fn select(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) | Self::Mixed(tensor) => select(tensor, ids),
            Self::Bytes(bytes) => {
                let (ids, mut out) = (ids.to_vec1::<u32>()?, Vec::new());
                ids.iter().try_for_each(|&id| bytes.read(id as usize, &mut out))?;
                Tensor::from_vec(out, (ids.len(), bytes.shape().1), &Device::Cpu)
            }
            Self::Blocks { blocks, host, first, rows } => {
                let (_, columns) = blocks.shape().dims2()?;
                let bytes = row_bytes(blocks, columns);
                let data = match host.get() {
                    Some(kept) => Cow::Borrowed(kept.as_slice()),
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
                    dequantise(&data[(first + row) * bytes..][..bytes], blocks.dtype(), out)?;
                }
                Tensor::from_vec(out, (ids.len(), columns), &blocks.device())?.to_dtype(self.dtype())
            }
        }
    }

    /// `x wᵀ + b` as [`linear`](super::linear()): x (..., columns) and b (rows) give (..., rows).
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => linear(x, tensor, bias),
            Self::Mixed(tensor) => mixed_linear(x, tensor, bias),
            Self::Bytes(w) => products_of_bytes(x, [(w, bias)]).map(|[y]| y),
            Self::Blocks { blocks, first, rows, .. } => {
                let (_, columns) = blocks.shape().dims2()?;
                check(x, (*rows, columns), bias)?;
                if !x.device().is_cpu() {
                    let y = product_on_gpu(x, blocks)?;
                    return bias.map_or(Ok(y.clone()), |b| y.broadcast_add(b));
                }
                let (x, bias) = (contiguous(x)?, bias.map(contiguous).transpose()?);
                let (inputs, bias) = (Borrowed::of(&x), bias.as_ref().map(Borrowed::of));
                let (data, bytes) = (blocks.data()?, row_bytes(blocks, columns));
                let w = Rows::Blocks(&data[first * bytes..][..rows * bytes], blocks.dtype());
                let bias = bias.as_ref().map(|b| b.slice::<f32>()).transpose()?;
                let y = product(inputs.slice()?, w, bias, (*rows, columns))?;
                shaped(y, &x, *rows)
            }
        }
    }
}

/// [`WeightMatrix::linear`] of the same x with several matrices, at once where they are bytes.
///
/// Errors when the shapes do not fit.
pub fn linear_each<const N: usize>(x: &Tensor, layers: [(&WeightMatrix, Option<&Tensor>); N]) -> Result<[Tensor; N]> {
    let bytes =
        layers.iter().filter_map(|&(w, bias)| if let WeightMatrix::Bytes(w) = w { Some((w, bias)) } else { None });
    if let Ok(layers) = <[_; N]>::try_from(bytes.collect::<Vec<_>>()) {
        return products_of_bytes(x, layers);
    }
    let products: Vec<Tensor> = match x.device().is_cpu() {
        // One of a few rows is too little for all threads.
        true => layers.par_iter().map(|(w, bias)| w.linear(x, *bias)).collect::<Result<_>>()?,
        false => layers.iter().map(|(w, bias)| w.linear(x, *bias)).collect::<Result<_>>()?,
    };
    products.try_into().map_err(|_| Error::Msg("a product for every matrix".into()))
}

fn products_of_bytes<const N: usize>(x: &Tensor, layers: [(&Bytes, Option<&Tensor>); N]) -> Result<[Tensor; N]> {
    for (w, bias) in layers {
        check(x, w.shape(), bias)?;
    }
    let x = x.to_dtype(DType::F32)?.contiguous()?;
    let biases: Vec<Option<Tensor>> =
        layers.iter().map(|(_, b)| b.map(contiguous).transpose()).collect::<Result<_>>()?;
    let biases: Vec<Option<Borrowed>> = biases.iter().map(|bias| bias.as_ref().map(Borrowed::of)).collect();
    let mut each = Vec::new();
    for ((w, _), bias) in layers.iter().zip(&biases) {
        each.push((*w, bias.as_ref().map(|bias| bias.slice::<f32>()).transpose()?));
    }
    let inputs = Borrowed::of(&x);
    let products = bytes::products(inputs.slice()?, &each, x.dims()[x.rank() - 1])?;
    let products = products.into_iter().zip(&each).map(|(y, (w, _))| shaped(y, &x, w.shape().0));
    let products: Vec<Tensor> = products.collect::<Result<_>>()?;
    products.try_into().map_err(|_| Error::Msg("a product for every matrix".into()))
}

fn contiguous(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F32)?.contiguous()
}

/// Errors unless x (..., columns) and the bias (rows) fit a matrix.
fn check(x: &Tensor, (rows, columns): (usize, usize), bias: Option<&Tensor>) -> Result<()> {
    if x.dims().last() != Some(&columns) || bias.is_some_and(|b| b.dims() != [rows]) {
        let bias = bias.map(Tensor::dims);
        bail!("linear: {:?} does not fit {rows} rows of {columns} and bias {bias:?}", x.dims());
    }
    Ok(())
}

/// `x + y wᵀ` in x's memory where there is a kernel for that: nothing else may need x.
///
/// Errors when the shapes do not fit.
pub fn add_linear(x: Tensor, y: &Tensor, w: &WeightMatrix, bias: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (WeightMatrix::Dense(w), None) = (w, bias)
        && super::cuda::add_product(&x, y, w)?
    {
        return Ok(x);
    }
    add(&x, &w.linear(y, bias)?)
}

/// [`swiglu`](super::swiglu()) of the products with two matrices of the same shape: x (..., columns) gives (..., rows).
pub fn gated_linear(x: &Tensor, gate: &WeightMatrix, up: &WeightMatrix) -> Result<Tensor> {
    if let (
        WeightMatrix::Blocks { blocks: a, first: 0, rows, .. },
        WeightMatrix::Blocks { blocks: b, first: 0, rows: same, .. },
    ) = (gate, up)
    {
        let (count, columns) = a.shape().dims2()?;
        let fits = x.dims().last() == Some(&columns) && a.shape() == b.shape() && (count, rows) == (*rows, same);
        if fits && x.device().is_cpu() {
            let x = x.to_dtype(DType::F32)?.contiguous()?;
            let (inputs, a_data, b_data) = (Borrowed::of(&x), a.data()?, b.data()?);
            let (gate, up) = (Rows::Blocks(&a_data, a.dtype()), Rows::Blocks(&b_data, b.dtype()));
            if let Some(y) = gated(inputs.slice()?, gate, up, (count, columns))? {
                return shaped(y, &x, count);
            }
        }
    }
    if let (WeightMatrix::Bytes(a), WeightMatrix::Bytes(b)) = (gate, up)
        && a.shape() == b.shape()
    {
        check(x, a.shape(), None)?;
        let x = contiguous(x)?;
        return shaped(bytes::gated(Borrowed::of(&x).slice()?, a, b)?, &x, a.shape().0);
    }
    if let (WeightMatrix::Dense(a), WeightMatrix::Dense(b)) = (gate, up)
        && slice::fused(&[x, a, b])
        && a.dims() == b.dims()
        && x.dims().last() == a.dims().last()
        // The gradient is that of the composition.
        && ![x, a, b].iter().any(|t| t.track_op())
    {
        let (x, a, b) = (x.contiguous()?, a.contiguous()?, b.contiguous()?);
        let (inputs, a, b, shape) = (Borrowed::of(&x), Borrowed::of(&a), Borrowed::of(&b), a.dims2()?);
        if let Some(y) = gated(inputs.slice()?, Rows::Plain(a.slice()?), Rows::Plain(b.slice()?), shape)? {
            return shaped(y, &x, shape.0);
        }
    }
    swiglu(&gate.linear(x, None)?, &up.linear(x, None)?)
}

/// The type of what goes in and comes out of blocks: a GPU computes in half precision.
fn activations(blocks: &QTensor) -> DType {
    if blocks.device().is_cpu() { DType::F32 } else { DType::BF16 }
}

/// x (..., columns) times all blocks (rows, columns) of a GPU: (..., rows) of x's dtype.
fn product_on_gpu(x: &Tensor, blocks: &Arc<QTensor>) -> Result<Tensor> {
    /// candle's kernels take so many inputs at once; for more it takes less time to make numbers of the blocks.
    const INPUTS: usize = 8;
    let (_, columns) = blocks.shape().dims2()?;
    if x.elem_count() / columns <= INPUTS {
        return QMatMul::from_arc(blocks.clone())?.forward(&x.to_dtype(DType::F32)?.contiguous()?)?.to_dtype(x.dtype());
    }
    #[cfg(feature = "cuda")]
    if let Some(w) = super::cuda::to_bf16(blocks)? {
        return linear(x, &w.to_dtype(x.dtype())?, None);
    }
    linear(x, &blocks.dequantize_f16(x.device())?.to_dtype(x.dtype())?, None)
}

/// Rows of so many numbers, one for each of x's.
fn shaped(y: Vec<f32>, x: &Tensor, rows: usize) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(rows);
    Tensor::from_vec(y, dims, x.device())
}

fn row_bytes(blocks: &QTensor, columns: usize) -> usize {
    columns / blocks.dtype().block_size() * blocks.dtype().type_size()
}

#[cfg(test)]
mod tests {
    use super::super::blocks::quantise;
    use super::super::check::random;
    use super::super::few::FEW;
    use super::*;
    use candle_core::Device;
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
            for inputs in [1, 4, 60] {
                let x = random((2, inputs, 256), 3);
                // Where both factors may be rounded to bf16 a product is off by 2^-8 of itself at most.
                let part = if inputs > FEW { 1.01 / 256.0 } else { 0.0 };
                let check = |blocks: &WeightMatrix, dense: &WeightMatrix, bias: Option<&Tensor>| {
                    let WeightMatrix::Dense(w) = dense else { unreachable!("it is dense") };
                    let most = ((linear(&x.abs()?, &w.abs()?, None)? * part)? + 1e-4)?;
                    let off = (blocks.linear(&x, bias)? - dense.linear(&x, bias)?)?.abs()?;
                    let over = far(&off.maximum(&most)?, &most);
                    assert!(over == 0.0, "{dtype:?}, {inputs} inputs: {over} over what rounding explains");
                    Result::Ok(())
                };
                check(&blocks, &dense, Some(&b))?;
                let part = |m: &WeightMatrix| m.narrow(7, 100)?.narrow(1, 70);
                check(&part(&blocks)?, &part(&dense)?, None)?;
            }
            let ids = Tensor::new(&[0u32, 299, 5], &Device::Cpu)?;
            assert_eq!(far(&blocks.select(&ids)?, &dense.select(&ids)?), 0.0);
            let (order, all) = ([299u32, 7, 7], Tensor::new(&[0u32, 1, 2], &Device::Cpu)?);
            for (whole, want) in [(&blocks, &dense), (&blocks.narrow(0, 300)?, &dense)] {
                let want = want.select(&Tensor::new(&order, &Device::Cpu)?)?;
                assert_eq!(far(&whole.reordered(&order)?.select(&all)?, &want), 0.0);
            }
            assert!(blocks.narrow(0, 10)?.reordered(&[10]).is_err());
        }
        Ok(())
    }

    /// Inputs, and numbers in blocks, may be rounded to bf16, but nothing else; and all panels, rows and columns count.
    #[test]
    fn many_inputs_lose_no_more_than_rounding() -> Result<()> {
        for (inputs, rows, columns) in [(9, 8, 32), (60, 75, 1088), (1000, 33, 96), (33, 18, 5632)] {
            let round = |x: &Tensor| x.to_dtype(DType::BF16)?.to_dtype(DType::F32);
            let (x, w, b) =
                (round(&random((inputs, columns), 1))?, round(&random((rows, columns), 2))?, random(rows, 3));
            let values = w.flatten_all()?.to_vec1::<f32>()?;
            let blocks = WeightMatrix::from(quantise(&values, (rows, columns), GgmlDType::BF16, &Device::Cpu)?);
            let want = WeightMatrix::Dense(w).linear(&x, Some(&b))?;
            assert!(far(&blocks.linear(&x, Some(&b))?, &want) < 1e-3, "{inputs} x {rows} x {columns}");
        }
        Ok(())
    }

    #[test]
    fn two_products_and_their_gate_are_one() -> Result<()> {
        for (inputs, rows, columns) in [(3, 40, 256), (70, 270, 256), (20, 12, 5632)] {
            let (x, w) = (random((2, inputs, columns), 1), random((2 * rows, columns), 2));
            let values = (w.as_tensor() / (columns as f64).sqrt())?.flatten_all()?.to_vec1::<f32>()?;
            for dtype in [GgmlDType::F32, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q4K] {
                let matrix = |values| quantise(values, (rows, columns), dtype, &Device::Cpu).map(WeightMatrix::from);
                let (gate, up) = (matrix(&values[..rows * columns])?, matrix(&values[rows * columns..])?);
                let want = swiglu(&gate.linear(&x, None)?, &up.linear(&x, None)?)?;
                assert!(far(&gated_linear(&x, &gate, &up)?, &want) < 1e-4, "{dtype:?}, {inputs} x {rows} x {columns}");
            }
        }
        Ok(())
    }

    #[test]
    fn bytes_are_the_numbers_that_they_stand_for() -> Result<()> {
        if !Bytes::suits(64) {
            return Ok(());
        }
        let matrix = |rows: usize, by: usize| -> Result<(WeightMatrix, WeightMatrix)> {
            let bytes: Vec<u8> = (0..rows * 64).map(|i| (i * by % 256) as u8).collect();
            let scales: Vec<f32> = (0..rows).map(|row| 0.001 * (row + 1) as f32).collect();
            let bytes = Bytes::new(bytes.into(), &scales, (rows, 64))?;
            let mut numbers = Vec::new();
            (0..rows).try_for_each(|row| bytes.read(row, &mut numbers))?;
            let dense = Tensor::from_vec(numbers, (rows, 64), &Device::Cpu)?;
            Ok((WeightMatrix::Bytes(bytes), WeightMatrix::Dense(dense)))
        };
        let ((a, a_dense), (b, b_dense), (wide, _)) = (matrix(40, 37)?, matrix(40, 91)?, matrix(41, 11)?);
        let (x, bias) = (random((2, 7, 64), 1), random(40, 2));
        let near = |got: &Tensor, want: &Tensor| {
            let (off, largest) = (far(got, want), far(want, &want.zeros_like().unwrap()));
            assert!(off < 1e-4 * largest, "{off} of {largest}");
        };
        let want = linear_each(&x, [(&a_dense, None), (&b_dense, Some(&bias))])?;
        for layers in [[(&a, None), (&b, Some(&*bias))], [(&a_dense, None), (&b, Some(&*bias))]] {
            linear_each(&x, layers)?.iter().zip(&want).for_each(|(got, want)| near(got, want));
        }
        near(&gated_linear(&x, &a, &b)?, &gated_linear(&x, &a_dense, &b_dense)?);
        assert!(gated_linear(&x, &a, &wide).is_err() && a.linear(&random((2, 63), 1), None).is_err());
        let ids = Tensor::new(&[39u32, 0, 39], &Device::Cpu)?;
        assert_eq!(far(&a.narrow(0, 40)?.select(&ids)?, &a_dense.select(&ids)?), 0.0);
        assert!(a.select(&Tensor::new(&[40u32], &Device::Cpu)?).is_err());
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

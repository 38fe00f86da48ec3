//! Random weights, for measuring a model without its files.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Result, Shape, Tensor};

use super::Init;
use crate::ops::{self, WeightMatrix};
use crate::rng::{Rng, Stream};

/// Rows, or single numbers, that are drawn; the others repeat them.
const DRAWN: usize = 64;

fn draw(count: usize, init: Init) -> Vec<f32> {
    let rng = Rng::new(0, 0, Stream::Train, 0);
    let value = |i: u64| match init {
        Init::Zeros => 0.0,
        Init::Ones => 1.0,
        Init::Normal { std } => rng.normal(i) * std,
        Init::Uniform { bound } => (2.0 * rng.uniform(i) - 1.0) * bound,
    };
    (0..count as u64).map(|i| value(i) as f32).collect()
}

/// A tensor of `init`'s numbers, which repeat.
pub(super) fn tensor(shape: &Shape, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
    let count = shape.elem_count();
    let period = shape.dims().last().map_or(1, |columns| columns * DRAWN).clamp(1, count.max(1));
    let few = Tensor::from_vec(draw(period, init), period, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?;
    // Repeated on the device: copying all of it to a GPU would take long.
    let whole = few.broadcast_as((count / period, period))?.flatten_all()?;
    Tensor::cat(&[whole, few.narrow(0, 0, count % period)?], 0)?.reshape(shape)
}

/// As [`tensor`], in bytes with a scale per row.
pub(super) fn bytes((rows, columns): (usize, usize), init: Init) -> (Vec<u8>, Vec<f32>) {
    let few = draw(rows.min(DRAWN) * columns, init);
    let scale = few.iter().fold(f32::MIN_POSITIVE, |most, x| most.max(x.abs())) / 127.0;
    let few: Vec<u8> = few.iter().map(|x| ((x / scale).round() + 128.0) as u8).collect();
    (few.into_iter().cycle().take(rows * columns).collect(), vec![scale; rows])
}

/// As [`tensor`], in blocks: never more than a few rows of it are f32.
pub(super) fn matrix(
    (rows, columns): (usize, usize),
    init: Init,
    blocks: GgmlDType,
    device: &Device,
) -> Result<WeightMatrix> {
    let drawn = rows.min(DRAWN);
    let few = ops::quantize(&draw(drawn * columns, init), (drawn, columns), blocks, &Device::Cpu)?;
    let few = few.data()?;
    let bytes: Vec<u8> = few.chunks(few.len() / drawn).cycle().take(rows).flatten().copied().collect();
    WeightMatrix::from_blocks(bytes.into(), blocks, (rows, columns), device)
}

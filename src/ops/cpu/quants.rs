//! GGML's quantised formats: every block of numbers is a few bytes of scales and a few bits a
//! number.

use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ4K, BlockQ8_0};
use candle_core::quantized::{GgmlDType, GgmlType, QStorage, QTensor};
use candle_core::{Device, Result, bail};
use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use pulp::bytemuck::cast_slice;
use rayon::prelude::*;

/// Blocks per task.
const TASK: usize = 256;

/// Rows of weights, f32 or in blocks.
#[derive(Clone, Copy)]
pub(crate) enum WeightRows<'a> {
    F32(&'a [f32]),
    /// Of a type that [`dequantize`] supports.
    Blocks(&'a [u8], GgmlDType),
}

impl<'a> WeightRows<'a> {
    /// The bytes in memory, and their type.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn bytes(self) -> (&'a [u8], GgmlDType) {
        match self {
            Self::F32(w) => (cast_slice(w), GgmlDType::F32),
            Self::Blocks(w, dtype) => (w, dtype),
        }
    }

    /// `count` rows of `columns` from `first` on.
    #[inline(always)]
    pub(crate) fn narrow(self, first: usize, count: usize, columns: usize) -> Self {
        match self {
            Self::F32(w) => Self::F32(&w[first * columns..][..count * columns]),
            Self::Blocks(w, dtype) => {
                let bytes = size_in_bytes(dtype, columns);
                Self::Blocks(&w[first * bytes..][..count * bytes], dtype)
            }
        }
    }
}

/// Bytes of `count` numbers.
#[inline(always)]
pub(crate) fn size_in_bytes(dtype: GgmlDType, count: usize) -> usize {
    count / dtype.block_size() * dtype.type_size()
}

/// Quantises `values`, the rows of a matrix of `shape` (rows, columns), onto `device`. Rounds as
/// GGML's reference does.
///
/// Errors: a type other than F32, F16, BF16, Q8_0, Q4_0 and Q4K, or columns that do not divide into
/// blocks.
pub fn quantize(values: &[f32], shape: (usize, usize), dtype: GgmlDType, device: &Device) -> Result<QTensor> {
    let blocks = match dtype {
        GgmlDType::F32 => blocks::<f32>(values, shape),
        GgmlDType::F16 => blocks::<f16>(values, shape),
        GgmlDType::BF16 => blocks::<bf16>(values, shape),
        GgmlDType::Q8_0 => blocks::<BlockQ8_0>(values, shape),
        GgmlDType::Q4_0 => blocks::<BlockQ4_0>(values, shape),
        GgmlDType::Q4K => blocks::<BlockQ4K>(values, shape),
        other => bail!("weights of type {other:?} are not supported"),
    }?;
    match device {
        Device::Cpu => Ok(blocks),
        device => QTensor::new(QStorage::from_data(blocks.data()?, device, dtype)?, shape),
    }
}

fn blocks<T: GgmlType + Clone + Send + Sync + 'static>(values: &[f32], shape: (usize, usize)) -> Result<QTensor> {
    if values.len() != shape.0 * shape.1 || !shape.1.is_multiple_of(T::BLCK_SIZE) {
        bail!("{} numbers of shape {shape:?} do not fit blocks of {}", values.len(), T::BLCK_SIZE);
    }
    let mut blocks = vec![T::zeros(); values.len() / T::BLCK_SIZE];
    let pairs = blocks.par_chunks_mut(TASK).zip(values.par_chunks(TASK * T::BLCK_SIZE));
    pairs.for_each(|(blocks, values)| T::from_float(values, blocks));
    QTensor::new(QStorage::Cpu(Box::new(blocks)), shape)
}

/// The numbers of whole blocks of a type that [`quantize`] supports.
///
/// Errors: another type, or a number of bytes that is not that of `out`.
#[inline(always)]
pub fn dequantize(bytes: &[u8], dtype: GgmlDType, out: &mut [f32]) -> Result<()> {
    if bytes.len() != size_in_bytes(dtype, out.len()) {
        bail!("{} bytes of {dtype:?} are not {} numbers", bytes.len(), out.len());
    }
    // Loops, not closures: those are not always inlined into a caller with more CPU features.
    match dtype {
        GgmlDType::F32 => {
            for (b, [y]) in pairs(bytes, out) {
                *y = f32::from_le_bytes(*b);
            }
        }
        GgmlDType::F16 => {
            for (b, [y]) in pairs(bytes, out) {
                *y = f16_to_f32(*b);
            }
        }
        GgmlDType::BF16 => {
            for (b, [y]) in pairs(bytes, out) {
                *y = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        GgmlDType::Q8_0 => {
            for (b, y) in pairs(bytes, out) {
                q8_0(b, y);
            }
        }
        GgmlDType::Q4_0 => {
            for (b, y) in pairs(bytes, out) {
                q4_0(b, y);
            }
        }
        GgmlDType::Q4K => {
            for (b, y) in pairs(bytes, out) {
                q4_k(b, y);
            }
        }
        other => bail!("weights of type {other:?} are not supported"),
    }
    Ok(())
}

/// Pairs of a block and its numbers.
#[inline(always)]
fn pairs<'a, const BYTES: usize, const NUMBERS: usize>(
    bytes: &'a [u8],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8; BYTES], &'a mut [f32; NUMBERS])> {
    let out = out.as_chunks_mut().0;
    // The trip count is a constant if the length of `out` is.
    bytes.as_chunks().0[..out.len()].iter().zip(out)
}

/// The value of an f16, without branches or feature detection, so that a loop over it vectorises.
#[inline(always)]
pub(crate) fn f16_to_f32(bytes: [u8; 2]) -> f32 {
    let bits = u32::from(u16::from_le_bytes(bytes));
    let magnitude = (bits & 0x7fff) << 13;
    // The exponent biases of f16 and f32 are 112 apart; the product is right for subnormals too.
    let finite = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = magnitude | 0x7f80_0000;
    let magnitude = if bits & 0x7c00 == 0x7c00 { special } else { finite };
    f32::from_bits(magnitude | (bits & 0x8000) << 16)
}

/// A block of a scale (f16) and 32 signed bytes.
#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = f16_to_f32([block[0], block[1]]);
    for i in 0..32 {
        out[i] = scale * f32::from(block[2 + i] as i8);
    }
}

/// A block of a scale (f16) and 32 numbers of 4 bits, which stand for -8 to 7: the first 16 in the
/// lower halves of 16 bytes, the others in the upper ones.
#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = f16_to_f32([block[0], block[1]]);
    for i in 0..16 {
        out[i] = scale * (f32::from(block[2 + i] & 15) - 8.0);
        out[16 + i] = scale * (f32::from(block[2 + i] >> 4) - 8.0);
    }
}

/// A block of two scales (f16), eight pairs of 6-bit factors in 12 bytes, and 256 numbers of 4
/// bits. In each group of 32 a number counts as itself times the first scale and factor, minus the
/// second scale times the second factor.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (scale, offset, factors) = (f16_to_f32([block[0], block[1]]), f16_to_f32([block[2], block[3]]), &block[4..16]);
    let factor = |group: usize| match group {
        0..4 => (factors[group] & 63, factors[group + 4] & 63),
        _ => {
            let (low, high) = (factors[group + 4], |at: usize| (factors[at] >> 6) << 4);
            ((low & 15) | high(group - 4), (low >> 4) | high(group))
        }
    };
    for (pair, (bits, out)) in block[16..].as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let [low, high] = [factor(2 * pair), factor(2 * pair + 1)]
            .map(|(times, minus)| (scale * f32::from(times), offset * f32::from(minus)));
        for i in 0..32 {
            out[i] = low.0 * f32::from(bits[i] & 15) - low.1;
            out[32 + i] = high.0 * f32::from(bits[i] >> 4) - high.1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::random_values;
    use candle_core::Tensor;

    fn values(rows: usize, cols: usize) -> Vec<f32> {
        random_values((rows, cols), 5)
    }

    #[test]
    fn blocks_are_those_of_candle() {
        let (shape, x) = ((6, 512), values(6, 512));
        let tensor = Tensor::from_slice(&x, shape, &Device::Cpu).unwrap();
        for (dtype, error) in [
            (GgmlDType::F32, 0.0),
            (GgmlDType::F16, 1e-3),
            (GgmlDType::BF16, 8e-3),
            (GgmlDType::Q8_0, 8e-3),
            (GgmlDType::Q4_0, 0.13),
            (GgmlDType::Q4K, 0.12),
        ] {
            let ours = quantize(&x, shape, dtype, &Device::Cpu).unwrap();
            let theirs = QTensor::quantize(&tensor, dtype).unwrap();
            assert!(ours.data().unwrap() == theirs.data().unwrap(), "{dtype:?}");
            let mut back = vec![0.0; x.len()];
            dequantize(&ours.data().unwrap(), dtype, &mut back).unwrap();
            let want = theirs.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(back, want, "{dtype:?}");
            let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            let off = x.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
            assert!(off <= error, "{dtype:?}: {off}");
        }
    }

    #[test]
    fn every_f16_has_its_value() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(bits.to_le_bytes()), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:x}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = values(2, 48);
        assert!(quantize(&x, (2, 48), GgmlDType::Q8_0, &Device::Cpu).is_err());
        assert!(quantize(&x, (2, 47), GgmlDType::F16, &Device::Cpu).is_err());
        assert!(quantize(&x, (2, 48), GgmlDType::Q2K, &Device::Cpu).is_err());
        assert!(dequantize(&[0; 33], GgmlDType::Q8_0, &mut [0.0; 32]).is_err());
    }
}

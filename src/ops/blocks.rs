//! Numbers in GGML's blocks, and back: every block is a few bytes of scales and a few bits a number.

use candle_core::quantized::k_quants::{BlockQ4K, BlockQ8_0};
use candle_core::quantized::{GgmlDType, GgmlType, QStorage, QTensor};
use candle_core::{Device, Result, bail};
use half::{bf16, f16};
use rayon::prelude::*;

/// Blocks that one thread makes at a time.
const CHUNK: usize = 256;

/// `values`, rows of `shape`, in blocks on `device`. Rounds as GGML's reference does.
///
/// Errors: a type other than F32, F16, BF16, Q8_0 and Q4K, or columns that do not divide into blocks.
pub fn quantise(values: &[f32], shape: (usize, usize), dtype: GgmlDType, device: &Device) -> Result<QTensor> {
    let blocks = match dtype {
        GgmlDType::F32 => blocks::<f32>(values, shape),
        GgmlDType::F16 => blocks::<f16>(values, shape),
        GgmlDType::BF16 => blocks::<bf16>(values, shape),
        GgmlDType::Q8_0 => blocks::<BlockQ8_0>(values, shape),
        GgmlDType::Q4K => blocks::<BlockQ4K>(values, shape),
        other => bail!("weights are not kept as {other:?}"),
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
    let pairs = blocks.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK * T::BLCK_SIZE));
    pairs.for_each(|(blocks, values)| T::from_float(values, blocks));
    QTensor::new(QStorage::Cpu(Box::new(blocks)), shape)
}

/// Undoes [`quantise`] for the bytes of whole blocks.
///
/// Errors: a type that it does not make, or bytes that are not those of `out`.
#[inline(always)]
pub fn dequantise(bytes: &[u8], dtype: GgmlDType, out: &mut [f32]) -> Result<()> {
    if bytes.len() != out.len() / dtype.block_size() * dtype.type_size() {
        bail!("{} bytes of {dtype:?} are not {} numbers", bytes.len(), out.len());
    }
    // Loops rather than closures, which a compiler does not always take into a caller with wider registers.
    match dtype {
        GgmlDType::F32 => {
            for (b, [y]) in pairs(bytes, out) {
                *y = f32::from_le_bytes(*b);
            }
        }
        GgmlDType::F16 => {
            for (b, [y]) in pairs(bytes, out) {
                *y = half(*b);
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
        GgmlDType::Q4K => {
            for (b, y) in pairs(bytes, out) {
                q4_k(b, y);
            }
        }
        other => bail!("weights are not kept as {other:?}"),
    }
    Ok(())
}

/// Blocks and their numbers.
#[inline(always)]
fn pairs<'a, const BYTES: usize, const NUMBERS: usize>(
    bytes: &'a [u8],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8; BYTES], &'a mut [f32; NUMBERS])> {
    let out = out.as_chunks_mut().0;
    // Where the length of `out` is a constant, so is that of the loop.
    bytes.as_chunks().0[..out.len()].iter().zip(out)
}

/// The value of an f16, without a branch or the call that asks for an instruction: a loop over it can be vectorised.
#[inline(always)]
pub(super) fn half(bytes: [u8; 2]) -> f32 {
    let bits = u32::from(u16::from_le_bytes(bytes));
    let magnitude = (bits & 0x7fff) << 13;
    // The exponents of f16 and f32 are counted from numbers 112 apart; the product is right for subnormals too.
    let finite = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = magnitude | 0x7f80_0000;
    let magnitude = if bits & 0x7c00 == 0x7c00 { special } else { finite };
    f32::from_bits(magnitude | (bits & 0x8000) << 16)
}

/// A scale (f16) and 32 signed bytes.
#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half([block[0], block[1]]);
    for i in 0..32 {
        out[i] = scale * f32::from(block[2 + i] as i8);
    }
}

/// Two scales (f16), eight pairs of 6-bit factors in 12 bytes, and 256 numbers of 4 bits: in groups of 32, the number
/// times the first scale and factor, minus the second scale and factor.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (scale, offset, factors) = (half([block[0], block[1]]), half([block[2], block[3]]), &block[4..16]);
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
    use candle_core::Tensor;

    fn values(rows: usize, cols: usize) -> Vec<f32> {
        let x = super::super::check::random((rows, cols), 5);
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn blocks_are_those_of_the_library() {
        let (shape, x) = ((6, 512), values(6, 512));
        let tensor = Tensor::from_slice(&x, shape, &Device::Cpu).unwrap();
        for (dtype, error) in [
            (GgmlDType::F32, 0.0),
            (GgmlDType::F16, 1e-3),
            (GgmlDType::BF16, 8e-3),
            (GgmlDType::Q8_0, 8e-3),
            (GgmlDType::Q4K, 0.12),
        ] {
            let ours = quantise(&x, shape, dtype, &Device::Cpu).unwrap();
            let theirs = QTensor::quantize(&tensor, dtype).unwrap();
            assert!(ours.data().unwrap() == theirs.data().unwrap(), "{dtype:?}");
            let mut back = vec![0.0; x.len()];
            dequantise(&ours.data().unwrap(), dtype, &mut back).unwrap();
            let want = theirs.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(back, want, "{dtype:?}");
            let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            let off = x.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
            assert!(off <= error, "{dtype:?}: {off}");
        }
    }

    #[test]
    fn every_half_has_its_value() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (half(bits.to_le_bytes()), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:x}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = values(2, 48);
        assert!(quantise(&x, (2, 48), GgmlDType::Q8_0, &Device::Cpu).is_err());
        assert!(quantise(&x, (2, 47), GgmlDType::F16, &Device::Cpu).is_err());
        assert!(quantise(&x, (2, 48), GgmlDType::Q2K, &Device::Cpu).is_err());
        assert!(dequantise(&[0; 33], GgmlDType::Q8_0, &mut [0.0; 32]).is_err());
    }
}

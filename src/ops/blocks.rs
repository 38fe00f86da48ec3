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
pub fn dequantise(bytes: &[u8], dtype: GgmlDType, out: &mut [f32]) -> Result<()> {
    if bytes.len() != out.len() / dtype.block_size() * dtype.type_size() {
        bail!("{} bytes of {dtype:?} are not {} numbers", bytes.len(), out.len());
    }
    match dtype {
        GgmlDType::F32 => each(bytes, out, |b, [y]| *y = f32::from_le_bytes(*b)),
        GgmlDType::F16 => each(bytes, out, |b, [y]| *y = f16::from_le_bytes(*b).to_f32()),
        GgmlDType::BF16 => each(bytes, out, |b, [y]| *y = bf16::from_le_bytes(*b).to_f32()),
        GgmlDType::Q8_0 => each(bytes, out, q8_0),
        GgmlDType::Q4K => each(bytes, out, q4_k),
        other => bail!("weights are not kept as {other:?}"),
    }
    Ok(())
}

fn each<const BYTES: usize, const NUMBERS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; NUMBERS]),
) {
    bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0).for_each(|(b, y)| block(b, y));
}

/// A scale (f16) and 32 signed bytes.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
    out.iter_mut().zip(&block[2..]).for_each(|(y, &q)| *y = scale * f32::from(q as i8));
}

/// Two scales (f16), eight pairs of 6-bit factors in 12 bytes, and 256 numbers of 4 bits: in groups of 32, the number
/// times the first scale and factor, minus the second scale and factor.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let (scale, offset, factors) = (half(0), half(2), &block[4..16]);
    let factor = |group: usize| match group {
        0..4 => (factors[group] & 63, factors[group + 4] & 63),
        _ => {
            let (low, high) = (factors[group + 4], |at: usize| (factors[at] >> 6) << 4);
            ((low & 15) | high(group - 4), (low >> 4) | high(group))
        }
    };
    for (pair, (bits, out)) in block[16..].as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let (low, high) = out.split_at_mut(32);
        for (half, out) in [low, high].into_iter().enumerate() {
            let (times, minus) = factor(2 * pair + half);
            let (times, minus) = (scale * f32::from(times), offset * f32::from(minus));
            out.iter_mut().zip(bits).for_each(|(y, &q)| *y = times * f32::from((q >> (4 * half)) & 15) - minus);
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
    fn what_does_not_fit_is_refused() {
        let x = values(2, 48);
        assert!(quantise(&x, (2, 48), GgmlDType::Q8_0, &Device::Cpu).is_err());
        assert!(quantise(&x, (2, 47), GgmlDType::F16, &Device::Cpu).is_err());
        assert!(quantise(&x, (2, 48), GgmlDType::Q2K, &Device::Cpu).is_err());
        assert!(dequantise(&[0; 33], GgmlDType::Q8_0, &mut [0.0; 32]).is_err());
    }
}

//! GEMV, and GEMM with at most [`GEMV_ROWS`] rows of activations, as in decoding one token: bound
//! by the bandwidth of reading the weights.

#[cfg(target_arch = "x86_64")]
mod avx2;

use candle_core::Result;
use pulp::{Arch, Simd, WithSimd};

use super::quants::{WeightRows, dequantize, size_in_bytes};

/// The most rows of activations.
pub(crate) const GEMV_ROWS: usize = 8;

/// Numbers that are dequantised at a time, into a buffer that stays in the L1 cache.
const STRIP: usize = 256;
/// Independent accumulators of one dot product, to hide the latency of the additions.
const ACCUMULATORS: usize = 4;

/// Some columns, aligned so that no load crosses a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Strip([f32; STRIP]);

/// Rows of activations as the kernels read them.
pub(crate) struct Activations {
    /// Row after row, the last strip of each padded with zeros: a loop of fixed length is twice as
    /// fast.
    strips: Vec<Strip>,
    columns: usize,
}

impl Activations {
    /// From x (M, columns).
    pub(crate) fn new(x: &[f32], columns: usize) -> Self {
        let strips = x.chunks_exact(columns).flat_map(|x| x.chunks(STRIP));
        let strips = strips.map(|x| {
            let mut strip = Strip([0.0; STRIP]);
            strip.0[..x.len()].copy_from_slice(x);
            strip
        });
        Self { strips: strips.collect(), columns }
    }

    fn strips_per_row(&self) -> usize {
        self.columns.div_ceil(STRIP)
    }

    fn rows(&self) -> usize {
        self.strips.len() / self.strips_per_row()
    }
}

/// The dot products of every row of `w` with every row of x: (rows of w, M) in `y`.
///
/// Errors: blocks of a type that is not supported, or that do not divide the columns.
pub(crate) fn gemv(y: &mut [f32], w: WeightRows, x: &Activations) -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    if let (w, dtype) = w.bytes()
        && avx2::supports(dtype)
    {
        // SAFETY: `supports` has checked the CPU features.
        #[allow(unsafe_code)]
        unsafe {
            avx2::gemv(y, w, dtype, x)
        };
        return Ok(());
    }
    Arch::new().dispatch(Portable { y, w, x })
}

struct Portable<'a> {
    y: &'a mut [f32],
    w: WeightRows<'a>,
    x: &'a Activations,
}

impl WithSimd for Portable<'_> {
    type Output = Result<()>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Result<()> {
        let Self { y, w, x } = self;
        let (strips, columns) = (x.strips_per_row(), x.columns);
        let mut dense = Strip([0.0; STRIP]);
        let mut sums = [[simd.splat_f32s(0.0); ACCUMULATORS]; GEMV_ROWS];
        for (row, y) in y.chunks_exact_mut(x.rows()).enumerate() {
            let w = w.narrow(row, 1, columns);
            for strip in 0..strips {
                let at = strip * STRIP;
                let n = STRIP.min(columns - at);
                match w {
                    WeightRows::F32(w) => dense.0[..n].copy_from_slice(&w[at..at + n]),
                    WeightRows::Blocks(w, dtype) => {
                        let w = &w[size_in_bytes(dtype, at)..size_in_bytes(dtype, at + n)];
                        match n {
                            STRIP => dequantize(w, dtype, &mut dense.0)?,
                            _ => dequantize(w, dtype, &mut dense.0[..n])?,
                        }
                    }
                }
                for (sums, x) in sums.iter_mut().zip(x.strips[strip..].iter().step_by(strips)) {
                    *sums = accumulate(simd, *sums, &dense, x);
                }
            }
            for (y, sums) in y.iter_mut().zip(&mut sums) {
                let [a, b, c, d] = std::mem::replace(sums, [simd.splat_f32s(0.0); ACCUMULATORS]);
                *y = simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)));
            }
        }
        Ok(())
    }
}

#[inline(always)]
fn accumulate<S: Simd>(simd: S, mut sums: [S::f32s; ACCUMULATORS], w: &Strip, x: &Strip) -> [S::f32s; ACCUMULATORS] {
    let (w, x) = (S::as_simd_f32s(&w.0).0, S::as_simd_f32s(&x.0).0);
    for (w, x) in w.as_chunks::<ACCUMULATORS>().0.iter().zip(x.as_chunks::<ACCUMULATORS>().0) {
        for i in 0..ACCUMULATORS {
            sums[i] = simd.mul_add_e_f32s(w[i], x[i], sums[i]);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::quants::quantize;
    use super::*;
    use crate::ops::testing::random_values as numbers;
    use candle_core::quantized::GgmlDType;

    #[test]
    fn blocks_multiply_as_their_numbers() {
        for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K]
        {
            for (rows, columns, count) in
                [(3, 32, 1), (5, 96, 2), (2, 256, 3), (7, 320, 4), (1, 1088, 5), (4, 512, 8), (3, 768, 1), (3, 77, 3)]
            {
                if columns % dtype.block_size() > 0 {
                    continue;
                }
                let (values, inputs) = (numbers((rows, columns), 1), numbers((count, columns), 2));
                let w = quantize(&values, (rows, columns), dtype, &Device::Cpu).unwrap().data().unwrap().into_owned();
                let (mut dense, mut y) = (vec![0f32; rows * columns], vec![0f32; rows * count]);
                dequantize(&w, dtype, &mut dense).unwrap();
                let w = WeightRows::Blocks(&w, dtype);
                gemv(&mut y, w, &Activations::new(&inputs, columns)).unwrap();
                for (i, y) in y.iter().enumerate() {
                    let (w, x) = (&dense[i / count * columns..][..columns], &inputs[i % count * columns..][..columns]);
                    let terms = || w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    let (want, most) = (terms().sum::<f64>(), 1e-6 * terms().map(f64::abs).sum::<f64>());
                    assert!(
                        (f64::from(*y) - want).abs() <= most,
                        "{dtype:?} {rows}x{columns}, {count}: {y}, not {want}"
                    );
                }
            }
        }
    }
}

//! GEMV with AVX2 for weights of 32 and 16 bits: widened in registers and accumulated at once.

use std::arch::x86_64::*;

use candle_core::quantized::GgmlDType;

use super::{ACCUMULATORS, Activations, STRIP};
use crate::ops::cpu::quants::size_in_bytes;

/// f32 per register.
const LANES: usize = 8;
/// Distance in bytes at which weights are prefetched, beyond the end of a row too: the next one
/// follows.
const PREFETCH: usize = 2048;

/// Whether the CPU has the features, and there is a kernel for this type.
pub(super) fn supports(dtype: GgmlDType) -> bool {
    matches!(dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16)
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// As [`super::gemv`], on the bytes of `w`.
///
/// # Safety
///
/// The CPU has to [support](supports) it.
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(unsafe_code)]
pub(super) unsafe fn gemv(y: &mut [f32], w: &[u8], dtype: GgmlDType, activations: &Activations) {
    let row = size_in_bytes(dtype, activations.columns);
    for (y, w) in y.chunks_exact_mut(activations.rows()).zip(w.chunks_exact(row)) {
        for (at, y) in (0..).step_by(2).zip(y.chunks_mut(2)) {
            let (x, one) = (|i: usize| row_of(activations, at + i), y.len() == 1);
            match dtype {
                GgmlDType::F32 if one => y.copy_from_slice(&f32s(w, [x(0)])),
                GgmlDType::F32 => y.copy_from_slice(&f32s(w, [x(0), x(1)])),
                GgmlDType::F16 if one => y.copy_from_slice(&f16s(w, [x(0)])),
                GgmlDType::F16 => y.copy_from_slice(&f16s(w, [x(0), x(1)])),
                _ if one => y.copy_from_slice(&bf16s(w, [x(0)])),
                _ => y.copy_from_slice(&bf16s(w, [x(0), x(1)])),
            }
        }
    }
}

/// One row of activations with its padding.
fn row_of(x: &Activations, row: usize) -> &[f32] {
    let strips = &x.strips[row * x.strips_per_row()..][..x.strips_per_row()];
    // SAFETY: a strip is nothing but its numbers, whose size is a multiple of its alignment.
    #[allow(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts(strips.as_ptr().cast(), strips.len() * STRIP)
    }
}

/// A kernel for unquantised numbers, `$bytes` of which fill a register when widened to f32.
macro_rules! unquantized {
    ($name:ident, $bytes:literal, $load:expr) => {
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn $name<const N: usize>(w: &[u8], rows: [&[f32]; N]) -> [f32; N] {
            let (pieces, rest) = w.as_chunks::<{ ACCUMULATORS * $bytes }>();
            // Activations are padded with zeros, so the weights may be, too.
            let mut last = [0u8; ACCUMULATORS * $bytes];
            last[..rest.len()].copy_from_slice(rest);
            let count = pieces.len() + usize::from(!rest.is_empty());
            let mut x: [&[[f32; ACCUMULATORS * LANES]]; N] = [&[]; N];
            for (x, row) in x.iter_mut().zip(rows) {
                *x = &row.as_chunks().0[..count];
            }
            let mut sums = [[_mm256_setzero_ps(); ACCUMULATORS]; N];
            for (at, piece) in pieces.iter().chain((!rest.is_empty()).then_some(&last)).enumerate() {
                for line in (0..ACCUMULATORS * $bytes).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(piece.as_ptr().wrapping_add(PREFETCH + line).cast());
                }
                for (i, bytes) in piece.as_chunks::<$bytes>().0.iter().enumerate() {
                    // SAFETY: it loads `$bytes` bytes.
                    #[allow(unsafe_code)]
                    let w = unsafe { $load(bytes.as_ptr()) };
                    for (sums, x) in sums.iter_mut().zip(&x) {
                        sums[i] = _mm256_fmadd_ps(w, load(&x[at].as_chunks().0[i]), sums[i]);
                    }
                }
            }
            let mut y = [0f32; N];
            for (y, [a, b, c, d]) in y.iter_mut().zip(sums) {
                *y = horizontal_sum(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
            }
            y
        }
    };
}
unquantized!(f32s, 32, |w: *const u8| _mm256_loadu_ps(w.cast()));
unquantized!(f16s, 16, |w: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(w.cast())));
unquantized!(bf16s, 16, |w: *const u8| {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(w.cast()))))
});

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(x: &[f32; LANES]) -> __m256 {
    // SAFETY: a register holds `LANES` numbers, and need not be aligned.
    #[allow(unsafe_code)]
    unsafe {
        _mm256_loadu_ps(x.as_ptr())
    }
}

/// The sum over a register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn horizontal_sum(x: __m256) -> f32 {
    let half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)))
}

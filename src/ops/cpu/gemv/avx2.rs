//! GEMV with AVX2 for weights of any type: dequantised in registers and accumulated at once.

use std::arch::x86_64::*;

use candle_core::quantized::GgmlDType;

use super::{ACCUMULATORS, Activations, STRIP, Strip};
use crate::ops::cpu::quants::size_in_bytes;

/// f32 per register.
const LANES: usize = 8;
/// Numbers per scale.
const GROUP: usize = 32;
/// Numbers, groups and bytes per block of Q4_K.
const K: usize = STRIP;
const GROUPS: usize = K / GROUP;
const Q4_K: usize = 144;
/// Distance in bytes at which weights are prefetched, beyond the end of a row too: the next one
/// follows.
const PREFETCH: usize = 2048;

/// Whether the CPU has the features, and there is a kernel for this type and number of columns.
pub(super) fn supports(dtype: GgmlDType, columns: usize) -> bool {
    let divide = match dtype {
        GgmlDType::Q8_0 => columns.is_multiple_of(GROUP),
        GgmlDType::Q4K => columns.is_multiple_of(K),
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => true,
        _ => false,
    };
    divide && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
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
            let sums = |i: usize| &activations.group_sums[(at + i) * activations.strips_per_row()..];
            match dtype {
                GgmlDType::F32 if one => y.copy_from_slice(&f32s(w, [x(0)])),
                GgmlDType::F32 => y.copy_from_slice(&f32s(w, [x(0), x(1)])),
                GgmlDType::F16 if one => y.copy_from_slice(&f16s(w, [x(0)])),
                GgmlDType::F16 => y.copy_from_slice(&f16s(w, [x(0), x(1)])),
                GgmlDType::BF16 if one => y.copy_from_slice(&bf16s(w, [x(0)])),
                GgmlDType::BF16 => y.copy_from_slice(&bf16s(w, [x(0), x(1)])),
                GgmlDType::Q8_0 if one => y.copy_from_slice(&q8_0(w.as_chunks().0, [x(0)])),
                GgmlDType::Q8_0 => y.copy_from_slice(&q8_0(w.as_chunks().0, [x(0), x(1)])),
                _ if one => y.copy_from_slice(&q4_k(w.as_chunks().0, [x(0)], [sums(0)])),
                _ => y.copy_from_slice(&q4_k(w.as_chunks().0, [x(0), x(1)], [sums(0), sums(1)])),
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

/// Sums over the groups of a strip.
pub(super) fn group_sums(strip: &Strip) -> [f32; GROUPS] {
    let mut sums = [0f32; GROUPS];
    sums.iter_mut().zip(strip.0.as_chunks::<GROUP>().0).for_each(|(sum, x)| *sum = x.iter().sum());
    sums
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

/// Blocks of a scale (f16) and 32 signed bytes: a group is summed before it is scaled.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q8_0<const N: usize>(w: &[[u8; 2 + GROUP]], rows: [&[f32]; N]) -> [f32; N] {
    let mut x: [&[[f32; GROUP]]; N] = [&[]; N];
    for (x, row) in x.iter_mut().zip(rows) {
        *x = &row.as_chunks().0[..w.len()];
    }
    let mut totals = [_mm256_setzero_ps(); N];
    for (at, block) in w.iter().enumerate() {
        _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(PREFETCH).cast());
        let scale = _mm256_set1_ps(f16_to_f32([block[0], block[1]]));
        let mut weights = [_mm256_setzero_ps(); GROUP / LANES];
        for (weights, bytes) in weights.iter_mut().zip(block[2..].as_chunks::<LANES>().0) {
            *weights = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(bytes)));
        }
        for (total, x) in totals.iter_mut().zip(&x) {
            let mut sum = _mm256_setzero_ps();
            for (weights, x) in weights.iter().zip(x[at].as_chunks::<LANES>().0) {
                sum = _mm256_fmadd_ps(*weights, load(x), sum);
            }
            *total = _mm256_fmadd_ps(sum, scale, *total);
        }
    }
    let mut y = [0f32; N];
    for (y, total) in y.iter_mut().zip(totals) {
        *y = horizontal_sum(total);
    }
    y
}

/// Blocks as [`quants`](crate::ops::cpu::quants) describes them: the offset that is subtracted from
/// all numbers of a group is multiplied with the group's sum of the activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn q4_k<const N: usize>(w: &[[u8; Q4_K]], rows: [&[f32]; N], sums: [&[[f32; GROUPS]]; N]) -> [f32; N] {
    let mut x: [&[[f32; K]]; N] = [&[]; N];
    for (x, row) in x.iter_mut().zip(rows) {
        *x = &row.as_chunks().0[..w.len()];
    }
    let low = _mm256_set1_epi32(15);
    let (mut totals, mut offsets) = ([_mm256_setzero_ps(); N], [_mm256_setzero_ps(); N]);
    for (at, block) in w.iter().enumerate() {
        for line in [0, 64, 128] {
            _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(PREFETCH + line).cast());
        }
        let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        let (times, minus, both) = (word(4), word(8), word(12));
        // The 6 bits of the first four factors of either kind lie together, those of the others as
        // 4 and 2.
        let first = |bits: u32| u64::from(bits & 0x3f3f_3f3f);
        let others = |four: u32, two: u32| u64::from(four & 0x0f0f_0f0f | (two >> 6 & 0x0303_0303) << 4) << 32;
        let times = (first(times) | others(both, times)).to_le_bytes();
        let minus = (first(minus) | others(both >> 4, minus)).to_le_bytes();
        let scaled = |factors: &[u8; 8], scale: f32| {
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(factors))), _mm256_set1_ps(scale))
        };
        let mut times_of = [0f32; GROUPS];
        store(&mut times_of, scaled(&times, f16_to_f32([block[0], block[1]])));
        let minus = scaled(&minus, f16_to_f32([block[2], block[3]]));
        for (offset, sums) in offsets.iter_mut().zip(sums) {
            *offset = _mm256_fmadd_ps(minus, load(&sums[at]), *offset);
        }
        for (pair, bytes) in block[16..].as_chunks::<GROUP>().0.iter().enumerate() {
            let mut parts = [[_mm256_setzero_ps(); 2]; N];
            for (i, bytes) in bytes.as_chunks::<LANES>().0.iter().enumerate() {
                let bits = _mm256_cvtepu8_epi32(eight(bytes));
                let numbers = [_mm256_and_si256(bits, low), _mm256_srli_epi32::<4>(bits)];
                for (n, part) in parts.iter_mut().enumerate() {
                    let x = x[n][at].as_chunks::<LANES>().0;
                    for g in 0..2 {
                        let x = load(&x[(2 * pair + g) * (GROUP / LANES) + i]);
                        part[g] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(numbers[g]), x, part[g]);
                    }
                }
            }
            for (total, part) in totals.iter_mut().zip(&parts) {
                for (g, part) in part.iter().enumerate() {
                    *total = _mm256_fmadd_ps(*part, _mm256_set1_ps(times_of[2 * pair + g]), *total);
                }
            }
        }
    }
    let mut y = [0f32; N];
    for (y, (total, offset)) in y.iter_mut().zip(totals.into_iter().zip(offsets)) {
        *y = horizontal_sum(total) - horizontal_sum(offset);
    }
    y
}

/// The value of an f16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn f16_to_f32(bytes: [u8; 2]) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes(bytes)))))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight(bytes: &[u8; 8]) -> __m128i {
    _mm_cvtsi64_si128(i64::from_le_bytes(*bytes))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(x: &[f32; LANES]) -> __m256 {
    // SAFETY: a register holds `LANES` numbers, and need not be aligned.
    #[allow(unsafe_code)]
    unsafe {
        _mm256_loadu_ps(x.as_ptr())
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(to: &mut [f32; LANES], x: __m256) {
    // SAFETY: a register holds `LANES` numbers, and need not be aligned.
    #[allow(unsafe_code)]
    unsafe {
        _mm256_storeu_ps(to.as_mut_ptr(), x);
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

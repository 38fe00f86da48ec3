//! Products of a few inputs with blocks of Q8_0 in the registers of AVX2: weights go from memory into sums, and are not put
//! down between.

use std::arch::x86_64::*;

/// Numbers of a block.
const BLOCK: usize = 32;
/// Numbers in a register.
const LANES: usize = 8;
/// Bytes by which weights are asked for ahead: those of the rows that follow as well, for they lie behind.
const AHEAD: usize = 2048;

/// A scale (f16) and 32 signed bytes.
pub(super) type Block = [u8; 2 + BLOCK];

/// Whether the processor has these registers.
pub(super) fn suits() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The products of a row of weights with some inputs, each at least as long.
///
/// # Safety
///
/// [`suits`] must hold.
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(unsafe_code)]
pub(super) unsafe fn row(y: &mut [f32], w: &[Block], inputs: &[&[[f32; BLOCK]]]) {
    let (y, inputs) = (y.chunks_mut(4), inputs.chunks(4));
    for (y, inputs) in y.zip(inputs) {
        match *inputs {
            [a] => y.copy_from_slice(&some(w, [a])),
            [a, b] => y.copy_from_slice(&some(w, [a, b])),
            [a, b, c] => y.copy_from_slice(&some(w, [a, b, c])),
            [a, b, c, d] => y.copy_from_slice(&some(w, [a, b, c, d])),
            _ => unreachable!("more inputs than are in a piece"),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn some<const N: usize>(w: &[Block], mut inputs: [&[[f32; BLOCK]]; N]) -> [f32; N] {
    for input in &mut inputs {
        *input = &input[..w.len()];
    }
    let mut totals = [_mm256_setzero_ps(); N];
    for (at, block) in w.iter().enumerate() {
        // SAFETY: a hint, whatever the address.
        #[allow(unsafe_code)]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(AHEAD).cast())
        };
        let half = _mm_cvtsi32_si128(i32::from(u16::from_le_bytes([block[0], block[1]])));
        let scale = _mm256_broadcastss_ps(_mm_cvtph_ps(half));
        let mut weights = [_mm256_setzero_ps(); BLOCK / LANES];
        for (weights, bytes) in weights.iter_mut().zip(block[2..].as_chunks::<LANES>().0) {
            // SAFETY: eight bytes are loaded from eight bytes.
            #[allow(unsafe_code)]
            let bytes = unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) };
            *weights = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
        }
        for (total, input) in totals.iter_mut().zip(&inputs) {
            let mut sum = _mm256_setzero_ps();
            for (weights, x) in weights.iter().zip(input[at].as_chunks::<LANES>().0) {
                // SAFETY: a register is loaded from as many numbers.
                #[allow(unsafe_code)]
                let x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
                sum = _mm256_fmadd_ps(*weights, x, sum);
            }
            *total = _mm256_fmadd_ps(sum, scale, *total);
        }
    }
    let mut sums = [0f32; N];
    for (sum, total) in sums.iter_mut().zip(totals) {
        let half = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps::<1>(total));
        let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
        *sum = _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)));
    }
    sums
}

//! Registers of AVX-512: 16 f32, or 16 pairs of bf16.

use std::arch::x86_64::*;

/// f32 or pairs of bf16 per register.
pub(crate) const LANES: usize = 16;

/// The pairs of bf16 of one register.
pub(crate) type Pairs = [u16; 2 * LANES];

/// Whether the CPU multiplies bf16, and [`gemm_bf16`](super::gemm_bf16::gemm_bf16) supports rows of
/// `columns` columns.
pub(crate) fn supports_bf16(columns: usize) -> bool {
    columns > 0
        && columns.is_multiple_of(2 * LANES)
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// The transpose of 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn transpose(r: [__m512; LANES]) -> [__m512; LANES] {
    // Interleaves pairs, then fours, of rows within every quarter of a register.
    let pairs: [__m512; LANES] = std::array::from_fn(|i| match i % 2 {
        0 => _mm512_unpacklo_ps(r[i], r[i + 1]),
        _ => _mm512_unpackhi_ps(r[i - 1], r[i]),
    });
    let fours: [__m512; LANES] = std::array::from_fn(|i| {
        let (a, b) = (i / 4 * 4 + i % 4 / 2, i / 4 * 4 + i % 4 / 2 + 2);
        let (a, b) = (_mm512_castps_pd(pairs[a]), _mm512_castps_pd(pairs[b]));
        _mm512_castpd_ps(if i % 2 == 0 { _mm512_unpacklo_pd(a, b) } else { _mm512_unpackhi_pd(a, b) })
    });
    // Column 4q + c is quarter q of the registers c, 4 + c, 8 + c and 12 + c.
    let halves: [[__m512; 4]; 4] = std::array::from_fn(|c| {
        [
            _mm512_shuffle_f32x4::<0b10_00_10_00>(fours[c], fours[4 + c]),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(fours[c], fours[4 + c]),
            _mm512_shuffle_f32x4::<0b10_00_10_00>(fours[8 + c], fours[12 + c]),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(fours[8 + c], fours[12 + c]),
        ]
    });
    std::array::from_fn(|column| {
        let [even_low, odd_low, even_high, odd_high] = halves[column % 4];
        match column / 4 {
            0 => _mm512_shuffle_f32x4::<0b10_00_10_00>(even_low, even_high),
            1 => _mm512_shuffle_f32x4::<0b10_00_10_00>(odd_low, odd_high),
            2 => _mm512_shuffle_f32x4::<0b11_01_11_01>(even_low, even_high),
            _ => _mm512_shuffle_f32x4::<0b11_01_11_01>(odd_low, odd_high),
        }
    })
}

/// Rounds to pairs of bf16; `low` fills the lower half of the register.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) fn round(low: __m512, high: __m512) -> __m512bh {
    _mm512_cvtne2ps_pbh(high, low)
}

/// A register from memory, of any alignment.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load(x: &[f32; LANES]) -> __m512 {
    // SAFETY: the array is as long as the register.
    #[allow(unsafe_code)]
    unsafe {
        _mm512_loadu_ps(x.as_ptr())
    }
}

/// A register to memory, of any alignment.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store(x: &mut [f32; LANES], value: __m512) {
    // SAFETY: the array is as long as the register.
    #[allow(unsafe_code)]
    unsafe {
        _mm512_storeu_ps(x.as_mut_ptr(), value)
    }
}

/// Pairs from memory, of any alignment.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load_pairs(x: &Pairs) -> __m512bh {
    // SAFETY: the array is as long as the register.
    #[allow(unsafe_code)]
    as_pairs(unsafe { _mm512_loadu_ps(x.as_ptr().cast()) })
}

/// Pairs to memory, of any alignment.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store_pairs(x: &mut Pairs, value: __m512bh) {
    // SAFETY: the array is as long as the register.
    #[allow(unsafe_code)]
    unsafe {
        _mm512_storeu_ps(x.as_mut_ptr().cast(), as_floats(value))
    }
}

/// The bytes of pairs to memory, of any alignment.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store_bytes(x: &mut [u8; 64], value: __m512bh) {
    // SAFETY: the array is as long as the register.
    #[allow(unsafe_code)]
    unsafe {
        _mm512_storeu_ps(x.as_mut_ptr().cast(), as_floats(value))
    }
}

/// The same bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn as_pairs(x: __m512) -> __m512bh {
    // SAFETY: every pattern of 512 bits is a register of either type.
    #[allow(unsafe_code)]
    unsafe {
        std::mem::transmute(x)
    }
}

/// The same bits.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn as_floats(x: __m512bh) -> __m512 {
    // SAFETY: every pattern of 512 bits is a register of either type.
    #[allow(unsafe_code)]
    unsafe {
        std::mem::transmute(x)
    }
}

//! Registers of AVX-512: 16 numbers, or 16 pairs of bf16.

use std::arch::x86_64::*;

/// Numbers in a register: f32, or pairs of bf16.
pub(super) const LANES: usize = 16;

/// A register's worth of pairs of bf16.
pub(super) type Pairs = [u16; 2 * LANES];

/// Rows to columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(r: [__m512; LANES]) -> [__m512; LANES] {
    // Pairs, then fours, of rows side by side, in every quarter of a register.
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

/// Numbers rounded to pairs of bf16, the low ones first.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn round(low: __m512, high: __m512) -> __m512bh {
    _mm512_cvtne2ps_pbh(high, low)
}

// SAFETY, for all that follows: a register is loaded from and stored to an array of its size, of any alignment, and
// every pattern of 512 bits is a register of each kind.

/// From memory.
#[inline]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
pub(super) fn load(x: &[f32; LANES]) -> __m512 {
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// To memory.
#[inline]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
pub(super) fn store(x: &mut [f32; LANES], value: __m512) {
    unsafe { _mm512_storeu_ps(x.as_mut_ptr(), value) }
}

/// Pairs from memory.
#[inline]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
pub(super) fn load_pairs(x: &Pairs) -> __m512bh {
    as_pairs(unsafe { _mm512_loadu_ps(x.as_ptr().cast()) })
}

/// Pairs to memory.
#[inline]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
pub(super) fn store_pairs(x: &mut Pairs, value: __m512bh) {
    unsafe { _mm512_storeu_ps(x.as_mut_ptr().cast(), as_floats(value)) }
}

/// Pairs to memory, as bytes.
#[inline]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
pub(super) fn store_bytes(x: &mut [u8; 64], value: __m512bh) {
    unsafe { _mm512_storeu_ps(x.as_mut_ptr().cast(), as_floats(value)) }
}

/// The same bits.
#[inline]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
pub(super) fn as_pairs(x: __m512) -> __m512bh {
    unsafe { std::mem::transmute(x) }
}

/// The same bits.
#[inline]
#[allow(unsafe_code)]
#[target_feature(enable = "avx512f")]
pub(super) fn as_floats(x: __m512bh) -> __m512 {
    unsafe { std::mem::transmute(x) }
}

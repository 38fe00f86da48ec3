//! Packing for [`gemm_bf16`](super::gemm_bf16): panels of activations, and rows rounded to bf16.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::avx512::{
    LANES, Pairs, as_floats, as_pairs, load, load_pairs, round, store_bytes, store_pairs, supports_bf16, transpose,
};

/// Registers of activations in a panel.
pub(crate) const WIDE: usize = 3;
/// Rows of activations in a panel.
pub(crate) const PANEL: usize = WIDE * LANES;

/// Packs up to [`PANEL`] rows `x` of `columns` into a panel: for every pair of columns, that pair
/// of all rows side by side, rounded to bf16. Missing rows are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) fn pack(panel: &mut [Pairs], x: &[f32], columns: usize) {
    let count = x.len() / columns;
    for wide in 0..WIDE {
        for (step, out) in panel.chunks_exact_mut(LANES * WIDE).enumerate() {
            let rows = std::array::from_fn(|i| match wide * LANES + i {
                row if row < count => {
                    let x = x[row * columns + step * 2 * LANES..].as_chunks::<LANES>().0;
                    as_floats(round(load(&x[0]), load(&x[1])))
                }
                _ => _mm512_setzero_ps(),
            });
            for (pair, rows) in transpose(rows).into_iter().enumerate() {
                store_pairs(&mut out[pair * WIDE + wide], as_pairs(rows));
            }
        }
    }
}

/// As [`pack`] of the transpose of x (N, columns): the columns `range`, at most [`PANEL`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) fn pack_columns(panel: &mut [Pairs], x: &[f32], columns: usize, range: Range<usize>) {
    for (pair, out) in panel.chunks_exact_mut(WIDE).enumerate() {
        for (wide, out) in out.iter_mut().enumerate() {
            let first = range.start + wide * LANES;
            let pairs =
                if first < range.end { pairs_of_rows(x, columns, 2 * pair, first) } else { _mm512_setzero_ps() };
            store_pairs(out, as_pairs(pairs));
        }
    }
}

/// `n` rounded up to whole registers of pairs.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(2 * LANES)
}

/// The numbers, rounded to bf16.
pub(crate) fn rounded(x: &[f32]) -> Vec<u8> {
    let mut out = vec![0u8; 2 * x.len()];
    out.par_chunks_mut(1 << 14).zip(x.par_chunks(1 << 13)).for_each(|(out, x)| {
        for (out, x) in out.as_chunks_mut::<2>().0.iter_mut().zip(x) {
            *out = half::bf16::from_f32(*x).to_le_bytes();
        }
    });
    out
}

/// The transpose of `x` (n, columns), rounded to bf16, its rows [`padded`] with zeros.
///
/// Panics unless the CPU multiplies bf16 and `columns` is a multiple of 16.
pub(crate) fn rounded_columns(x: &[f32], (n, columns): (usize, usize)) -> Vec<u8> {
    assert!(supports_bf16(padded(n)), "this CPU does not multiply bf16");
    assert!(columns.is_multiple_of(LANES) && x.len() == n * columns, "columns have to fill registers");
    let bytes = 2 * padded(n);
    let mut out = vec![0u8; columns * bytes];
    out.par_chunks_exact_mut(LANES * bytes).enumerate().for_each(|(block, out)| {
        // SAFETY: `supports_bf16` has checked the CPU features.
        #[allow(unsafe_code)]
        unsafe {
            transpose_columns(out, x, (n, columns), block * LANES)
        }
    });
    out
}

/// 16 columns of `x` (n, columns), from `first` on, as rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn transpose_columns(out: &mut [u8], x: &[f32], (n, columns): (usize, usize), first: usize) {
    let bytes = 2 * padded(n);
    for step in 0..padded(n) / (2 * LANES) {
        let pairs = std::array::from_fn(|pair| pairs_of_rows(x, columns, 2 * (step * LANES + pair), first));
        for (column, row) in transpose(pairs).into_iter().enumerate() {
            if let Some(out) = out[column * bytes + step * 4 * LANES..].first_chunk_mut() {
                store_bytes(out, as_pairs(row));
            }
        }
    }
}

/// 16 columns from `first` on of `row` and the row after it, interleaved; missing rows are zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs_of_rows(x: &[f32], columns: usize, row: usize, first: usize) -> __m512 {
    const INTERLEAVED: Pairs = {
        let mut order = [0; 2 * LANES];
        let mut i = 0;
        while i < 2 * LANES {
            order[i] = (i / 2 + i % 2 * LANES) as u16;
            i += 1;
        }
        order
    };
    let load_row = |row: usize| match x.get(row * columns + first..).and_then(|x| x.first_chunk()) {
        Some(x) => load(x),
        None => _mm512_setzero_ps(),
    };
    let both = _mm512_castps_si512(as_floats(round(load_row(row), load_row(row + 1))));
    let order = _mm512_castps_si512(as_floats(load_pairs(&INTERLEAVED)));
    _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))
}

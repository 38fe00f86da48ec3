//! What [`panels`](super::panels) multiplies, as it wants it: panels of inputs, and rows of bf16.

use std::arch::x86_64::*;
use std::ops::Range;

use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

use super::avx512::{LANES, Pairs, as_floats, as_pairs, load, load_pairs, round, store_bytes, store_pairs, transpose};
use super::panels::suits;

/// Registers of inputs in a panel.
pub(super) const WIDE: usize = 3;
/// Inputs in a panel.
pub(super) const PANEL: usize = WIDE * LANES;

/// The panel of up to [`PANEL`] inputs, in pairs of bf16 or in f32; what is missing counts as zero.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn lay_out<const HALF: bool>(panel: &mut [Pairs], inputs: &[f32], columns: usize) {
    let count = inputs.len() / columns;
    for wide in 0..WIDE {
        for (step, out) in panel.chunks_exact_mut(LANES * WIDE).enumerate() {
            let rows = std::array::from_fn(|i| match wide * LANES + i {
                input if input < count && HALF => {
                    let x = inputs[input * columns + step * 2 * LANES..].as_chunks::<LANES>().0;
                    as_floats(round(load(&x[0]), load(&x[1])))
                }
                input if input < count => load(&inputs[input * columns + step * LANES..].as_chunks::<LANES>().0[0]),
                _ => _mm512_setzero_ps(),
            });
            for (pair, inputs) in transpose(rows).into_iter().enumerate() {
                store_pairs(&mut out[pair * WIDE + wide], as_pairs(inputs));
            }
        }
    }
}

/// The panel of up to [`PANEL`] columns, `range` of those of `x` (N, columns); what is missing counts as zero.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn lay_out_columns(panel: &mut [Pairs], x: &[f32], columns: usize, range: Range<usize>) {
    for (pair, out) in panel.chunks_exact_mut(WIDE).enumerate() {
        for (wide, out) in out.iter_mut().enumerate() {
            let first = range.start + wide * LANES;
            let pairs =
                if first < range.end { pairs_of_rows(x, columns, 2 * pair, first) } else { _mm512_setzero_ps() };
            store_pairs(out, as_pairs(pairs));
        }
    }
}

/// The length of a column of so many numbers with zeros up to a whole register.
pub(super) fn padded(n: usize) -> usize {
    n.next_multiple_of(2 * LANES)
}

/// Numbers rounded to bf16.
pub(super) fn rounded(x: &[f32]) -> Vec<u8> {
    let mut out = vec![0u8; 2 * x.len()];
    out.par_chunks_mut(1 << 14).zip(x.par_chunks(1 << 13)).for_each(|(out, x)| {
        for (out, x) in out.as_chunks_mut::<2>().0.iter_mut().zip(x) {
            *out = half::bf16::from_f32(*x).to_le_bytes();
        }
    });
    out
}

/// The columns of `x` (n, columns) as rows of bf16, each [`padded`] with zeros.
///
/// Panics unless this processor [`suits`] and `columns` is a multiple of 16.
pub(super) fn rounded_columns(x: &[f32], (n, columns): (usize, usize)) -> Vec<u8> {
    assert!(suits(GgmlDType::BF16, padded(n)), "a product that this processor has not");
    assert!(columns.is_multiple_of(LANES) && x.len() == n * columns, "columns that do not fill registers");
    let bytes = 2 * padded(n);
    let mut out = vec![0u8; columns * bytes];
    out.par_chunks_exact_mut(LANES * bytes).enumerate().for_each(|(block, out)| {
        // SAFETY: `suits` has asked the processor for what this is compiled for.
        #[allow(unsafe_code)]
        unsafe {
            turn(out, x, (n, columns), block * LANES)
        }
    });
    out
}

/// 16 columns of `x` (n, columns), from `first` on, as rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn turn(out: &mut [u8], x: &[f32], (n, columns): (usize, usize), first: usize) {
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

/// 16 columns from `first` on of the rows `row` and the one after it, side by side; a row that is missing is zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs_of_rows(x: &[f32], columns: usize, row: usize, first: usize) -> __m512 {
    const SIDE_BY_SIDE: Pairs = {
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
    let order = _mm512_castps_si512(as_floats(load_pairs(&SIDE_BY_SIDE)));
    _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))
}

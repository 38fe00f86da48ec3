//! GEMM in f32 for any CPU with vector registers, without packing the weights.
//!
//! Activations are packed into panels of two or three registers: for every column, the numbers of
//! as many rows side by side. A weight is multiplied with all of them at once, and the sums of a
//! few rows of weights stay in registers until they are written. [`multiply`] is the micro-kernel,
//! which attention and direct convolution share.

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Result;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::columns::{Columns, by_columns};
use super::exp::sigmoid;
use super::reduce::vectorized;

/// The most rows of activations in a panel.
pub(crate) const MAX_PANEL: usize = 48;
/// Most columns: a panel of this many stays in the L2 cache.
const MAX_COLUMNS: usize = 4096;
/// Rows of weights per task, if there are enough for all threads, and if not.
const TASK: [usize; 2] = [126, 66];
/// Rows of activations that are packed at a time, to bound the memory for it.
const PACKED: usize = 20 * MAX_PANEL;
/// f32 per cache line.
const LINE: usize = 16;
/// Columns and rows that are transposed at a time.
const TRANSPOSED: usize = 8;

/// Calls `$f::<S, ROWS, WIDE>($arguments)` with the tile that fills the registers but for its
/// operands: 6 rows by 2 registers of sums where there are 16 registers, 8 by 3 where there are 32.
macro_rules! in_registers {
    ($S:ident, $f:ident($($argument:expr),*)) => {
        if $S::F32_LANES == 8 { $f::<$S, 6, 2>($($argument),*) } else { $f::<$S, 8, 3>($($argument),*) }
    };
}
pub(crate) use in_registers;

/// f32 per register, 1 without vector registers, and registers per panel.
pub(crate) fn registers() -> (usize, usize) {
    struct Registers;
    impl WithSimd for Registers {
        type Output = (usize, usize);

        fn with_simd<S: Simd>(self, _: S) -> (usize, usize) {
            const fn wide<S: Simd, const ROWS: usize, const WIDE: usize>() -> (usize, usize) {
                (S::F32_LANES, WIDE)
            }
            in_registers!(S, wide())
        }
    }
    Arch::new().dispatch(Registers)
}

/// Whether the CPU has vector registers, and [`gemm_f32`] is fast for `columns` columns.
pub(crate) fn supports(columns: usize) -> bool {
    (1..=MAX_COLUMNS).contains(&columns) && registers().0 > 1
}

/// `x wᵀ + bias` for x (M, columns) and w (rows, columns): (M, rows) in `y`. With `up`
/// (rows, columns) it is `silu(x wᵀ + bias) * (x upᵀ)`.
pub(crate) fn gemm_f32(
    y: &mut [MaybeUninit<f32>],
    w: &[f32],
    up: Option<&[f32]>,
    bias: Option<&[f32]>,
    x: &[f32],
    columns: usize,
) -> Result<()> {
    let (rows, (lanes, wide)) = (w.len() / columns, registers());
    let panel = lanes * wide;
    let task = TASK[usize::from(rows < 4 * TASK[0] * rayon::current_num_threads())];
    for (y, x) in y.chunks_mut(PACKED * rows).zip(x.chunks(PACKED * columns)) {
        let count = x.len() / columns;
        let mut panels = vec![0f32; count.next_multiple_of(panel) * columns];
        let parts = panels.par_chunks_exact_mut(panel * columns).zip(x.par_chunks(panel * columns));
        parts.for_each(|(out, x)| pack(out, x, panel, columns));
        by_columns(y, rows, task, |y| {
            let range = y.first() * columns..(y.first() + y.width()) * columns;
            let bias = bias.map(|bias| &bias[y.first()..][..y.width()]);
            let (w, up) = (&w[range.clone()], up.map(|up| &up[range]));
            Arch::new().dispatch(Block { y, w, up, bias, panels: &panels, count, columns });
            Ok(())
        })?;
    }
    Ok(())
}

/// Packs up to `width` rows of activations into a panel; columns of missing rows stay as they are.
fn pack(panel: &mut [f32], x: &[f32], width: usize, columns: usize) {
    vectorized(
        #[inline(always)]
        || {
            for (x, at) in x.chunks(TRANSPOSED * columns).zip((0..).step_by(TRANSPOSED)) {
                let whole = if x.len() == TRANSPOSED * columns { columns / TRANSPOSED * TRANSPOSED } else { 0 };
                for column in (0..whole).step_by(TRANSPOSED) {
                    let mut transposed = [[0f32; TRANSPOSED]; TRANSPOSED];
                    for (i, row) in x.chunks_exact(columns).enumerate() {
                        for j in 0..TRANSPOSED {
                            transposed[j][i] = row[column + j];
                        }
                    }
                    for (j, x) in transposed.iter().enumerate() {
                        panel[(column + j) * width + at..][..TRANSPOSED].copy_from_slice(x);
                    }
                }
                for column in whole..columns {
                    for (i, row) in x.chunks_exact(columns).enumerate() {
                        panel[column * width + at + i] = row[column];
                    }
                }
            }
        },
    );
}

/// Some rows of weights with all `count` rows of activations.
struct Block<'a, 'b> {
    y: &'a mut Columns<'b>,
    w: &'a [f32],
    up: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    panels: &'a [f32],
    count: usize,
    columns: usize,
}

impl WithSimd for Block<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        in_registers!(S, block(simd, self))
    }
}

#[inline(always)]
fn block<S: Simd, const HIGH: usize, const WIDE: usize>(simd: S, block: Block) {
    let Block { y, w, up, bias, panels, count, columns } = block;
    let (panel, rows) = (WIDE * S::F32_LANES, y.width());
    for (first, panels) in (0..count).step_by(panel).zip(panels.chunks_exact(panel * columns)) {
        let inputs = first..count.min(first + panel);
        let panel = S::as_simd_f32s(panels).0.as_chunks::<WIDE>().0;
        let mut row = 0;
        while row < rows {
            let bias = bias.map_or(&[][..], |bias| &bias[row..]);
            let up = up.map(|up| &up[row * columns..]);
            let w = &w[row * columns..];
            match rows - row {
                left if left >= HIGH => {
                    gated::<S, HIGH, WIDE>(simd, (w, up, bias), panel, y, inputs.clone(), row);
                    row += HIGH;
                }
                left if left >= 4 => {
                    gated::<S, 4, WIDE>(simd, (w, up, bias), panel, y, inputs.clone(), row);
                    row += 4;
                }
                _ => {
                    gated::<S, 1, WIDE>(simd, (w, up, bias), panel, y, inputs.clone(), row);
                    row += 1;
                }
            }
        }
    }
}

/// The outputs of `R` rows of weights from `row` on with the rows `inputs` of activations, one
/// panel.
#[inline(always)]
fn gated<S: Simd, const R: usize, const WIDE: usize>(
    simd: S,
    (w, up, bias): (&[f32], Option<&[f32]>, &[f32]),
    panel: &[[S::f32s; WIDE]],
    y: &mut Columns,
    inputs: Range<usize>,
    row: usize,
) {
    let mut out = [[0f32; MAX_PANEL]; R];
    sums(simd, (w, bias), panel, &inputs, &mut out);
    if let Some(up) = up {
        let mut times = [[0f32; MAX_PANEL]; R];
        sums(simd, (up, &[]), panel, &inputs, &mut times);
        for (out, times) in out.iter_mut().zip(&times) {
            for (x, times) in out[..WIDE * S::F32_LANES].iter_mut().zip(times) {
                *x = *x * sigmoid(*x) * times;
            }
        }
    }
    for (i, input) in inputs.enumerate() {
        let mut of_input = [0f32; R];
        for r in 0..R {
            of_input[r] = out[r][i];
        }
        y.put(input, row, &of_input);
    }
}

#[inline(always)]
fn sums<S: Simd, const R: usize, const WIDE: usize>(
    simd: S,
    weights: (&[f32], &[f32]),
    panel: &[[S::f32s; WIDE]],
    inputs: &Range<usize>,
    out: &mut [[f32; MAX_PANEL]; R],
) {
    // The first panel brings the weights into the cache for the others.
    let prefetch = inputs.start == 0;
    match inputs.len().div_ceil(S::F32_LANES) {
        1 => tile::<S, R, 1, WIDE>(simd, weights, panel, prefetch, out),
        2 if WIDE > 2 => tile::<S, R, 2, WIDE>(simd, weights, panel, prefetch, out),
        _ => tile::<S, R, WIDE, WIDE>(simd, weights, panel, prefetch, out),
    }
}

#[inline(always)]
fn tile<S: Simd, const R: usize, const W: usize, const WIDE: usize>(
    simd: S,
    weights: (&[f32], &[f32]),
    panel: &[[S::f32s; WIDE]],
    prefetch: bool,
    out: &mut [[f32; MAX_PANEL]; R],
) {
    let sums: [[S::f32s; W]; R] = multiply(simd, weights, Strides::dense(panel.len()), panel, prefetch);
    for (out, sums) in out.iter_mut().zip(&sums) {
        let out = S::as_mut_simd_f32s(&mut out[..W * S::F32_LANES]).0;
        out[..W].copy_from_slice(sums);
    }
}

/// Distances in memory between the rows of a matrix, and between the numbers of a row.
#[derive(Clone, Copy)]
pub(crate) struct Strides {
    pub(crate) row: usize,
    pub(crate) column: usize,
}

impl Strides {
    /// Of a contiguous matrix.
    #[inline(always)]
    pub(crate) fn dense(columns: usize) -> Self {
        Self { row: columns, column: 1 }
    }
}

/// The products of `R` rows of `w`, each as long as `panel`, with the first `W` registers of the
/// panel, plus the bias of each row that has one. `prefetch` loads the next R rows into the cache.
#[inline(always)]
pub(crate) fn multiply<S: Simd, const R: usize, const W: usize, const WIDE: usize>(
    simd: S,
    (w, bias): (&[f32], &[f32]),
    Strides { row, column }: Strides,
    panel: &[[S::f32s; WIDE]],
    prefetch: bool,
) -> [[S::f32s; W]; R] {
    let n = panel.len();
    assert!(n > 0 && w.len() > (R - 1) * row + (n - 1) * column, "rows of another length");
    let mut sums = [[simd.splat_f32s(0.0); W]; R];
    for (sums, bias) in sums.iter_mut().zip(bias) {
        *sums = [simd.splat_f32s(*bias); W];
    }
    for (first, columns) in (0..n).step_by(LINE).zip(panel.chunks(LINE)) {
        if prefetch {
            (R..2 * R).for_each(|r| prefetch_line(w.as_ptr().wrapping_add(r * row + first * column)));
        }
        for (k, inputs) in (first..).zip(columns) {
            let mut x = [simd.splat_f32s(0.0); W];
            x.copy_from_slice(&inputs[..W]);
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `w` holds the last of n numbers of the last of R rows, as asserted above.
                // A slice of each row would be checked at every step.
                #[allow(unsafe_code)]
                let w = simd.splat_f32s(unsafe { *w.get_unchecked(r * row + k * column) });
                for i in 0..W {
                    sums[i] = simd.mul_add_e_f32s(x[i], w, sums[i]);
                }
            }
        }
    }
    sums
}

/// Prefetches the cache line of an address, which may be out of bounds.
#[inline(always)]
fn prefetch_line(number: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint for any address.
    #[allow(unsafe_code)]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(number.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = number;
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Tensor};

    use super::super::columns::filled;
    use super::*;
    use crate::ops::swiglu;
    use crate::ops::testing::{agree, random};

    #[test]
    fn products_are_those_of_the_composition() -> Result<()> {
        for (inputs, rows, columns) in
            [(1, 1, 1), (9, 7, 32), (16, 66, 40), (17, 200, 37), (49, 131, 8), (1000, 70, 16)]
        {
            let (x, w, b) = (random((inputs, columns), 1), random((2 * rows, columns), 2), random(rows, 3));
            let (gate, up) = (w.narrow(0, 0, rows)?, w.narrow(0, rows, rows)?);
            let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
            let (xs, gates, ups, bs) = (flat(&x)?, flat(&gate)?, flat(&up)?, flat(&b)?);
            let products = |up, bias| -> Result<Tensor> {
                let y = filled(inputs * rows, |y| gemm_f32(y, &gates, up, bias, &xs, columns))?;
                Tensor::from_vec(y, (inputs, rows), x.device())
            };
            let what = format!("{inputs} x {rows} x {columns}");
            let plain = |w: &Tensor| x.matmul(&w.transpose(D::Minus1, D::Minus2)?);
            agree(&what, &products(None, None)?, &plain(&gate)?)?;
            agree(&what, &products(None, Some(&bs))?, &plain(&gate)?.broadcast_add(&b)?)?;
            agree(&what, &products(Some(&ups), None)?, &swiglu(&plain(&gate)?, &plain(&up)?)?)?;
        }
        Ok(())
    }
}

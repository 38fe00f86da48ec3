//! `x wᵀ` in f32 for many inputs, on any processor with wide registers, without packing weights.
//!
//! The inputs are laid out in panels of two or three registers: for every column the numbers of so many inputs side by side. A number
//! of a row of weights is multiplied with all of them at once, and some rows keep their sums in registers until they are
//! written.

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Result;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::activation::sigmoid;
use super::columns::{Columns, by_columns};
use super::slice;

/// The most inputs in a panel.
pub(super) const MOST: usize = 48;
/// The most columns: a panel of them stays in the second-level cache.
const DEEP: usize = 4096;
/// Rows of weights that one thread takes at a time, if there are enough for all threads, and if not.
const ROWS: [usize; 2] = [126, 66];
/// Inputs that are laid out at a time, in whole panels, to bound the memory for it.
const INPUTS: usize = 20 * MOST;
/// Numbers in a line of the cache.
const LINE: usize = 16;
/// Columns and inputs that are turned at a time.
const TURNED: usize = 8;

/// Calls `$f::<S, ROWS, WIDE>($arguments)` with as many rows, and registers of inputs, as leave room for what they are multiplied
/// with: 12 sums in 16 registers, 24 in 32.
macro_rules! in_registers {
    ($S:ident, $f:ident($($argument:expr),*)) => {
        if $S::F32_LANES == 8 { $f::<$S, 6, 2>($($argument),*) } else { $f::<$S, 8, 3>($($argument),*) }
    };
}
pub(super) use in_registers;

/// Numbers in a register, 1 where there are no wide ones, and registers in a panel.
pub(super) fn registers() -> (usize, usize) {
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

/// Whether [`products`] is for weights of so many columns.
pub(super) fn suits(columns: usize) -> bool {
    (1..=DEEP).contains(&columns) && registers().0 > 1
}

/// The products of every one of the `inputs`, `columns` long, with all rows of `w`, plus a bias per row, if any: (inputs, rows)
/// in `y`. With `up` it is `x * sigmoid(x)` of them times the products with its rows.
pub(super) fn products(
    y: &mut [MaybeUninit<f32>],
    w: &[f32],
    up: Option<&[f32]>,
    bias: Option<&[f32]>,
    inputs: &[f32],
    columns: usize,
) -> Result<()> {
    let (rows, (lanes, wide)) = (w.len() / columns, registers());
    let panel = lanes * wide;
    let at_once = ROWS[usize::from(rows < 4 * ROWS[0] * rayon::current_num_threads())];
    for (y, inputs) in y.chunks_mut(INPUTS * rows).zip(inputs.chunks(INPUTS * columns)) {
        let count = inputs.len() / columns;
        let mut panels = vec![0f32; count.next_multiple_of(panel) * columns];
        let parts = panels.par_chunks_exact_mut(panel * columns).zip(inputs.par_chunks(panel * columns));
        parts.for_each(|(out, inputs)| lay_out(out, inputs, panel, columns));
        by_columns(y, rows, at_once, |y| {
            let range = y.first() * columns..(y.first() + y.width()) * columns;
            let bias = bias.map(|bias| &bias[y.first()..][..y.width()]);
            let (w, up) = (&w[range.clone()], up.map(|up| &up[range]));
            Arch::new().dispatch(Block { y, w, up, bias, panels: &panels, count, columns });
            Ok(())
        })?;
    }
    Ok(())
}

/// The panel of up to `width` inputs; what is missing stays as it is.
fn lay_out(panel: &mut [f32], inputs: &[f32], width: usize, columns: usize) {
    slice::wide(
        #[inline(always)]
        || {
            for (inputs, at) in inputs.chunks(TURNED * columns).zip((0..).step_by(TURNED)) {
                let whole = if inputs.len() == TURNED * columns { columns / TURNED * TURNED } else { 0 };
                for column in (0..whole).step_by(TURNED) {
                    let mut turned = [[0f32; TURNED]; TURNED];
                    for (i, x) in inputs.chunks_exact(columns).enumerate() {
                        for j in 0..TURNED {
                            turned[j][i] = x[column + j];
                        }
                    }
                    for (j, x) in turned.iter().enumerate() {
                        panel[(column + j) * width + at..][..TURNED].copy_from_slice(x);
                    }
                }
                for column in whole..columns {
                    for (i, x) in inputs.chunks_exact(columns).enumerate() {
                        panel[column * width + at + i] = x[column];
                    }
                }
            }
        },
    );
}

/// Some rows of weights with all inputs.
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

/// What `R` rows from `row` on give with the `inputs` of a panel.
#[inline(always)]
fn gated<S: Simd, const R: usize, const WIDE: usize>(
    simd: S,
    (w, up, bias): (&[f32], Option<&[f32]>, &[f32]),
    panel: &[[S::f32s; WIDE]],
    y: &mut Columns,
    inputs: Range<usize>,
    row: usize,
) {
    let mut out = [[0f32; MOST]; R];
    sums(simd, (w, bias), panel, &inputs, &mut out);
    if let Some(up) = up {
        let mut times = [[0f32; MOST]; R];
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
    out: &mut [[f32; MOST]; R],
) {
    // What the first panel has read is near for the others.
    let ahead = inputs.start == 0;
    match inputs.len().div_ceil(S::F32_LANES) {
        1 => tile::<S, R, 1, WIDE>(simd, weights, panel, ahead, out),
        2 if WIDE > 2 => tile::<S, R, 2, WIDE>(simd, weights, panel, ahead, out),
        _ => tile::<S, R, WIDE, WIDE>(simd, weights, panel, ahead, out),
    }
}

#[inline(always)]
fn tile<S: Simd, const R: usize, const W: usize, const WIDE: usize>(
    simd: S,
    weights: (&[f32], &[f32]),
    panel: &[[S::f32s; WIDE]],
    ahead: bool,
    out: &mut [[f32; MOST]; R],
) {
    let sums: [[S::f32s; W]; R] = multiply(simd, weights, Strides::dense(panel.len()), panel, ahead);
    for (out, sums) in out.iter_mut().zip(&sums) {
        let out = S::as_mut_simd_f32s(&mut out[..W * S::F32_LANES]).0;
        out[..W].copy_from_slice(sums);
    }
}

/// How far the rows of a matrix, and the numbers of a row, are apart.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    pub(super) row: usize,
    pub(super) column: usize,
}

impl Strides {
    /// Those of rows without gaps.
    #[inline(always)]
    pub(super) fn dense(columns: usize) -> Self {
        Self { row: columns, column: 1 }
    }
}

/// The products of `R` rows `w`, each as long as `panel`, with what is in `W` registers of it, plus a bias for each of the rows
/// that have one. With `ahead` the rows that follow are asked for, so that they are there when their turn comes.
#[inline(always)]
pub(super) fn multiply<S: Simd, const R: usize, const W: usize, const WIDE: usize>(
    simd: S,
    (w, bias): (&[f32], &[f32]),
    Strides { row, column }: Strides,
    panel: &[[S::f32s; WIDE]],
    ahead: bool,
) -> [[S::f32s; W]; R] {
    let n = panel.len();
    assert!(n > 0 && w.len() > (R - 1) * row + (n - 1) * column, "rows of another length");
    let mut sums = [[simd.splat_f32s(0.0); W]; R];
    for (sums, bias) in sums.iter_mut().zip(bias) {
        *sums = [simd.splat_f32s(*bias); W];
    }
    for (first, inputs) in (0..n).step_by(LINE).zip(panel.chunks(LINE)) {
        if ahead {
            (R..2 * R).for_each(|r| prefetch(w.as_ptr().wrapping_add(r * row + first * column)));
        }
        for (k, inputs) in (first..).zip(inputs) {
            let mut x = [simd.splat_f32s(0.0); W];
            x.copy_from_slice(&inputs[..W]);
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `w` has the last of n numbers of the last of R rows, which was asserted above. Slices of rows would be
                // asked for their lengths at every step.
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

/// Asks for the line of the cache in which a number is, which need not be.
#[inline(always)]
fn prefetch(number: *const f32) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    // SAFETY: a hint, whatever the address.
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

    use super::super::check::{agree, random};
    use super::super::columns::filled;
    use super::super::swiglu;
    use super::*;

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
                let y = filled(inputs * rows, |y| super::products(y, &gates, up, bias, &xs, columns))?;
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

//! The same for weights in blocks of 32 bytes with a scale each, GGML's Q8_0: rows are laid out for every product, which many
//! inputs pay for. A sum over a block is of integers, and the sum of those of f32.

use std::cell::RefCell;
use std::mem::MaybeUninit;

use candle_core::Result;
use candle_core::quantized::GgmlDType;

use super::registers::Kernel;
use super::{Panels, Rounded};
use crate::ops::blocks::half;
use crate::ops::columns::by_columns;

/// Numbers in a block.
const BLOCK: usize = 32;
/// Bytes of a block: a scale (f16), and the numbers.
const BYTES: usize = 2 + BLOCK;

/// Whether this processor has a kernel for rows of such blocks.
pub(in crate::ops) fn suits(dtype: GgmlDType, columns: usize) -> bool {
    dtype == GgmlDType::Q8_0 && columns > 0 && columns.is_multiple_of(BLOCK) && Kernel::best().is_some()
}

/// The products of every one of the `inputs`, `columns` long, with all rows of `w`, plus a bias per row, if any: (inputs, rows)
/// in `y`. With `up` it is `x * sigmoid(x)` of them times the products with its rows.
///
/// Panics unless it [`suits`].
pub(in crate::ops) fn products(
    y: &mut [MaybeUninit<f32>],
    w: &[u8],
    up: Option<&[u8]>,
    bias: Option<&[f32]>,
    inputs: &[f32],
    columns: usize,
) -> Result<()> {
    thread_local!(static SCRATCH: RefCell<[Option<Panels>; 2]> = RefCell::default());
    let kernel = Kernel::best().expect("a processor with a kernel");
    let (inputs, bytes) = (Rounded::of(inputs, columns, BLOCK), columns / BLOCK * BYTES);
    by_columns(y, w.len() / bytes, kernel.rows(), |y| {
        let rows = y.first() * bytes..(y.first() + y.width()) * bytes;
        SCRATCH.with_borrow_mut(|[scratch, other]| {
            let w = lay_out(scratch, kernel, y.first(), &w[rows.clone()], bytes);
            let up = up.map(|up| lay_out(other, kernel, y.first(), &up[rows], bytes));
            kernel.products(&inputs, w, up, bias, y);
        });
        Ok(())
    })
}

/// The panel of some rows of blocks, the first of which is the `first` of a matrix, in memory that is kept.
fn lay_out<'a>(kept: &'a mut Option<Panels>, kernel: Kernel, first: usize, w: &[u8], bytes: usize) -> &'a Panels {
    let (rows, blocks) = (kernel.rows(), bytes / BYTES);
    let kept = kept.get_or_insert_with(|| Panels { kernel, first, weights: Vec::new(), scales: Vec::new(), pairs: 0 });
    (kept.kernel, kept.first, kept.pairs) = (kernel, first, blocks * BLOCK / 2);
    kept.weights.resize(rows * blocks * BLOCK, 0);
    kept.scales.resize(rows * blocks, 0.0);
    for (row, w) in w.chunks_exact(bytes).enumerate() {
        let places = kept.weights.chunks_exact_mut(rows * BLOCK).zip(kept.scales[row..].iter_mut().step_by(rows));
        for (block, (weights, scale)) in w.as_chunks::<BYTES>().0.iter().zip(places) {
            *scale = half([block[0], block[1]]);
            for (pair, to) in block[2..].as_chunks::<2>().0.iter().zip(weights[2 * row..].chunks_mut(2 * rows)) {
                (to[0], to[1]) = (pair[0] as i8, pair[1] as i8);
            }
        }
    }
    // What a smaller matrix or the last rows of one leave is another's.
    for row in w.len() / bytes..rows {
        kept.scales[row..].iter_mut().step_by(rows).for_each(|scale| *scale = 0.0);
    }
    kept
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use candle_core::Device;

    use super::super::tests::values;
    use super::*;
    use crate::ops::columns::filled;
    use crate::ops::{dequantise, quantise};

    #[test]
    fn products_lose_no_more_than_rounding_inputs() -> Result<()> {
        // A smaller matrix after a larger one: nothing of it may be left.
        for (inputs, rows, columns) in [(9, 70, 256), (40, 33, 96), (1, 1, 32), (70, 20, 1056)] {
            let [w, up] = [2, 4].map(|seed| {
                let blocks = quantise(&values((rows, columns), seed), (rows, columns), GgmlDType::Q8_0, &Device::Cpu);
                blocks.unwrap().data().unwrap().into_owned()
            });
            let (x, bias) = (values((inputs, columns), 1), values((1, rows), 3));
            let exact = |w: &[u8], i: usize| -> (f64, f64) {
                let mut numbers = vec![0.0; rows * columns];
                dequantise(w, GgmlDType::Q8_0, &mut numbers).unwrap();
                let x = &x[i / rows * columns..][..columns];
                let step = f64::from(x.iter().fold(0f32, |most, x| most.max(x.abs()))) / 32767.0;
                let pairs = || numbers[i % rows * columns..].iter().zip(x).map(|(w, x)| (f64::from(*w), f64::from(*x)));
                let off = pairs().map(|(w, x)| w.abs() * (0.5 * step + 1e-6 * x.abs())).sum::<f64>();
                (pairs().map(|(w, x)| w * x).sum(), off + 1e-5)
            };
            let products = |up, bias| filled(inputs * rows, |y| super::products(y, &w, up, bias, &x, columns));
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let (plain, gated) = (products(None, Some(&bias[..]))?, products(Some(&up[..]), None)?);
            for (i, (plain, gated)) in plain.iter().zip(&gated).enumerate() {
                let ((want, off), (times, times_off)) = (exact(&w, i), exact(&up, i));
                let bias = f64::from(bias[i % rows]);
                assert!((f64::from(*plain) - want - bias).abs() <= off, "{inputs} x {rows} x {columns}: {plain}");
                let off = 1.1 * off * (times.abs() + times_off) + silu(want).abs() * times_off + 1e-5;
                assert!((f64::from(*gated) - silu(want) * times).abs() <= off, "gated {inputs} x {rows} x {columns}");
            }
        }
        Ok(())
    }
}

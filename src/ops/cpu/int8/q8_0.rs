//! GEMM of weights in GGML's Q8_0, blocks of 32 bytes with a scale each, and int16 activations.
//! Weights are packed for every product, which pays with many rows of activations. Sums over a
//! block are of integers, and those of blocks of f32.

use std::cell::RefCell;
use std::mem::MaybeUninit;

use candle_core::Result;
use candle_core::quantized::GgmlDType;

use super::kernels::Kernel;
use super::{Activations, Panels};
use crate::ops::cpu::columns::by_columns;
use crate::ops::cpu::quants::f16_to_f32;

/// Numbers per block.
const BLOCK: usize = 32;
/// Bytes per block: a scale (f16), and the numbers.
const BYTES: usize = 2 + BLOCK;

/// Whether weights are Q8_0 and this CPU has a kernel for rows of `columns` columns.
pub(crate) fn supports(dtype: GgmlDType, columns: usize) -> bool {
    dtype == GgmlDType::Q8_0 && columns > 0 && columns.is_multiple_of(BLOCK) && Kernel::best().is_some()
}

/// `x wᵀ + bias` for x (M, columns) and blocks `w` (rows, columns): (M, rows) in `y`. With `up`,
/// blocks of the same shape, it is `silu(x wᵀ) * (x upᵀ)`.
///
/// Panics unless it is [supported](supports).
pub(crate) fn gemm_q8_0(
    y: &mut [MaybeUninit<f32>],
    w: &[u8],
    up: Option<&[u8]>,
    bias: Option<&[f32]>,
    x: &[f32],
    columns: usize,
) -> Result<()> {
    thread_local!(static SCRATCH: RefCell<[Option<Panels>; 2]> = RefCell::default());
    let kernel = Kernel::best().expect("a CPU with a kernel");
    let (x, bytes) = (Activations::round(x, columns, BLOCK), columns / BLOCK * BYTES);
    by_columns(y, w.len() / bytes, kernel.rows(), |y| {
        let rows = y.first() * bytes..(y.first() + y.width()) * bytes;
        SCRATCH.with_borrow_mut(|[scratch, other]| {
            let w = pack(scratch, kernel, y.first(), &w[rows.clone()], bytes);
            let up = up.map(|up| pack(other, kernel, y.first(), &up[rows], bytes));
            kernel.products(&x, w, up, bias, y);
        });
        Ok(())
    })
}

/// Packs some rows of blocks, from row `first` of a matrix on, into a panel that is reused.
fn pack<'a>(panel: &'a mut Option<Panels>, kernel: Kernel, first: usize, w: &[u8], bytes: usize) -> &'a Panels {
    let (rows, blocks) = (kernel.rows(), bytes / BYTES);
    let panel =
        panel.get_or_insert_with(|| Panels { kernel, first, weights: Vec::new(), scales: Vec::new(), pairs: 0 });
    (panel.kernel, panel.first, panel.pairs) = (kernel, first, blocks * BLOCK / 2);
    panel.weights.resize(rows * blocks * BLOCK, 0);
    panel.scales.resize(rows * blocks, 0.0);
    for (row, w) in w.chunks_exact(bytes).enumerate() {
        let places = panel.weights.chunks_exact_mut(rows * BLOCK).zip(panel.scales[row..].iter_mut().step_by(rows));
        for (block, (weights, scale)) in w.as_chunks::<BYTES>().0.iter().zip(places) {
            *scale = f16_to_f32([block[0], block[1]]);
            for (pair, to) in block[2..].as_chunks::<2>().0.iter().zip(weights[2 * row..].chunks_mut(2 * rows)) {
                (to[0], to[1]) = (pair[0] as i8, pair[1] as i8);
            }
        }
    }
    // Rows that are missing in a smaller matrix, or at the end of one, still hold those of another.
    for row in w.len() / bytes..rows {
        panel.scales[row..].iter_mut().step_by(rows).for_each(|scale| *scale = 0.0);
    }
    panel
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::cpu::columns::filled;
    use crate::ops::testing::random_values as values;
    use crate::ops::{dequantize, quantize};

    #[test]
    fn products_lose_no_more_than_rounding() -> Result<()> {
        // A smaller matrix after a larger one: the reused panel must not show it.
        for (inputs, rows, columns) in [(9, 70, 256), (40, 33, 96), (1, 1, 32), (70, 20, 1056)] {
            let [w, up] = [2, 4].map(|seed| {
                let blocks = quantize(&values((rows, columns), seed), (rows, columns), GgmlDType::Q8_0, &Device::Cpu);
                blocks.unwrap().data().unwrap().into_owned()
            });
            let (x, bias) = (values((inputs, columns), 1), values((1, rows), 3));
            let exact = |w: &[u8], i: usize| -> (f64, f64) {
                let mut numbers = vec![0.0; rows * columns];
                dequantize(w, GgmlDType::Q8_0, &mut numbers).unwrap();
                let x = &x[i / rows * columns..][..columns];
                let step = f64::from(x.iter().fold(0f32, |most, x| most.max(x.abs()))) / 32767.0;
                let pairs = || numbers[i % rows * columns..].iter().zip(x).map(|(w, x)| (f64::from(*w), f64::from(*x)));
                let off = pairs().map(|(w, x)| w.abs() * (0.5 * step + 1e-6 * x.abs())).sum::<f64>();
                (pairs().map(|(w, x)| w * x).sum(), off + 1e-5)
            };
            let products = |up, bias| filled(inputs * rows, |y| gemm_q8_0(y, &w, up, bias, &x, columns));
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

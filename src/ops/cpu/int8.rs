//! GEMM of int8 weights (one scale per row) and int16 activations: a quarter of f32's memory
//! traffic, and twice its multiplications per instruction.
//!
//! Every row of activations is rounded to 16-bit integers with a scale of its own. Products are
//! summed in 32 bits, where the order of additions does not matter, so that a result depends
//! neither on the other rows nor on the width of the registers. Rows of weights are packed into
//! panels, a few registers of rows side by side, and a pair of neighbouring columns of the
//! activations is multiplied with the same pair of all of them at once.

// On other architectures than x86-64 there is no kernel, and all of this is unreachable.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, unused_variables, unreachable_code))]

mod conv;
mod image;
mod kernels;

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::columns::{by_columns, filled};
pub use conv::Int8Filters;
pub use image::Window;
use kernels::Kernel;

/// The byte that encodes zero.
const ZERO: i16 = 128;
/// With more columns fewer than 11 bits would be left for an activation.
const MAX_COLUMNS: usize = 8192;
/// Rows of weights per task: whole panels of every width.
const TASK: usize = 64;
/// Rows of activations per task that rounds them.
const ROUNDING_TASK: usize = 64;

/// A matrix (rows, columns) of bytes with a scale per row: a weight is (byte - 128) * scale.
#[derive(Clone, Debug)]
pub struct Int8Matrix {
    /// Of the whole matrix; this is a range of its rows.
    bytes: Arc<Cow<'static, [u8]>>,
    scales: Arc<[f32]>,
    first: usize,
    rows: usize,
    columns: usize,
    /// The packed rows, from the first product on.
    panels: Arc<OnceLock<Panels>>,
}

/// Packed rows of weights, as many side by side as the kernel's registers hold, two columns of each
/// at a time: (panels, pairs of columns, rows, 2). Missing rows and columns are zero.
#[derive(Debug)]
struct Panels {
    kernel: Kernel,
    weights: Vec<i8>,
    /// One per row.
    scales: Vec<f32>,
    /// Pairs of columns.
    pairs: usize,
}

/// Rows of activations as integers with a scale each. Missing columns are zero.
struct Activations {
    values: Vec<i16>,
    scales: Vec<f32>,
    /// Pairs of columns.
    pairs: usize,
}

impl Int8Matrix {
    /// Whether this CPU has a kernel for rows of `columns` columns.
    pub fn supports(columns: usize) -> bool {
        (1..=MAX_COLUMNS).contains(&columns) && Kernel::best().is_some()
    }

    /// From bytes, row by row, and a scale per row.
    ///
    /// Errors: numbers of bytes and scales that do not fit the shape (rows, columns), and columns
    /// that are not [supported](Self::supports).
    pub fn new(bytes: Cow<'static, [u8]>, scales: &[f32], (rows, columns): (usize, usize)) -> Result<Self> {
        if !Self::supports(columns) {
            bail!("no kernel for rows of {columns} bytes on this CPU");
        }
        if Some(bytes.len()) != rows.checked_mul(columns) || scales.len() != rows {
            bail!("{} bytes and {} scales are not {rows} rows of {columns}", bytes.len(), scales.len());
        }
        Ok(Self { bytes: Arc::new(bytes), scales: scales.into(), first: 0, rows, columns, panels: Arc::default() })
    }

    /// (rows, columns).
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// `count` rows from `start` on, which share the memory of this matrix.
    ///
    /// Errors: rows that do not exist.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        if start.checked_add(count).is_none_or(|end| end > self.rows) {
            bail!("rows {start} to {start} + {count} of {}", self.rows);
        }
        Ok(Self { first: self.first + start, rows: count, panels: Arc::default(), ..self.clone() })
    }

    /// Appends the weights of a row to `out`.
    ///
    /// Errors: a row that does not exist.
    pub fn dequantize_row(&self, row: usize, out: &mut Vec<f32>) -> Result<()> {
        if row >= self.rows {
            bail!("row {row} of {}", self.rows);
        }
        let scale = self.scales[self.first + row];
        out.extend(self.row(row).iter().map(|&byte| f32::from(i16::from(byte) - ZERO) * scale));
        Ok(())
    }

    fn row(&self, row: usize) -> &[u8] {
        &self.bytes[(self.first + row) * self.columns..][..self.columns]
    }

    fn panels(&self) -> &Panels {
        self.panels.get_or_init(|| self.pack(Kernel::best().expect("a CPU with a kernel")))
    }

    fn pack(&self, kernel: Kernel) -> Panels {
        let (width, pairs) = (kernel.rows(), self.columns.div_ceil(2));
        let rows = self.rows.next_multiple_of(width);
        let mut weights = vec![0i8; rows * pairs * 2];
        let mut scales = vec![0f32; rows];
        scales[..self.rows].copy_from_slice(&self.scales[self.first..][..self.rows]);
        weights.par_chunks_mut(width * pairs * 2).enumerate().for_each(|(i, panel)| {
            for row in i * width..self.rows.min((i + 1) * width) {
                let places = panel[row % width * 2..].chunks_mut(width * 2);
                for (pair, to) in self.row(row).chunks(2).zip(places) {
                    for (byte, to) in pair.iter().zip(to) {
                        *to = (i16::from(*byte) - ZERO) as i8;
                    }
                }
            }
        });
        Panels { kernel, weights, scales, pairs }
    }
}

impl Activations {
    /// From x (M, columns). Panics without a kernel.
    fn round(x: &[f32], columns: usize) -> Self {
        let kernel = Kernel::best().expect("a CPU with a kernel");
        let (count, pairs) = (x.len() / columns, columns.div_ceil(2));
        let (mut values, mut scales) = (vec![0i16; count * pairs * 2], vec![0f32; count]);
        let parts = values.par_chunks_mut(ROUNDING_TASK * pairs * 2).zip(scales.par_chunks_mut(ROUNDING_TASK));
        parts.zip(x.par_chunks(ROUNDING_TASK * columns)).for_each(|((values, scales), x)| {
            let each = values.chunks_exact_mut(pairs * 2).zip(scales).zip(x.chunks_exact(columns));
            for ((values, scale), x) in each {
                let times;
                (*scale, times) = scale_of(kernel.largest(x), columns);
                kernel.round(x, times, values);
            }
        });
        Self { values, scales, pairs }
    }
}

/// The value of an integer step and its inverse: numbers up to `largest` become the largest
/// integers whose products with bytes can be summed over so many columns in 32 bits. Not finite
/// numbers give NaN.
pub(crate) fn scale_of(largest: f32, columns: usize) -> (f32, f32) {
    let most = (i32::MAX as usize / (columns * 128)).min(i16::MAX as usize) as f32;
    match largest {
        _ if !largest.is_finite() => (f32::NAN, 0.0),
        // Their inverse would be infinite.
        _ if largest < f32::MIN_POSITIVE * 65536.0 => (0.0, 0.0),
        _ => (largest / most, most / largest),
    }
}

/// `x wᵀ + bias` for x (M, columns) and each of several matrices (rows, columns): (M, rows) of
/// each.
///
/// Panics unless all have `columns` columns, which are [supported](Int8Matrix::supports).
pub(crate) fn matmul_each(
    x: &[f32],
    layers: &[(&Int8Matrix, Option<&[f32]>)],
    columns: usize,
) -> Result<Vec<Vec<f32>>> {
    let x = Activations::round(x, columns);
    layers.par_iter().map(|(w, bias)| product(&x, w, None, *bias)).collect()
}

/// `silu(x gateᵀ) * (x upᵀ)` for x (M, columns): (M, rows). Panics as [`matmul_each`].
pub(crate) fn gated_matmul(x: &[f32], gate: &Int8Matrix, up: &Int8Matrix) -> Result<Vec<f32>> {
    product(&Activations::round(x, gate.columns), gate, Some(up), None)
}

fn product(x: &Activations, w: &Int8Matrix, up: Option<&Int8Matrix>, bias: Option<&[f32]>) -> Result<Vec<f32>> {
    assert!(w.columns.div_ceil(2) == x.pairs && up.is_none_or(|up| up.shape() == w.shape()), "another shape");
    let (panels, up) = (w.panels(), up.map(Int8Matrix::panels));
    filled(x.scales.len() * w.rows, |y| {
        by_columns(y, w.rows, TASK, |y| {
            panels.kernel.products(x, panels, up, bias, y);
            Ok(())
        })
    })
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::ops::testing::random_values as values;

    pub(super) fn bytes((rows, columns): (usize, usize), seed: u64) -> (Vec<u8>, Vec<f32>) {
        let bytes = values((rows, columns), seed).into_iter().map(|x| (x * 60.0).clamp(-128.0, 127.0) as i16 + ZERO);
        (bytes.map(|byte| byte as u8).collect(), (0..rows).map(|row| 0.001 * (1 + row % 7) as f32).collect())
    }

    fn matrix(shape: (usize, usize), seed: u64) -> Int8Matrix {
        let (bytes, scales) = bytes(shape, seed);
        Int8Matrix::new(bytes.into(), &scales, shape).unwrap()
    }

    /// The same matrix, packed for a kernel.
    fn packed_for(w: &Int8Matrix, kernel: Kernel) -> Int8Matrix {
        Int8Matrix { panels: Arc::new(OnceLock::from(w.pack(kernel))), ..w.clone() }
    }

    /// Products with the weights in f64, and the largest error that rounding the activations
    /// explains.
    fn exact(inputs: &[f32], w: &Int8Matrix) -> Vec<(f64, f64)> {
        let mut out = Vec::new();
        for x in inputs.chunks_exact(w.columns) {
            let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            let step = f64::from(largest) / (i32::MAX as f64 / (w.columns as f64 * 128.0)).floor().min(32767.0);
            for row in 0..w.rows {
                let mut numbers = Vec::new();
                w.dequantize_row(row, &mut numbers).unwrap();
                let pairs = || numbers.iter().zip(x).map(|(w, x)| (f64::from(*w), f64::from(*x)));
                let size: f64 = pairs().map(|(w, x)| w.abs() * (0.5 * step + 1e-6 * x.abs())).sum();
                out.push((pairs().map(|(w, x)| w * x).sum(), size));
            }
        }
        out
    }

    #[test]
    fn products_lose_no_more_than_rounding() -> Result<()> {
        for (inputs, rows, columns) in [(1, 1, 1), (2, 33, 7), (5, 16, 256), (6, 64, 768), (13, 100, 95), (64, 200, 33)]
        {
            let (x, w, up) = (values((inputs, columns), 1), matrix((rows, columns), 2), matrix((rows, columns), 4));
            let bias = values((1, rows), 3);
            let near = |got: &[f32], want: &dyn Fn(usize) -> (f64, f64)| {
                for (i, got) in got.iter().enumerate() {
                    let (want, most) = want(i);
                    assert!((f64::from(*got) - want).abs() <= most, "{inputs} x {rows} x {columns}: {got}, not {want}");
                }
            };
            let (gates, ups) = (exact(&x, &w), exact(&x, &up));
            let silu = |x: f64| x / (1.0 + (-x).exp());
            for kernel in Kernel::all() {
                let (w, up) = (packed_for(&w, kernel), packed_for(&up, kernel));
                let [plain, biased] =
                    <[_; 2]>::try_from(matmul_each(&x, &[(&w, None), (&w, Some(&bias))], columns)?).unwrap();
                near(&plain, &|i| gates[i]);
                near(&biased, &|i| (gates[i].0 + f64::from(bias[i % rows]), gates[i].1 + 1e-5));
                near(&gated_matmul(&x, &w, &up)?, &|i| {
                    let ((gate, off), (up, up_off)) = (gates[i], ups[i]);
                    (silu(gate) * up, 1.1 * off * (up.abs() + up_off) + silu(gate).abs() * up_off + 1e-5)
                });
            }
        }
        Ok(())
    }

    /// Beside any other rows, and with registers of any width.
    #[test]
    fn a_row_always_gives_the_same_bits() -> Result<()> {
        let (x, w) = (values((29, 300), 1), matrix((70, 300), 2));
        let mut all = Vec::new();
        for kernel in Kernel::all() {
            let w = packed_for(&w, kernel);
            let together = matmul_each(&x, &[(&w, None)], 300)?.remove(0);
            for (x, want) in x.chunks_exact(300).zip(together.chunks_exact(70)) {
                assert_eq!(matmul_each(x, &[(&w, None)], 300)?[0], want);
            }
            let part = w.narrow(3, 60)?.narrow(30, 30)?;
            let of_part = matmul_each(&x, &[(&part, None)], 300)?.remove(0);
            assert!(of_part.chunks_exact(30).zip(together.chunks_exact(70)).all(|(part, all)| part == &all[33..63]));
            all.push(together);
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        Ok(())
    }

    #[test]
    fn non_finite_rows_give_nan_and_zeros_are_exact() -> Result<()> {
        let w = matrix((20, 40), 2);
        let mut x = values((3, 40), 1);
        (x[7], x[45]) = (f32::NAN, f32::NEG_INFINITY);
        x[80..].fill(0.0);
        if Kernel::best().is_some() {
            let y = matmul_each(&x, &[(&w, None)], 40)?.remove(0);
            assert!(y[..40].iter().all(|y| y.is_nan()) && y[40..].iter().all(|y| *y == 0.0));
        }
        Ok(())
    }

    /// The largest values in the most columns.
    #[test]
    fn no_sum_overflows() -> Result<()> {
        for columns in [1, 2, 255, 514, 1000, MAX_COLUMNS].into_iter().filter(|columns| Int8Matrix::supports(*columns))
        {
            for (byte, kernel) in Kernel::all().into_iter().flat_map(|kernel| [(0u8, kernel), (255, kernel)]) {
                let w = packed_for(&Int8Matrix::new(vec![byte; columns].into(), &[1.0], (1, columns))?, kernel);
                let y = matmul_each(&vec![-1.0; columns], &[(&w, None)], columns)?.remove(0);
                let want = -(f32::from(byte) - 128.0) * columns as f32;
                assert!((y[0] / want - 1.0).abs() < 1e-6, "{columns} times {byte}: {}", y[0]);
            }
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        assert!(Int8Matrix::new(vec![0; 5].into(), &[1.0; 2], (2, 3)).is_err());
        assert!(Int8Matrix::new(vec![0; 6].into(), &[1.0; 3], (2, 3)).is_err());
        let w = matrix((2, 3), 1);
        assert!(
            w.narrow(1, 2).is_err()
                && w.narrow(usize::MAX, 2).is_err()
                && w.dequantize_row(2, &mut Vec::new()).is_err()
        );
        assert!(!Int8Matrix::supports(0) && !Int8Matrix::supports(MAX_COLUMNS + 1));
    }
}

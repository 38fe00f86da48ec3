//! `x wᵀ` for weights that are bytes with a scale per row, in integers: a quarter to read, and more products at a time than of f32.
//!
//! An input is rounded to 16-bit integers with a scale of its own. Products of bytes with them are summed in 32 bits, in which
//! any order gives the same sum, so that a result depends neither on the other inputs nor on the width of registers. Rows of
//! weights are laid out in panels, a few registers of them side by side, and a pair of neighbouring columns of an input is
//! multiplied with the same pair of all of them at once.

// Without a kernel nothing of this can be reached.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, unused_variables, unreachable_code))]

mod blocks;
mod convolve;
mod registers;

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::columns::{by_columns, filled};
pub(super) use blocks::{products as products_of_blocks, suits as suits_blocks};
pub use convolve::{ByteFilters, Reading};
use registers::Kernel;

/// The byte that stands for zero.
const ZERO: i16 = 128;
/// More columns would leave less than 11 bits of an input.
const DEEP: usize = 8192;
/// Rows of weights that one thread takes at a time: whole panels of every width.
const ROWS: usize = 64;
/// Inputs that one thread rounds at a time.
const INPUTS: usize = 64;

/// A matrix (rows, columns) of bytes with a scale per row: a number is (byte - 128) * scale.
#[derive(Clone, Debug)]
pub struct Bytes {
    /// Of a larger matrix, in whose rows these are.
    bytes: Arc<Cow<'static, [u8]>>,
    scales: Arc<[f32]>,
    first: usize,
    rows: usize,
    columns: usize,
    /// The rows as the kernel wants them, from the first product on.
    panels: Arc<OnceLock<Panels>>,
}

/// Rows of weights, as many side by side as the kernel's registers hold, two columns of each at a time: (panels, pairs of
/// columns, rows, 2). Missing rows and columns are zero.
#[derive(Debug)]
struct Panels {
    kernel: Kernel,
    /// Of a larger matrix.
    first: usize,
    weights: Vec<i8>,
    /// Of every group of columns, (panels, groups, rows).
    scales: Vec<f32>,
    /// Pairs of columns.
    pairs: usize,
}

/// Inputs, `columns` long, as integers with a scale each; a missing column is zero.
struct Rounded {
    values: Vec<i16>,
    scales: Vec<f32>,
    /// Pairs of columns.
    pairs: usize,
}

impl Bytes {
    /// Whether this processor has a kernel for rows of so many columns.
    pub fn suits(columns: usize) -> bool {
        (1..=DEEP).contains(&columns) && Kernel::best().is_some()
    }

    /// Errors when the numbers of bytes and scales are not those of the shape (rows, columns), or it does not
    /// [suit](Self::suits).
    pub fn new(bytes: Cow<'static, [u8]>, scales: &[f32], (rows, columns): (usize, usize)) -> Result<Self> {
        if !Self::suits(columns) {
            bail!("no kernel for rows of {columns} bytes on this processor");
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

    /// `count` rows from `start` on, sharing their memory.
    ///
    /// Errors when they are not there.
    pub fn narrow(&self, start: usize, count: usize) -> Result<Self> {
        if start.checked_add(count).is_none_or(|end| end > self.rows) {
            bail!("rows {start} to {start} + {count} of {}", self.rows);
        }
        Ok(Self { first: self.first + start, rows: count, panels: Arc::default(), ..self.clone() })
    }

    /// Adds the numbers of a row to the end of `out`.
    ///
    /// Errors when it is not there.
    pub fn read(&self, row: usize, out: &mut Vec<f32>) -> Result<()> {
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
        self.panels.get_or_init(|| self.lay_out(Kernel::best().expect("a processor with a kernel")))
    }

    fn lay_out(&self, kernel: Kernel) -> Panels {
        let (rows, pairs) = (self.rows.next_multiple_of(kernel.rows()), self.columns.div_ceil(2));
        let mut weights = vec![0i8; rows * pairs * 2];
        let mut scales = vec![0f32; rows];
        scales[..self.rows].copy_from_slice(&self.scales[self.first..][..self.rows]);
        for row in 0..self.rows {
            let panel = &mut weights[row / kernel.rows() * kernel.rows() * pairs * 2..];
            let places = panel[row % kernel.rows() * 2..].chunks_mut(kernel.rows() * 2);
            for (pair, to) in self.row(row).chunks(2).zip(places) {
                for (byte, to) in pair.iter().zip(to) {
                    *to = (i16::from(*byte) - ZERO) as i8;
                }
            }
        }
        Panels { kernel, first: 0, weights, scales, pairs }
    }
}

impl Rounded {
    /// For sums over so many columns `at_once`. Panics where there is no kernel.
    fn of(inputs: &[f32], columns: usize, at_once: usize) -> Self {
        let kernel = Kernel::best().expect("a processor with a kernel");
        let (count, pairs) = (inputs.len() / columns, columns.div_ceil(2));
        let (mut values, mut scales) = (vec![0i16; count * pairs * 2], vec![0f32; count]);
        let parts = values.par_chunks_mut(INPUTS * pairs * 2).zip(scales.par_chunks_mut(INPUTS));
        parts.zip(inputs.par_chunks(INPUTS * columns)).for_each(|((values, scales), inputs)| {
            let each = values.chunks_exact_mut(pairs * 2).zip(scales).zip(inputs.chunks_exact(columns));
            for ((values, scale), x) in each {
                let times;
                (*scale, times) = steps(kernel.largest(x), at_once);
                kernel.round(x, times, values);
            }
        });
        Self { values, scales, pairs }
    }
}

/// What an integer stands for, so that numbers up to `largest` give the largest integers whose products with bytes can be summed
/// over so many columns, and its inverse. A sum with what is not finite is NaN.
fn steps(largest: f32, columns: usize) -> (f32, f32) {
    let most = (i32::MAX as usize / (columns * 128)).min(i16::MAX as usize) as f32;
    match largest {
        _ if !largest.is_finite() => (f32::NAN, 0.0),
        // The inverse would be infinite.
        _ if largest < f32::MIN_POSITIVE * 65536.0 => (0.0, 0.0),
        _ => (largest / most, most / largest),
    }
}

/// The products of some inputs with several matrices, each with a bias per row or none: (inputs, rows) for every one.
///
/// Panics unless all are `columns` wide, and [`suits`](Bytes::suits) says so.
pub(super) fn products(inputs: &[f32], layers: &[(&Bytes, Option<&[f32]>)], columns: usize) -> Result<Vec<Vec<f32>>> {
    let inputs = Rounded::of(inputs, columns, columns);
    layers.par_iter().map(|(w, bias)| product(&inputs, w, None, *bias)).collect()
}

/// `x * sigmoid(x)` of the products with `gate`, times those with `up`: (inputs, rows). Panics as [`products`].
pub(super) fn gated(inputs: &[f32], gate: &Bytes, up: &Bytes) -> Result<Vec<f32>> {
    product(&Rounded::of(inputs, gate.columns, gate.columns), gate, Some(up), None)
}

fn product(inputs: &Rounded, w: &Bytes, up: Option<&Bytes>, bias: Option<&[f32]>) -> Result<Vec<f32>> {
    assert!(w.columns.div_ceil(2) == inputs.pairs && up.is_none_or(|up| up.shape() == w.shape()), "another shape");
    let (panels, up) = (w.panels(), up.map(Bytes::panels));
    filled(inputs.scales.len() * w.rows, |y| {
        by_columns(y, w.rows, ROWS, |y| {
            panels.kernel.products(inputs, panels, up, bias, y);
            Ok(())
        })
    })
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::check::random;
    use super::*;

    pub(super) fn values(shape: (usize, usize), seed: u64) -> Vec<f32> {
        random(shape, seed).flatten_all().unwrap().to_vec1().unwrap()
    }

    pub(super) fn bytes((rows, columns): (usize, usize), seed: u64) -> (Vec<u8>, Vec<f32>) {
        let bytes = values((rows, columns), seed).into_iter().map(|x| (x * 60.0).clamp(-128.0, 127.0) as i16 + ZERO);
        (bytes.map(|byte| byte as u8).collect(), (0..rows).map(|row| 0.001 * (1 + row % 7) as f32).collect())
    }

    fn matrix(shape: (usize, usize), seed: u64) -> Bytes {
        let (bytes, scales) = bytes(shape, seed);
        Bytes::new(bytes.into(), &scales, shape).unwrap()
    }

    /// The same for a kernel.
    fn of(w: &Bytes, kernel: Kernel) -> Bytes {
        Bytes { panels: Arc::new(OnceLock::from(w.lay_out(kernel))), ..w.clone() }
    }

    /// Products with the numbers that the bytes stand for, and the most that rounding the inputs can change.
    fn exact(inputs: &[f32], w: &Bytes) -> Vec<(f64, f64)> {
        let mut out = Vec::new();
        for x in inputs.chunks_exact(w.columns) {
            let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            let step = f64::from(largest) / (i32::MAX as f64 / (w.columns as f64 * 128.0)).floor().min(32767.0);
            for row in 0..w.rows {
                let mut numbers = Vec::new();
                w.read(row, &mut numbers).unwrap();
                let pairs = || numbers.iter().zip(x).map(|(w, x)| (f64::from(*w), f64::from(*x)));
                let size: f64 = pairs().map(|(w, x)| w.abs() * (0.5 * step + 1e-6 * x.abs())).sum();
                out.push((pairs().map(|(w, x)| w * x).sum(), size));
            }
        }
        out
    }

    #[test]
    fn products_lose_no_more_than_rounding_inputs() -> Result<()> {
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
                let (w, up) = (of(&w, kernel), of(&up, kernel));
                let [plain, biased] =
                    <[_; 2]>::try_from(products(&x, &[(&w, None), (&w, Some(&bias))], columns)?).unwrap();
                near(&plain, &|i| gates[i]);
                near(&biased, &|i| (gates[i].0 + f64::from(bias[i % rows]), gates[i].1 + 1e-5));
                near(&gated(&x, &w, &up)?, &|i| {
                    let ((gate, off), (up, up_off)) = (gates[i], ups[i]);
                    (silu(gate) * up, 1.1 * off * (up.abs() + up_off) + silu(gate).abs() * up_off + 1e-5)
                });
            }
        }
        Ok(())
    }

    /// Whatever is computed beside it, and however wide the registers are.
    #[test]
    fn an_input_always_gives_the_same_bits() -> Result<()> {
        let (x, w) = (values((29, 300), 1), matrix((70, 300), 2));
        let mut all = Vec::new();
        for kernel in Kernel::all() {
            let w = of(&w, kernel);
            let together = products(&x, &[(&w, None)], 300)?.remove(0);
            for (x, want) in x.chunks_exact(300).zip(together.chunks_exact(70)) {
                assert_eq!(products(x, &[(&w, None)], 300)?[0], want);
            }
            let part = w.narrow(3, 60)?.narrow(30, 30)?;
            let of_part = products(&x, &[(&part, None)], 300)?.remove(0);
            assert!(of_part.chunks_exact(30).zip(together.chunks_exact(70)).all(|(part, all)| part == &all[33..63]));
            all.push(together);
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        Ok(())
    }

    #[test]
    fn what_is_not_finite_stays_so_and_zeros_are_exact() -> Result<()> {
        let w = matrix((20, 40), 2);
        let mut x = values((3, 40), 1);
        (x[7], x[45]) = (f32::NAN, f32::NEG_INFINITY);
        x[80..].fill(0.0);
        if Kernel::best().is_some() {
            let y = products(&x, &[(&w, None)], 40)?.remove(0);
            assert!(y[..40].iter().all(|y| y.is_nan()) && y[40..].iter().all(|y| *y == 0.0));
        }
        Ok(())
    }

    /// The largest numbers of the most columns.
    #[test]
    fn no_sum_overflows() -> Result<()> {
        for columns in [1, 2, 255, 514, 1000, DEEP].into_iter().filter(|columns| Bytes::suits(*columns)) {
            for (byte, kernel) in Kernel::all().into_iter().flat_map(|kernel| [(0u8, kernel), (255, kernel)]) {
                let w = of(&Bytes::new(vec![byte; columns].into(), &[1.0], (1, columns))?, kernel);
                let y = products(&vec![-1.0; columns], &[(&w, None)], columns)?.remove(0);
                let want = -(f32::from(byte) - 128.0) * columns as f32;
                assert!((y[0] / want - 1.0).abs() < 1e-6, "{columns} times {byte}: {}", y[0]);
            }
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(Bytes::new(vec![0; 5].into(), &[1.0; 2], (2, 3)).is_err());
        assert!(Bytes::new(vec![0; 6].into(), &[1.0; 3], (2, 3)).is_err());
        let w = matrix((2, 3), 1);
        assert!(w.narrow(1, 2).is_err() && w.narrow(usize::MAX, 2).is_err() && w.read(2, &mut Vec::new()).is_err());
        assert!(!Bytes::suits(0) && !Bytes::suits(DEEP + 1));
    }
}

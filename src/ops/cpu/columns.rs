//! Output matrices whose columns are partitioned among threads.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Result;
use rayon::prelude::*;

/// Some columns of a row-major matrix, for one thread to write.
pub(crate) struct Columns<'a> {
    /// The first element of the whole matrix.
    data: *mut f32,
    height: usize,
    stride: usize,
    columns: Range<usize>,
    /// Values written so far.
    written: usize,
    matrix: PhantomData<&'a mut [MaybeUninit<f32>]>,
}

impl Columns<'_> {
    /// Index of the first column.
    pub(crate) fn first(&self) -> usize {
        self.columns.start
    }

    /// Number of columns.
    pub(crate) fn width(&self) -> usize {
        self.columns.len()
    }

    /// Writes `values` in a row, from the `at`-th of these columns on; every value once. Panics if
    /// they do not fit.
    #[inline(always)]
    pub(crate) fn put(&mut self, row: usize, at: usize, values: &[f32]) {
        assert!(row < self.height && at + values.len() <= self.columns.len(), "values outside of the columns");
        // SAFETY: the row and the columns are within the matrix, which `by_columns` borrows
        // mutably, and no other thread has these columns.
        #[allow(unsafe_code)]
        unsafe {
            let to = self.data.add(row * self.stride + self.columns.start + at);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        }
        self.written += values.len();
    }

    /// Writes all values from their transpose, (columns, rows), plus a bias per column of the
    /// matrix.
    pub(crate) fn put_transposed(&mut self, values: &[f32], bias: Option<&[f32]>) {
        /// Columns that are transposed at a time.
        const BLOCK: usize = 16;
        let height = self.height;
        let bias = bias.map(|bias| &bias[self.columns.clone()]);
        for column in (0..self.width()).step_by(BLOCK) {
            let block = BLOCK.min(self.width() - column);
            for row in 0..height {
                let mut out = [0f32; BLOCK];
                for (i, out) in out[..block].iter_mut().enumerate() {
                    *out = values[(column + i) * height + row] + bias.map_or(0.0, |bias| bias[column + i]);
                }
                self.put(row, column, &out[..block]);
            }
        }
    }
}

/// The first element, shared by all threads.
struct First(*mut f32);
// SAFETY: every thread writes to its own columns only.
#[allow(unsafe_code)]
unsafe impl Sync for First {}

impl First {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Fills `matrix`, whose rows have `stride` columns, `width` columns per task. `fill` writes every
/// value of its columns once, so the matrix need not be initialised.
///
/// Errors: one of `fill`. Panics if `fill` writes too few or too many values.
pub(crate) fn by_columns(
    matrix: &mut [MaybeUninit<f32>],
    stride: usize,
    width: usize,
    fill: impl Fn(&mut Columns) -> Result<()> + Sync,
) -> Result<()> {
    let height = matrix.len() / stride.max(1);
    let first = First(matrix.as_mut_ptr().cast());
    (0..stride.div_ceil(width)).into_par_iter().try_for_each(|i| {
        let columns = i * width..stride.min((i + 1) * width);
        let all = height * columns.len();
        let mut columns = Columns { data: first.get(), height, stride, columns, written: 0, matrix: PhantomData };
        fill(&mut columns)?;
        assert_eq!(columns.written, all, "values written to the columns");
        Ok(())
    })
}

/// A matrix of `count` values, all of which `fill` initialises unless it fails.
pub(crate) fn filled(count: usize, fill: impl FnOnce(&mut [MaybeUninit<f32>]) -> Result<()>) -> Result<Vec<f32>> {
    let mut matrix = Vec::with_capacity(count);
    fill(&mut matrix.spare_capacity_mut()[..count])?;
    // SAFETY: the capacity is at least `count`, and `fill`, which for all callers is `by_columns`
    // of every part, has written every value.
    #[allow(unsafe_code)]
    unsafe {
        matrix.set_len(count);
    }
    Ok(matrix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_is_filled() -> Result<()> {
        let (height, stride) = (5, 37);
        let want: Vec<f32> = (0..height * stride).map(|i| (i % stride * 100 + i / stride) as f32).collect();
        for width in [1, 7, 16, 20, 40] {
            let fill = |columns: &mut Columns| {
                let first = columns.first();
                let value = |i: usize| ((first + i / height) * 100 + i % height) as f32 - 3.0;
                let values: Vec<f32> = (0..columns.width() * height).map(value).collect();
                columns.put_transposed(&values, Some(&[3.0; 37]));
                Ok(())
            };
            let matrix = filled(height * stride, |matrix| by_columns(matrix, stride, width, fill))?;
            assert_eq!(matrix, want);
        }
        Ok(())
    }

    #[test]
    #[should_panic(expected = "outside of the columns")]
    fn no_more_than_the_columns() {
        let _ = by_columns(&mut [MaybeUninit::uninit(); 8], 4, 2, |columns| {
            columns.put(0, 1, &[1.0, 2.0]);
            Ok(())
        });
    }

    #[test]
    #[should_panic(expected = "values written")]
    fn no_less_than_the_columns() {
        let _ = filled(8, |matrix| {
            by_columns(matrix, 4, 2, |columns| {
                columns.put(0, 0, &[1.0, 2.0]);
                Ok(())
            })
        });
    }
}

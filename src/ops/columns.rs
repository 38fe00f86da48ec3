//! A matrix that threads fill by columns.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::Result;
use rayon::prelude::*;

/// Some columns of a row-major matrix, for one thread to fill.
pub(super) struct Columns<'a> {
    /// The first element of the whole matrix.
    data: *mut f32,
    height: usize,
    stride: usize,
    columns: Range<usize>,
    /// How many values were put.
    put: usize,
    matrix: PhantomData<&'a mut [MaybeUninit<f32>]>,
}

impl Columns<'_> {
    /// The first of them.
    pub(super) fn first(&self) -> usize {
        self.columns.start
    }

    /// Their number.
    pub(super) fn width(&self) -> usize {
        self.columns.len()
    }

    /// Sets `values` in a row, from the `at`-th of these columns on, once. Panics if there is no room.
    #[inline(always)]
    pub(super) fn put(&mut self, row: usize, at: usize, values: &[f32]) {
        assert!(row < self.height && at + values.len() <= self.columns.len(), "values out of their columns");
        // SAFETY: the row and the columns are inside of the matrix, which `by_columns` holds mutably, and no other
        // thread has these columns.
        #[allow(unsafe_code)]
        unsafe {
            let to = self.data.add(row * self.stride + self.columns.start + at);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        }
        self.put += values.len();
    }

    /// Sets all from their transpose, (columns, rows), plus one number a column.
    pub(super) fn put_transposed(&mut self, values: &[f32], bias: Option<&[f32]>) {
        /// Columns whose values are gathered before they are written, and the rows of which they are.
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

/// The first element, to be shared.
struct First(*mut f32);
// SAFETY: who has it writes to columns of its own only.
#[allow(unsafe_code)]
unsafe impl Sync for First {}

impl First {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Fills `matrix`, with rows of `stride`, by `width` columns at a time on all threads. `fill` puts every value of its
/// columns once; what was there before is not read, so that nobody has to write zeros first.
///
/// Errors: the first one of `fill`. Panics if it puts too few values or too many.
pub(super) fn by_columns(
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
        let mut columns = Columns { data: first.get(), height, stride, columns, put: 0, matrix: PhantomData };
        fill(&mut columns)?;
        assert_eq!(columns.put, all, "values of columns");
        Ok(())
    })
}

/// A matrix of `count` values that `fill` fills, all of them, unless it fails.
pub(super) fn filled(count: usize, fill: impl FnOnce(&mut [MaybeUninit<f32>]) -> Result<()>) -> Result<Vec<f32>> {
    let mut matrix = Vec::with_capacity(count);
    fill(&mut matrix.spare_capacity_mut()[..count])?;
    // SAFETY: there is room, and `fill`, which is `by_columns` of every part for all callers, has set every value.
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
    #[should_panic(expected = "out of their columns")]
    fn no_more_than_the_columns() {
        let _ = by_columns(&mut [MaybeUninit::uninit(); 8], 4, 2, |columns| {
            columns.put(0, 1, &[1.0, 2.0]);
            Ok(())
        });
    }

    #[test]
    #[should_panic(expected = "values of columns")]
    fn no_less_than_the_columns() {
        let _ = filled(8, |matrix| {
            by_columns(matrix, 4, 2, |columns| {
                columns.put(0, 0, &[1.0, 2.0]);
                Ok(())
            })
        });
    }
}

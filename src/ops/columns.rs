//! A matrix that threads fill by columns.

use std::marker::PhantomData;
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
    matrix: PhantomData<&'a mut [f32]>,
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

    /// Sets `values` in a row, from the `at`-th of these columns on. Panics if there is no room.
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

/// Fills `matrix`, with rows of `stride`, by `width` columns at a time on all threads.
///
/// Errors: the first one of `fill`.
pub(super) fn by_columns(
    matrix: &mut [f32],
    stride: usize,
    width: usize,
    fill: impl Fn(&mut Columns) -> Result<()> + Sync,
) -> Result<()> {
    let height = matrix.len() / stride.max(1);
    let first = First(matrix.as_mut_ptr());
    (0..stride.div_ceil(width)).into_par_iter().try_for_each(|i| {
        let columns = i * width..stride.min((i + 1) * width);
        fill(&mut Columns { data: first.get(), height, stride, columns, matrix: PhantomData })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_is_filled() -> Result<()> {
        let (height, stride) = (5, 37);
        let want: Vec<f32> = (0..height * stride).map(|i| (i % stride * 100 + i / stride) as f32).collect();
        for width in [1, 7, 16, 20, 40] {
            let mut matrix = vec![0.0; height * stride];
            by_columns(&mut matrix, stride, width, |columns| {
                let first = columns.first();
                let value = |i: usize| ((first + i / height) * 100 + i % height) as f32 - 3.0;
                let values: Vec<f32> = (0..columns.width() * height).map(value).collect();
                columns.put_transposed(&values, Some(&[3.0; 37]));
                Ok(())
            })?;
            assert_eq!(matrix, want);
        }
        Ok(())
    }

    #[test]
    #[should_panic(expected = "out of their columns")]
    fn no_more_than_the_columns() {
        let _ = by_columns(&mut [0.0; 8], 4, 2, |columns| {
            columns.put(0, 1, &[1.0, 2.0]);
            Ok(())
        });
    }
}

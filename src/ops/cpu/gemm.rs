//! The crate `gemm` on slices with strides: matrix products of any shape.

use gemm::Parallelism;

/// A matrix to read: element (r, c) lies at `r * row_stride + c * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major and contiguous.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row-major with rows `row_stride` apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// A row-major matrix to write, with rows `row_stride` apart.
pub(crate) struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// Row-major and contiguous.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row-major with rows `row_stride` apart.
    pub(crate) fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride }
    }
}

/// What happens to the old elements of the destination.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Update {
    Overwrite,
    Add,
}

/// Products with fewer multiplications than this are not worth waking the other threads.
const PARALLEL: usize = 1 << 18;

/// `dst = scale * lhs * rhs`, or `dst +=` that.
pub(crate) fn gemm(dst: MatrixMut, update: Update, lhs: Matrix, rhs: Matrix, scale: f32, parallel: bool) {
    debug_assert_eq!((dst.rows, dst.cols), (lhs.rows, rhs.cols), "shape of a product");
    debug_assert!(dst.row_stride >= dst.cols, "rows of a product overlap");
    // Slicing checks the bounds once per product, which costs nothing beside it.
    let out = &mut dst.data[..extent(dst.rows, dst.cols, dst.row_stride, 1)];
    // SAFETY: the slice holds every element of the destination, is borrowed mutably and so overlaps
    // neither operand, and its rows do not overlap.
    #[allow(unsafe_code)]
    unsafe {
        multiply(out.as_mut_ptr(), dst.row_stride, update, lhs, rhs, scale, parallel);
    }
}

/// `lhs * rhs`, in memory that need not be zeroed first, on all threads.
pub(crate) fn product(lhs: Matrix, rhs: Matrix) -> Vec<f32> {
    let count = lhs.rows * rhs.cols;
    let mut out = Vec::with_capacity(count);
    // SAFETY: the capacity is that of the product, contiguous, and overwriting fills all of it.
    #[allow(unsafe_code)]
    unsafe {
        multiply(out.as_mut_ptr(), rhs.cols, Update::Overwrite, lhs, rhs, 1.0, true);
        out.set_len(count);
    }
    out
}

/// Elements from the first to the last of a matrix in memory.
fn extent(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    match (rows, cols) {
        (0, _) | (_, 0) => 0,
        _ => (rows - 1) * row_stride + (cols - 1) * col_stride + 1,
    }
}

/// [`gemm`] to memory that may be uninitialised where it is overwritten.
///
/// # Safety
///
/// `out` is valid for the product, with rows `stride` apart, and overlaps neither operand.
#[allow(unsafe_code)]
unsafe fn multiply(out: *mut f32, stride: usize, update: Update, lhs: Matrix, rhs: Matrix, scale: f32, parallel: bool) {
    assert_eq!(lhs.cols, rhs.rows, "shapes of a product");
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    let a = &lhs.data[..extent(m, k, lhs.row_stride, lhs.col_stride)];
    let b = &rhs.data[..extent(k, n, rhs.row_stride, rhs.col_stride)];
    let parallelism = match parallel && m * n * k > PARALLEL {
        true => Parallelism::Rayon(rayon::current_num_threads()),
        false => Parallelism::None,
    };
    let (add, old) = match update {
        Update::Add => (true, 1.0),
        Update::Overwrite => (false, 0.0),
    };
    // SAFETY: the two slices above hold every element that these shapes and strides address, and
    // the caller vouches for the destination.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            add,
            a.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            b.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            old,
            scale,
            false,
            false,
            false,
            parallelism,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gemm_reads_strides_and_transposes() {
        let a = [1., 2., 9., 3., 4., 9.];
        let b = [1., 0., 2., 1.];
        let mut out = [10., 10., 7., 10., 10., 7.];
        let (lhs, rhs) = (Matrix::strided(&a, 2, 2, 3), Matrix::new(&b, 2, 2));
        gemm(MatrixMut::strided(&mut out, 2, 2, 3), Update::Overwrite, lhs, rhs, 2.0, false);
        assert_eq!(out, [10., 4., 7., 22., 8., 7.]);
        gemm(MatrixMut::strided(&mut out, 2, 2, 3), Update::Add, lhs.t(), rhs, 1.0, true);
        assert_eq!(out, [17., 7., 7., 32., 12., 7.]);
    }
}

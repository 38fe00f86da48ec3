//! What the kernels share: borrowed slices, sums the compiler can vectorise, and matrix multiplication.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};
use gemm::Parallelism;

/// Whether the fused kernels take these operands: f32 on the CPU, none of them empty.
pub(super) fn fused(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32 && t.elem_count() > 0)
}

/// The same on a CPU or with CUDA: whether there are kernels for these operands that have a backward pass.
pub(super) fn trained(tensors: &[&Tensor]) -> bool {
    #[cfg(feature = "cuda")]
    if super::cuda::training::trains(tensors) {
        return true;
    }
    fused(tensors)
}

/// Whether there are kernels for these operands: as [`trained`], or for bf16 on a GPU.
pub(super) fn kernels(tensors: &[&Tensor]) -> bool {
    #[cfg(feature = "cuda")]
    if super::cuda::takes(tensors) {
        return true;
    }
    trained(tensors)
}

/// The elements of a contiguous operand.
pub(super) fn contiguous<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!("a kernel needs a contiguous operand, got strides {:?}", layout.stride()),
    }
}

/// The elements of an operand of any strides, from its first on.
pub(super) fn strided<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[layout.start_offset()..])
}

/// A tensor's storage, borrowed for as long as its slice is in use.
pub(super) struct Borrowed<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Borrowed<'a> {
    pub(super) fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    fn cpu(&self) -> Result<&CpuStorage> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("a CPU kernel got a tensor of another device"),
        }
    }

    /// All elements; an error unless they are contiguous.
    pub(super) fn slice<T: WithDType>(&self) -> Result<&[T]> {
        contiguous(self.cpu()?, self.layout)
    }

    /// All elements from the first on, whatever the strides.
    pub(super) fn strided(&self) -> Result<&[f32]> {
        strided(self.cpu()?, self.layout)
    }
}

/// The gradient of `of` as candle wants it: nothing for a constant.
pub(super) fn gradient(of: &Tensor, values: Vec<f32>) -> Result<Option<Tensor>> {
    of.track_op().then(|| Tensor::from_vec(values, of.shape(), of.device())).transpose()
}

/// Sum of `f` over pairs, in eight independent lanes: a plain fold may not be reordered, so it never vectorises.
#[inline(always)]
pub(super) fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(&a, &b)| f(a, b)).sum();
    let mut lanes = [0f32; 8];
    for (a, b) in a.zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `f`, whose loops are compiled once more for the wide registers that a processor may have, with the same results. It has
/// to be `#[inline(always)]`.
#[inline(always)]
pub(super) fn wide<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// The largest element that is not NaN, in eight lanes as [`sum`]; negative infinity for none.
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let chunks = x.chunks_exact(8);
    let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |a, &b| larger(a, b));
    let mut lanes = [f32::NEG_INFINITY; 8];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, &x)| *lane = larger(*lane, x));
    }
    lanes.iter().fold(tail, |a, &b| larger(a, b))
}

/// `a + b`, to reduce what the threads accumulated.
pub(super) fn add(mut a: Vec<f32>, b: Vec<f32>) -> Vec<f32> {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    a
}

/// A matrix to read: element (r, c) lies at `r * row_stride + c * col_stride`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major without gaps.
    pub(super) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row-major with rows `row_stride` apart.
    pub(super) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// A row-major matrix to write, with rows `row_stride` apart.
pub(super) struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// Row-major without gaps.
    pub(super) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Row-major with rows `row_stride` apart.
    pub(super) fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride }
    }
}

/// What becomes of the destination's old elements.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Into {
    Overwrite,
    Add,
}

/// Products smaller than this are not worth waking the other threads.
const PARALLEL: usize = 1 << 18;

/// `dst = scale * lhs * rhs`, or `dst +=` that.
pub(super) fn gemm(dst: MatrixMut, into: Into, lhs: Matrix, rhs: Matrix, scale: f32, threads: bool) {
    debug_assert_eq!((dst.rows, dst.cols, lhs.cols), (lhs.rows, rhs.cols, rhs.rows), "shapes of a product");
    debug_assert!(dst.row_stride >= dst.cols, "rows of a product overlap");
    let (m, n, k) = (dst.rows, dst.cols, lhs.cols);
    let extent = |rows, cols, row_stride, col_stride| match (rows, cols) {
        (0, _) | (_, 0) => 0,
        _ => (rows - 1) * row_stride + (cols - 1) * col_stride + 1,
    };
    // Slicing checks the bounds once per product, which costs nothing beside it.
    let out = &mut dst.data[..extent(m, n, dst.row_stride, 1)];
    let a = &lhs.data[..extent(m, k, lhs.row_stride, lhs.col_stride)];
    let b = &rhs.data[..extent(k, n, rhs.row_stride, rhs.col_stride)];
    let parallelism = match threads && m * n * k > PARALLEL {
        true => Parallelism::Rayon(rayon::current_num_threads()),
        false => Parallelism::None,
    };
    let (add, old) = match into {
        Into::Add => (true, 1.0),
        Into::Overwrite => (false, 0.0),
    };
    // SAFETY: the three slices above hold every element that these shapes and strides address, the destination is
    // borrowed mutably and so overlaps neither operand, and its rows do not overlap each other.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            dst.row_stride as isize,
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
        gemm(MatrixMut::strided(&mut out, 2, 2, 3), Into::Overwrite, lhs, rhs, 2.0, false);
        assert_eq!(out, [10., 4., 7., 22., 8., 7.]);
        gemm(MatrixMut::strided(&mut out, 2, 2, 3), Into::Add, lhs.t(), rhs, 1.0, true);
        assert_eq!(out, [17., 7., 7., 32., 12., 7.]);
    }

    #[test]
    fn borrowing_checks_dtype_and_strides() -> Result<()> {
        let x = Tensor::arange(0f32, 6.0, &candle_core::Device::Cpu)?.reshape((2, 3))?;
        assert_eq!(Borrowed::of(&x.narrow(0, 1, 1)?).slice::<f32>()?, [3., 4., 5.]);
        assert!(Borrowed::of(&x).slice::<u8>().is_err());
        assert!(Borrowed::of(&x.t()?).slice::<f32>().is_err());
        Ok(())
    }

    #[test]
    fn sums_keep_the_remainder() {
        let x: Vec<f32> = (0..19).map(|i| i as f32).collect();
        assert_eq!(sum(&x, &x, |a, _| a), 171.0);
        assert_eq!((max(&x), max(&x[..3]), max(&[])), (18.0, 2.0, f32::NEG_INFINITY));
    }
}

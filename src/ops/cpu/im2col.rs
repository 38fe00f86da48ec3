//! Convolution as a matrix product over unfolded patches, and its gradients.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Matrix, MatrixMut, Update, gemm};
use super::reduce;

/// f32 of unfolded patches per thread: bounds the memory, and stays near the caches.
const PATCHES: usize = 1 << 20;

/// The sizes of a convolution: an image (c, h, w), filters (o, c, k, k), and the output
/// (o, out_h, out_w).
pub(crate) struct Geometry {
    pub(crate) c: usize,
    pub(crate) h: usize,
    pub(crate) w: usize,
    pub(crate) o: usize,
    pub(crate) k: usize,
    pub(crate) stride: usize,
    /// Zero padding.
    pub(crate) top: usize,
    pub(crate) left: usize,
    pub(crate) out_h: usize,
    pub(crate) out_w: usize,
}

impl Geometry {
    /// Elements of a patch, the inner dimension of the product.
    pub(crate) fn patch(&self) -> usize {
        self.c * self.k * self.k
    }

    /// Positions of the output.
    pub(crate) fn out_area(&self) -> usize {
        self.out_h * self.out_w
    }

    /// Whether the image is its own matrix of patches.
    fn pointwise(&self) -> bool {
        self.k == 1 && self.stride == 1 && self.out_area() == self.h * self.w
    }

    /// Output rows that are unfolded at a time.
    fn band(&self) -> usize {
        (PATCHES / (self.patch() * self.out_w)).clamp(1, self.out_h)
    }

    fn bands(&self) -> impl Iterator<Item = Range<usize>> {
        let (band, end) = (self.band(), self.out_h);
        (0..end).step_by(band).map(move |first| first..(first + band).min(end))
    }

    fn scratch(&self) -> Vec<f32> {
        vec![0f32; if self.pointwise() { 0 } else { self.patch() * self.band() * self.out_w }]
    }

    /// For each tap (i, j) and output row: where its patches begin within a channel, its input row
    /// if that is not padding, the output columns whose input is not padding, and the first such
    /// input column.
    fn taps(&self, rows: &Range<usize>) -> impl Iterator<Item = (usize, Option<usize>, Range<usize>, usize)> {
        let inside = |tap: usize, pad: usize, size: usize, out: usize| {
            let end = (size + pad).saturating_sub(tap).div_ceil(self.stride).min(out);
            pad.saturating_sub(tap).div_ceil(self.stride).min(end)..end
        };
        let (rows, count) = (rows.clone(), rows.len());
        (0..self.k * self.k).flat_map(move |tap| {
            let (i, j) = (tap / self.k, tap % self.k);
            let ys = inside(i, self.top, self.h, self.out_h);
            let xs = inside(j, self.left, self.w, self.out_w);
            rows.clone().enumerate().map(move |(n, y)| {
                let row = ys.contains(&y).then(|| y * self.stride + i - self.top);
                let first = (xs.start * self.stride + j).saturating_sub(self.left);
                ((tap * count + n) * self.out_w, row, xs.clone(), first)
            })
        })
    }

    /// Unfolds the patches of output `rows` into `patches` (C·K·K, rows · out_w).
    fn unfold(&self, x: &[f32], rows: &Range<usize>, patches: &mut [f32], parallel: bool) {
        let channel = self.k * self.k * rows.len() * self.out_w;
        let channels = patches.par_chunks_mut(channel).zip(x.par_chunks(self.h * self.w));
        channels.with_min_len(if parallel { 1 } else { self.c }).for_each(|(patches, x)| {
            self.taps(rows).for_each(|(at, row, xs, first)| {
                let out = &mut patches[at..at + self.out_w];
                let Some(row) = row.filter(|_| !xs.is_empty()) else {
                    return out.fill(0.0);
                };
                let line = &x[row * self.w..][first..self.w.max(first)];
                out[..xs.start].fill(0.0);
                out[xs.end..].fill(0.0);
                let out = &mut out[xs];
                match self.stride {
                    1 => out.copy_from_slice(&line[..out.len()]),
                    stride => out.iter_mut().zip(line.iter().step_by(stride)).for_each(|(out, x)| *out = *x),
                }
            });
        });
    }

    /// Adds the gradients of the patches of output `rows` to those of the image: the transpose of
    /// [`Self::unfold`].
    fn fold(&self, patches: &[f32], rows: &Range<usize>, dx: &mut [f32], parallel: bool) {
        let channel = self.k * self.k * rows.len() * self.out_w;
        let channels = dx.par_chunks_mut(self.h * self.w).zip(patches.par_chunks(channel));
        channels.with_min_len(if parallel { 1 } else { self.c }).for_each(|(dx, patches)| {
            self.taps(rows).for_each(|(at, row, xs, first)| {
                let Some(row) = row.filter(|_| !xs.is_empty()) else { return };
                let grads = &patches[at..at + self.out_w][xs];
                let line = &mut dx[row * self.w..(row + 1) * self.w][first..];
                match self.stride {
                    1 => line.iter_mut().zip(grads).for_each(|(dx, g)| *dx += g),
                    stride => line.iter_mut().step_by(stride).zip(grads).for_each(|(dx, g)| *dx += g),
                }
            });
        });
    }
}

/// Convolves x (B, C, H, W) with w (O, C, K, K) and adds the bias (O): (B, O, H', W').
pub(crate) fn convolve(g: &Geometry, x: &[f32], w: &[f32], bias: &[f32]) -> Vec<f32> {
    let (n, area, image) = (g.patch(), g.out_area(), g.c * g.h * g.w);
    let batch = x.len() / image;
    // Images share nothing; where they are too few for all threads, each is split.
    let parallel = batch < rayon::current_num_threads();
    let mut y = vec![0f32; batch * g.o * area];
    y.par_chunks_mut(g.o * area).zip(x.par_chunks(image)).for_each_init(
        || g.scratch(),
        |scratch, (y, x)| {
            y.chunks_exact_mut(area).zip(bias).for_each(|(y, b)| y.fill(*b));
            let filters = Matrix::new(w, g.o, n);
            if g.pointwise() {
                let (y, x) = (MatrixMut::new(y, g.o, area), Matrix::new(x, n, area));
                return gemm(y, Update::Add, filters, x, 1.0, parallel);
            }
            for rows in g.bands() {
                let cols = rows.len() * g.out_w;
                let patches = &mut scratch[..n * cols];
                g.unfold(x, &rows, patches, parallel);
                let y = MatrixMut::strided(&mut y[rows.start * g.out_w..], g.o, cols, area);
                gemm(y, Update::Add, filters, Matrix::new(patches, n, cols), 1.0, parallel);
            }
        },
    );
    y
}

/// The gradients of x, w and the bias for the gradient `dy` of the output. Those of x and w are
/// only computed if `wanted`.
pub(crate) fn convolve_back(g: &Geometry, x: &[f32], w: &[f32], dy: &[f32], wanted: (bool, bool)) -> [Vec<f32>; 3] {
    let (n, area, image) = (g.patch(), g.out_area(), g.c * g.h * g.w);
    let parallel = x.len() / image < rayon::current_num_threads();
    let mut dx = vec![0f32; x.len()];
    let images = dx.par_chunks_mut(image).zip(x.par_chunks(image)).zip(dy.par_chunks(g.o * area));
    let start = || (vec![0f32; g.o * n], vec![0f32; g.o], g.scratch());
    type Sums = (Vec<f32>, Vec<f32>, Vec<f32>);
    let add_image = |(mut dw, mut db, mut scratch): Sums, ((dx, x), dy): ((&mut [f32], &[f32]), &[f32])| {
        db.iter_mut().zip(dy.chunks_exact(area)).for_each(|(db, dy)| *db += reduce::sum(dy, dy, |dy, _| dy));
        let filters = Matrix::new(w, g.o, n);
        let mut add_to_dw = |dy: Matrix, patches: Matrix| {
            gemm(MatrixMut::new(&mut dw, g.o, n), Update::Add, dy, patches.t(), 1.0, parallel);
        };
        if g.pointwise() {
            let dy = Matrix::new(dy, g.o, area);
            add_to_dw(dy, Matrix::new(x, n, area));
            gemm(MatrixMut::new(dx, n, area), Update::Overwrite, filters.t(), dy, 1.0, parallel);
            return (dw, db, scratch);
        }
        for rows in g.bands() {
            let cols = rows.len() * g.out_w;
            let patches = &mut scratch[..n * cols];
            let dy = Matrix::strided(&dy[rows.start * g.out_w..], g.o, cols, area);
            if wanted.1 {
                g.unfold(x, &rows, patches, parallel);
                add_to_dw(dy, Matrix::new(patches, n, cols));
            }
            if wanted.0 {
                gemm(MatrixMut::new(patches, n, cols), Update::Overwrite, filters.t(), dy, 1.0, parallel);
                g.fold(patches, &rows, dx, parallel);
            }
        }
        (dw, db, scratch)
    };
    let join = |(dw, db), (more_dw, more_db)| (reduce::add(dw, more_dw), reduce::add(db, more_db));
    let (dw, db) = reduce::in_order(images, start, add_image, |(dw, db, _)| (dw, db), join);
    [dx, dw, db]
}

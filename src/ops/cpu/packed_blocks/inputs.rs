//! Rows of inputs, rounded to integers.

use rayon::prelude::*;

use super::super::int8::scale_of;
use super::super::reduce::vectorized;
use super::kernels::Kernel;
use super::{GROUP, Range};

/// Pairs of columns in a group.
pub(super) const PAIRS: usize = GROUP / 2;

/// Rows of inputs, in tiles of as many rows as a kernel multiplies at once. Of the rows of a tile,
/// equal parts stand side by side.
pub(crate) struct Inputs {
    /// Pairs of 16-bit integers: of every four columns the first and third, then the others. By
    /// tile (columns / 2, rows).
    values: Vec<i32>,
    /// The value of an integer. By tile (groups, rows).
    scales: Vec<f32>,
    /// What sums over a group start with for Q4_0, whose 0 to 15 stand for -8 to 7.
    starts: Vec<i32>,
    /// The sums over a group.
    sums: Vec<f32>,
    count: usize,
    columns: usize,
    /// That the tiles are for.
    kernel: Kernel,
}

/// `R` rows of inputs.
pub(super) struct Tile<'a, const R: usize> {
    pub(super) values: &'a [[i32; R]],
    pub(super) scales: &'a [[f32; R]],
    pub(super) starts: &'a [[i32; R]],
    pub(super) sums: &'a [[f32; R]],
}

/// One tile, to be written.
struct TileMut<'a> {
    values: &'a mut [i32],
    scales: &'a mut [f32],
    starts: &'a mut [i32],
    sums: &'a mut [f32],
}

impl Inputs {
    /// From x (M, columns). A group that is not finite gives NaN.
    pub(super) fn round(x: &[f32], columns: usize, kernel: Kernel) -> Self {
        let (count, groups) = (x.len() / columns, columns / GROUP);
        let mut values = vec![0; count * groups * PAIRS];
        let (mut scales, mut starts, mut sums) =
            (vec![0.0; count * groups], vec![0; count * groups], vec![0.0; count * groups]);
        let mut tiles = Vec::new();
        let mut rest = (&mut values[..], &mut scales[..], &mut starts[..], &mut sums[..]);
        for rows in tile_rows(count, kernel) {
            let part = rows.len() * groups;
            let tile = TileMut {
                values: split(&mut rest.0, part * PAIRS),
                scales: split(&mut rest.1, part),
                starts: split(&mut rest.2, part),
                sums: split(&mut rest.3, part),
            };
            tiles.push((&x[rows.start * columns..rows.end * columns], rows.len(), tile));
        }
        let fill = |(x, rows, tile): (&[f32], usize, TileMut)| {
            vectorized(
                #[inline(always)]
                || tile.fill(x, (rows, columns)),
            );
        };
        match tiles.len() {
            1 => tiles.into_iter().for_each(fill),
            _ => tiles.into_par_iter().for_each(fill),
        }
        Self { values, scales, starts, sums, count, columns, kernel }
    }

    /// Number of rows.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Number of columns.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// The kernel that multiplies them.
    pub(super) fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// The tile of `R` rows from `first` on.
    pub(super) fn tile<const R: usize>(&self, first: usize) -> Tile<'_, R> {
        let groups = self.columns / GROUP;
        let (values, part) =
            (first * groups * PAIRS..(first + R) * groups * PAIRS, first * groups..(first + R) * groups);
        Tile {
            values: self.values[values].as_chunks().0,
            scales: self.scales[part.clone()].as_chunks().0,
            starts: self.starts[part.clone()].as_chunks().0,
            sums: self.sums[part].as_chunks().0,
        }
    }
}

/// The rows of every tile: tiles of even size, in place of full ones and a rest.
pub(super) fn tile_rows(count: usize, kernel: Kernel) -> impl Iterator<Item = Range<usize>> {
    let tiles = count.div_ceil(kernel.inputs());
    (0..tiles).map(move |tile| tile * count / tiles..(tile + 1) * count / tiles)
}

/// The first `count` elements, which leave `rest`.
fn split<'a, T>(rest: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    let (first, others) = std::mem::take(rest).split_at_mut(count);
    *rest = others;
    first
}

impl TileMut<'_> {
    #[inline(always)]
    fn fill(self, x: &[f32], (rows, columns): (usize, usize)) {
        for (r, x) in x.chunks_exact(columns).enumerate() {
            for (g, x) in x.as_chunks::<GROUP>().0.iter().enumerate() {
                // Magnitudes are ordered as their bits, with infinity and NaN above all others.
                let largest = x.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest));
                let (scale, times) = scale_of(f32::from_bits(largest), GROUP);
                let mut rounded = [0i32; GROUP];
                for i in 0..GROUP {
                    rounded[i] = (x[i] * times).round_ties_even() as i32;
                }
                let sum: i32 = rounded.iter().sum();
                let at = g * rows + r;
                (self.scales[at], self.starts[at], self.sums[at]) = (scale, -8 * sum, scale * sum as f32);
                let pairs: [i32; PAIRS] = std::array::from_fn(|pair| {
                    let i = pair / 2 * 4 + pair % 2;
                    rounded[i] & 0xffff | rounded[i + 2] << 16
                });
                let places = self.values[g * PAIRS * rows + r..].iter_mut().step_by(rows);
                places.zip(pairs).for_each(|(place, pair)| *place = pair);
            }
        }
    }
}

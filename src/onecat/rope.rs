//! Rotary positions of two axes. Token i of a text has the position (i, i); the codes of a grid
//! have rows and columns of the last grid, counted from the end of the prompt, so that all scales
//! cover the same positions.

use candle_core::{Device, Result, Tensor};
use half::bf16;

use super::OneCatConfig;
use crate::backbone::Rope;

/// Row and column.
pub type Position = [usize; 2];

/// Line of the last grid, of `most` lines, for line `i` of `count`. Computed in f32 with halves
/// rounded to even, as in the reference; f64 gives other lines for some sizes.
pub fn coordinate(i: usize, count: usize, most: usize) -> usize {
    (i as f32 * (most as f32 / count as f32)).round_ties_even() as usize
}

/// Positions of a grid (height, width), row-major, behind `start` tokens; `last` is the last grid
/// of the image.
pub fn grid(start: usize, (h, w): (usize, usize), last: (usize, usize)) -> impl Iterator<Item = Position> {
    let row = move |i: usize| start + coordinate(i, h, last.0);
    let column = move |j: usize| start + coordinate(j, w, last.1);
    (0..h).flat_map(move |i| (0..w).map(move |j| [row(i), column(j)]))
}

/// Rotary frequencies of the pairs of a head, in f32 as the reference computes them, or `rounded`
/// to bf16.
pub fn frequencies(config: &OneCatConfig, rounded: bool) -> Vec<f32> {
    let half = config.transformer.head_dim() / 2;
    // Rounded as often as in the reference: at position 1,400 that shows in the fourth digit of an
    // angle.
    let exact = |f: usize| 1.0 / config.transformer.rope_theta.powf(f64::from(f as f32 / half as f32)) as f32;
    (0..half).map(exact).map(|f| if rounded { bf16::from_f32(f).to_f32() } else { f }).collect()
}

/// Angles of positions, one row after the other, of as many tokens each: cosines and sines (rows,
/// tokens, head_dim / 2). Two pairs turn by the row, the next two by the column, and so on.
pub fn angles(config: &OneCatConfig, rounded: bool, rows: &[Vec<Position>], device: &Device) -> Result<Rope> {
    let frequencies = frequencies(config, rounded);
    let tokens = rows.first().map_or(0, Vec::len);
    let mut angles = Vec::with_capacity(rows.len() * tokens * frequencies.len());
    for position in rows.iter().flatten() {
        let axes = position.map(|p| p as f32);
        angles.extend(frequencies.iter().enumerate().map(|(f, frequency)| axes[f / 2 % 2] * frequency));
    }
    let angles = Tensor::from_vec(angles, (rows.len(), tokens, frequencies.len()), device)?;
    Ok(Rope { cos: angles.cos()?, sin: angles.sin()? })
}

/// Angles of `count` tokens of text or patches from index `start` on, (1, count, head_dim / 2).
pub fn sequence(config: &OneCatConfig, rounded: bool, start: usize, count: usize, device: &Device) -> Result<Rope> {
    angles(config, rounded, &[(start..start + count).map(|i| [i, i]).collect()], device)
}

//! Multi-scale 3D RoPE (paper, Eq. 1 and Fig. 5), one-dimensional where an image is read like text:
//! positions of text and image tokens, and their rotations.

use candle_core::{Device, Tensor};
use half::bf16;

use super::BackboneConfig;

/// (scale or text counter, row, column).
pub type Position = [f32; 3];

/// Text at counter `t`.
pub fn text_position(t: usize) -> Position {
    [t as f32; 3]
}

/// The positions of one grid, row-major. `t` is the counter of `<boi>` plus the index of the scale;
/// row and column axes run over (0, C * sqrt(h / w)) and (0, C * sqrt(w / h)) whatever the scale.
pub fn grid_positions(t: usize, (h, w): (usize, usize), extent: f64) -> impl Iterator<Item = Position> {
    let step = extent / ((h * w) as f64).sqrt();
    let at = move |i: usize| (step * (i as f64 + 0.5)) as f32;
    (0..h).flat_map(move |i| (0..w).map(move |j| [t as f32, at(i), at(j)]))
}

/// Cosines and sines of the rotation angles, each (rows, tokens, head_dim / 2) in f32.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Cosines.
    pub cos: Tensor,
    /// Sines.
    pub sin: Tensor,
}

impl Rope {
    /// Tables for `rows` of equally many positions. Pair j turns by `theta^(-2j / head_dim)`,
    /// scaled as the config has it, times the coordinate of the axis that owns it: the first
    /// `mrope_section[0]` pairs belong to the scale, then rows, then columns. Where all positions
    /// are [`text_position`]s that is the plain one-dimensional rotation.
    pub fn new(config: &BackboneConfig, rows: &[&[Position]], device: &Device) -> candle_core::Result<Self> {
        let half = config.head_dim() / 2;
        let axes = config.mrope_section.iter().enumerate().flat_map(|(axis, &n)| std::iter::repeat_n(axis, n));
        let scaling = config.rope_scaling;
        let frequency = |j: usize| {
            let frequency = config.rope_theta.powf(-(j as f64) / half as f64);
            let frequency = scaling.map_or(frequency, |s| s.frequency(frequency, j, half, config.rope_theta));
            if config.bf16_frequencies { bf16::from_f64(frequency).to_f64() } else { frequency }
        };
        let pairs: Vec<(usize, f64)> = axes.enumerate().map(|(j, axis)| (axis, frequency(j))).collect();
        let tokens = rows.first().map_or(0, |r| r.len());
        let angles: Vec<f32> = rows
            .iter()
            .flat_map(|row| row.iter())
            .flat_map(|p| pairs.iter().map(|&(axis, frequency)| (f64::from(p[axis]) * frequency) as f32))
            .collect();
        let angles = Tensor::from_vec(angles, (rows.len(), tokens, half), device)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        match scaling.map_or(1.0, |s| s.attention_factor()) {
            1.0 => Ok(Self { cos, sin }),
            factor => Ok(Self { cos: (cos * factor)?, sin: (sin * factor)? }),
        }
    }

    /// Those of `rows` rows from `first` on.
    pub fn narrow(&self, first: usize, rows: usize) -> candle_core::Result<Self> {
        Ok(Self { cos: self.cos.narrow(0, first, rows)?, sin: self.sin.narrow(0, first, rows)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_worked_example_comes_out_exactly() {
        // K = 3 (1x1, 2x2, 3x3), first image at t = 0, five text tokens, a second image.
        let scales = [(2, 2), (3, 3)];
        let mut t = 0;
        let image = |t: &mut usize| {
            let mut positions = vec![text_position(*t)];
            for (k, &grid) in scales.iter().enumerate() {
                positions.extend(grid_positions(*t + k + 1, grid, 1.0));
            }
            *t += scales.len() + 1;
            positions.push(text_position(*t));
            *t += 1;
            positions
        };
        let first = image(&mut t);
        assert_eq!(first[0], [0.0, 0.0, 0.0]);
        assert_eq!(first[1], [1.0, 0.25, 0.25]);
        assert_eq!(first[2], [1.0, 0.25, 0.75]);
        assert_eq!(first[3], [1.0, 0.75, 0.25]);
        assert_eq!(first[5], [2.0, 1.0 / 6.0, 1.0 / 6.0]);
        assert_eq!(first[13], [2.0, 5.0 / 6.0, 5.0 / 6.0]);
        assert_eq!(first[14], [3.0, 3.0, 3.0]);
        assert_eq!(t, 4);
        t += 5;
        let second = image(&mut t);
        assert_eq!(second[0], [9.0, 9.0, 9.0]);
        assert_eq!(second[1][0], 10.0);
        assert_eq!(second[5][0], 11.0);
        assert_eq!(second[14], [12.0, 12.0, 12.0]);
    }

    #[test]
    fn wide_grids_span_wide_columns() {
        let last = grid_positions(0, (4, 16), 64.0).last().unwrap();
        assert_eq!(last, [0.0, 8.0 * 3.5, 8.0 * 15.5]);
    }
}

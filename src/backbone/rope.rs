//! Multi-scale 3D RoPE (paper, Eq. 1 and Fig. 5), one-dimensional where an image is read like text: positions of text
//! and image tokens, and their rotations.

use candle_core::{Device, Tensor};
use half::bf16;
use serde::{Deserialize, Serialize};

use super::BackboneConfig;

/// (scale or text counter, row, column).
pub type Position = [f32; 3];

/// Text at counter `t`.
pub fn text_position(t: usize) -> Position {
    [t as f32; 3]
}

/// The positions of one grid, row-major. `t` is the counter of `<boi>` plus the index of the scale; row and column
/// axes run over (0, C * sqrt(h / w)) and (0, C * sqrt(w / h)) whatever the scale.
pub fn grid_positions(t: usize, (h, w): (usize, usize), extent: f64) -> impl Iterator<Item = Position> {
    let step = extent / ((h * w) as f64).sqrt();
    let at = move |i: usize| (step * (i as f64 + 0.5)) as f32;
    (0..h).flat_map(move |i| (0..w).map(move |j| [t as f32, at(i), at(j)]))
}

/// How rotary frequencies are changed for sequences longer than those of the training; names as in
/// transformers' `rope_parameters`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies are divided by `factor`.
    Linear {
        /// How many times longer sequences are.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071): low frequencies are divided by `factor`, high ones stay, and
    /// attention gets sharper.
    Yarn {
        /// How many times longer sequences are.
        factor: f64,
        /// Tokens of the longest sequence of the training.
        original_max_position_embeddings: usize,
        /// Pairs that turn this often over such a sequence, or more often, stay as they are.
        beta_fast: f64,
        /// Those that turn this often or less are divided by `factor`.
        beta_slow: f64,
        /// Multiplies cosines and sines.
        attention_factor: f64,
        /// Round the first and the last pair between the two outwards.
        truncate: bool,
    },
}

impl RopeScaling {
    /// What would give frequencies that are not finite, as one sentence.
    pub fn check(&self) -> Result<(), String> {
        let positive = |name: &str, x: f64| {
            if x.is_finite() && x > 0.0 { Ok(()) } else { Err(format!("rope_scaling: {name} {x} is not above 0")) }
        };
        match *self {
            Self::Linear { factor } => positive("factor", factor),
            Self::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, attention_factor, .. } => {
                positive("factor", factor)?;
                positive("original_max_position_embeddings", original_max_position_embeddings as f64)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                positive("attention_factor", attention_factor)
            }
        }
    }

    /// The frequency of pair `j` of `half`, of which `frequency` is the unscaled one.
    fn frequency(&self, frequency: f64, j: usize, half: usize, theta: f64) -> f64 {
        match *self {
            Self::Linear { factor } => frequency / factor,
            Self::Yarn { factor, original_max_position_embeddings: length, beta_fast, beta_slow, truncate, .. } => {
                let dim = 2.0 * half as f64;
                let pair =
                    |turns: f64| dim * (length as f64 / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
                let (low, high) = (pair(beta_fast), pair(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let interpolated = ((j as f64 - low) / (high - low)).clamp(0.0, 1.0);
                frequency / factor * interpolated + frequency * (1.0 - interpolated)
            }
        }
    }

    fn attention_factor(&self) -> f64 {
        if let Self::Yarn { attention_factor, .. } = *self { attention_factor } else { 1.0 }
    }
}

/// YaRN's `mscale`: how much sharper attention gets for sequences `factor` times longer.
pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
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
    /// Tables for `rows` of equally many positions. Pair j turns by `theta^(-2j / head_dim)`, scaled as the config has
    /// it, times the coordinate of the axis that owns it: the first `mrope_section[0]` pairs belong to the scale, then rows, then columns. Where all
    /// positions are [`text_position`]s that is the plain one-dimensional rotation.
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

    /// Frequencies as transformers 5.24 computes them, for heads of 16 channels and a base of 1e6.
    #[test]
    fn scaled_frequencies_are_those_of_transformers() {
        let yarn = |factor, original, (beta_fast, beta_slow), attention_factor, truncate| RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        };
        let usual = (32.0, 1.0);
        for (scaling, want) in [
            (
                RopeScaling::Linear { factor: 3.0 },
                [0.3333333, 0.05927598, 0.01054093, 0.001874471, 0.0003333334, 5.927598e-5, 1.054092e-5, 1.874471e-6],
            ),
            (
                yarn(4.0, 1024, usual, 1.0, true),
                [1.0, 0.133371, 0.01581139, 0.001405853, 0.00025, 4.445699e-5, 7.905694e-6, 1.405853e-6],
            ),
            (
                yarn(8.0, 512, (16.0, 2.0), 0.9, true),
                [1.0, 0.1259615, 0.01317616, 0.0007029267, 0.000125, 2.222849e-5, 3.952847e-6, 7.029267e-7],
            ),
            (
                yarn(8.0, 512, usual, 1.0, false),
                [1.0, 0.1422597, 0.01151013, 0.0007029267, 0.000125, 2.222849e-5, 3.952847e-6, 7.029267e-7],
            ),
            (
                yarn(4.0, 4096, usual, 1.0, true),
                [1.0, 0.1778279, 0.02371708, 0.002811707, 0.00025, 4.445699e-5, 7.905694e-6, 1.405853e-6],
            ),
        ] {
            scaling.check().unwrap();
            for (j, want) in want.into_iter().enumerate() {
                let got = scaling.frequency(1e6f64.powf(-(j as f64) / 8.0), j, 8, 1e6);
                assert!((got / want - 1.0f64).abs() < 1e-6, "{scaling:?} {j}: {got}, {want}");
            }
        }
        assert!((yarn_mscale(4.0, 1.0) - 1.138629436111989).abs() < 1e-12);
        assert!((yarn_mscale(8.0, 0.7) / yarn_mscale(8.0, 0.4) - 1.0575928109100559).abs() < 1e-12);
    }

    #[test]
    fn wide_grids_span_wide_columns() {
        let last = grid_positions(0, (4, 16), 64.0).last().unwrap();
        assert_eq!(last, [0.0, 8.0 * 3.5, 8.0 * 15.5]);
    }
}

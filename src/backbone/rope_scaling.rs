//! Rotary frequencies for sequences longer than those of the training, as transformers computes
//! them.

use serde::{Deserialize, Serialize};

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
    /// Errors: a value that gives frequencies that are not finite, as one sentence.
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
    pub(super) fn frequency(&self, frequency: f64, j: usize, half: usize, theta: f64) -> f64 {
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

    /// Multiplies cosines and sines.
    pub(super) fn attention_factor(&self) -> f64 {
        if let Self::Yarn { attention_factor, .. } = *self { attention_factor } else { 1.0 }
    }
}

/// YaRN's `mscale`: how much sharper attention gets for sequences `factor` times longer.
pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}

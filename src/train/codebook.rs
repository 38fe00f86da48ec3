//! The codebook learns as online k-means: every entry is a moving average of the residuals it was
//! nearest to.

use candle_core::{Device, Tensor};
use std::collections::BTreeMap;

use super::optimizer::State;
use crate::error::Result;
use crate::rng::Rng;
use crate::tokenizer::{CodebookConfig, Quantizer};

/// Decay of the averages per step.
const DECAY: f32 = 0.97;
/// An entry that is nearest to fewer residuals than this, on average per step, is given another
/// place.
const DEAD: f32 = 0.02;

/// Which code was nearest to which residual.
#[derive(Default)]
pub struct Assignments {
    codes: Vec<u32>,
    residuals: Vec<f32>,
}

impl Assignments {
    /// One more residual z (D) and the code nearest to it.
    pub fn push(&mut self, code: u32, z: &[f32]) {
        self.codes.push(code);
        self.residuals.extend_from_slice(z);
    }
}

/// Entries and their averages.
pub struct Codebook {
    config: CodebookConfig,
    table: Vec<f32>,
    counts: Vec<f32>,
    sums: Vec<f32>,
}

impl Codebook {
    /// Starts from a (size, D) table.
    pub fn new(config: &CodebookConfig, table: Vec<f32>) -> Self {
        let counts = vec![1.0; config.size];
        Self { config: config.clone(), sums: table.clone(), table, counts }
    }

    /// The entries, (size, D).
    pub fn table(&self) -> &[f32] {
        &self.table
    }

    /// A quantiser with the entries as they are now.
    pub fn quantizer(&self) -> candle_core::Result<Quantizer> {
        Quantizer::from_table(&self.config, self.table.clone(), &Device::Cpu)
    }

    /// Entries that are still nearest to something.
    pub fn in_use(&self) -> usize {
        self.counts.iter().filter(|&&c| c > DEAD).count()
    }

    /// Spreads the entries over features (n, D): shrunken copies of random ones, since most of what
    /// a code will see is residual. Entry 0 starts at zero: nothing to add.
    pub fn spread(&mut self, features: &[f32], rng: &Rng) {
        let dim = self.config.dim();
        for (i, entry) in self.table.chunks_exact_mut(dim).enumerate() {
            let from = rng.below(2 * i as u64, features.len() / dim);
            let shrink = if i == 0 { 0.0 } else { rng.uniform(2 * i as u64 + 1) as f32 };
            entry.iter_mut().zip(&features[from * dim..]).for_each(|(e, f)| *e = shrink * f);
        }
        self.sums.copy_from_slice(&self.table);
    }

    /// Moves every entry towards the mean of its residuals, and dead entries onto random residuals
    /// of this batch.
    pub fn learn<'a>(&mut self, batch: impl Iterator<Item = &'a Assignments>, rng: &Rng) {
        let dim = self.config.dim();
        self.counts.iter_mut().for_each(|c| *c *= DECAY);
        self.sums.iter_mut().for_each(|s| *s *= DECAY);
        let mut seen: Vec<&[f32]> = Vec::new();
        for assignments in batch {
            let all = assignments.codes.iter().zip(assignments.residuals.chunks_exact(dim));
            // The optimizer skips a step that is not finite, and so do the averages, which would
            // never recover.
            for (&code, z) in all.filter(|(_, z)| z.iter().all(|x| x.is_finite())) {
                self.counts[code as usize] += 1.0 - DECAY;
                let sum = &mut self.sums[code as usize * dim..][..dim];
                sum.iter_mut().zip(z).for_each(|(s, v)| *s += (1.0 - DECAY) * v);
                seen.push(z);
            }
        }
        for code in 0..self.config.size {
            let entry = &mut self.table[code * dim..][..dim];
            let sum = &mut self.sums[code * dim..][..dim];
            if self.counts[code] < DEAD && !seen.is_empty() {
                entry.copy_from_slice(seen[rng.below(code as u64, seen.len())]);
                self.counts[code] = 4.0 * DEAD;
                sum.iter_mut().zip(entry).for_each(|(s, e)| *s = *e * 4.0 * DEAD);
            } else {
                entry.iter_mut().zip(sum).for_each(|(e, s)| *e = *s / self.counts[code]);
            }
        }
    }

    /// Its state to resume from: the averages.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let (size, dim) = (self.config.size, self.config.dim());
        let all = [("table", &self.table, dim), ("sums", &self.sums, dim), ("counts", &self.counts, 1)];
        let tensor = |(key, data, width): (&str, &Vec<f32>, usize)| {
            Ok((format!("codebook.{key}"), Tensor::from_slice(data, (size, width), &Device::Cpu)?))
        };
        all.into_iter().map(tensor).collect()
    }

    /// Goes on from a [`state`](Self::state).
    ///
    /// Errors: those of [`State::tensor`].
    pub fn restore(&mut self, state: &State) -> Result<()> {
        let (size, dim) = (self.config.size, self.config.dim());
        let all = [("table", &mut self.table, dim), ("sums", &mut self.sums, dim), ("counts", &mut self.counts, 1)];
        for (key, data, width) in all {
            *data = state.tensor(&format!("codebook.{key}"), (size, width))?.flatten_all()?.to_vec1()?;
        }
        Ok(())
    }
}

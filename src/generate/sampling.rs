//! The settings by which codes are drawn.

use super::sampler::Filter;
use crate::error::{Error, Result};

/// Beyond these, logits may not stay finite in f32.
const MAX_CFG: f64 = 1e3;
const MAX_TEMPERATURE: f64 = 1e6;

/// How codes are drawn from the logits.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// Guidance at the last scale; it ramps up from 0 at the first (VAR). 0 turns guidance off.
    pub cfg: f64,
    /// 0 means argmax.
    pub temperature: f64,
    /// Keep the k likeliest codes.
    pub top_k: Option<usize>,
    /// Keep the smallest set of codes whose probabilities sum to p; 1 keeps all.
    pub top_p: f64,
    /// Further passes over every scale but the first, each with a filter of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refine: Vec<Filter>,
    /// The first so many scales are guided; later ones follow the prompt's row alone, in half the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cfg_until: Option<usize>,
    /// So many scales are left out at the end: a draft, of full size but without its finest detail.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub draft: usize,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Default for Sampling {
    /// All codes as the model gives them, without guidance.
    fn default() -> Self {
        Self { cfg: 0.0, temperature: 1.0, top_k: None, top_p: 1.0, refine: Vec::new(), cfg_until: None, draft: 0 }
    }
}

impl Sampling {
    /// The first invalid setting: its name, its value and the rule that it breaks.
    pub fn fault(&self) -> Option<(&'static str, f64, &'static str)> {
        let filters = std::iter::once((self.top_k, self.top_p)).chain(self.refine.iter().map(|f| (f.top_k, f.top_p)));
        let inside = |x: f64, most: f64| (0.0..=most).contains(&x);
        let mut faults = vec![
            (inside(self.cfg, MAX_CFG), ("cfg", self.cfg, "a number from 0 to 1000")),
            (
                inside(self.temperature, MAX_TEMPERATURE),
                ("temperature", self.temperature, "a number from 0 to 1000000"),
            ),
        ];
        for (top_k, top_p) in filters {
            faults.push((top_k != Some(0), ("top-k", 0.0, "1 or more")));
            faults.push((inside(top_p, 1.0) && top_p > 0.0, ("top-p", top_p, "above 0 and at most 1")));
        }
        faults.into_iter().find_map(|(good, fault)| (!good).then_some(fault))
    }

    /// Errors: usage, if the draft leaves none of so many scales.
    pub fn check(&self, scales: usize) -> Result<()> {
        if self.draft < scales {
            return Ok(());
        }
        Err(Error::usage(format!("--draft {} leaves none of the {scales} scales", self.draft)).hint("--draft 1"))
    }

    /// How many of the first scales are guided.
    pub fn guided_scales(&self, scales: usize) -> usize {
        if self.cfg > 0.0 { self.cfg_until.unwrap_or(scales).min(scales) } else { 0 }
    }

    /// VAR's guidance t at the scale of an index, of so many: a ramp from 0 at the first to `cfg` at the last. The logits become
    /// (1 + t) conditional - t unconditional.
    pub fn guidance(&self, scale: usize, scales: usize) -> f64 {
        self.cfg * scale as f64 / scales.saturating_sub(1).max(1) as f64
    }

    /// How many scales of so many are drawn.
    pub fn drawn(&self, scales: usize) -> usize {
        scales.saturating_sub(self.draft)
    }

    /// Passes over all of so many scales that are drawn.
    pub fn all_passes(&self, scales: usize) -> usize {
        (0..self.drawn(scales)).map(|scale| self.passes(scale)).sum()
    }

    /// Passes over the scale of an index.
    pub fn passes(&self, scale: usize) -> usize {
        if scale == 0 { 1 } else { 1 + self.refine.len() }
    }

    /// Candidates of a pass; the first is pass 0.
    pub(super) fn filter(&self, pass: usize) -> Filter {
        let first = Filter { top_k: self.top_k, top_p: self.top_p };
        if pass == 0 { first } else { self.refine.get(pass - 1).copied().unwrap_or(first) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guidance_ramps_up_to_the_last_scale() {
        let sampling = Sampling { cfg: 6.0, cfg_until: Some(3), ..Sampling::default() };
        assert_eq!((0..4).map(|scale| sampling.guidance(scale, 4)).collect::<Vec<_>>(), [0.0, 2.0, 4.0, 6.0]);
        // There is nothing to ramp over.
        assert_eq!(sampling.guidance(0, 1), 0.0);
        assert_eq!((sampling.guided_scales(4), sampling.guided_scales(2)), (3, 2));
        assert_eq!(Sampling { cfg: 0.0, ..sampling }.guided_scales(4), 0);
    }

    #[test]
    fn a_draft_leaves_a_scale_to_draw() {
        let sampling = Sampling { draft: 2, refine: vec![Filter { top_k: None, top_p: 1.0 }], ..Sampling::default() };
        assert_eq!((sampling.drawn(5), sampling.all_passes(5)), (3, 5));
        assert!(sampling.check(3).is_ok());
        assert_eq!(sampling.check(2).unwrap_err().exit_code(), 2);
    }
}

//! Sampling settings of image codes.

use crate::error::{Error, Result};

/// The most steps of the refiner: beyond them nothing changes.
pub const MAX_REFINE_STEPS: usize = 100;

/// Top-k and top-p.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Keep the k most likely.
    pub top_k: Option<usize>,
    /// Of these keep the smallest set whose probabilities sum to p; 1 keeps all.
    pub top_p: f64,
}

/// Beyond these, logits may not stay finite in f32.
const MAX_CFG: f64 = 1e3;
const MAX_TEMPERATURE: f64 = 1e6;

/// The meaning of [`Sampling::cfg`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guidance {
    /// VAR's t at the last scale, from 0 at the first: (1 + t) conditional - t unconditional. 0 is
    /// off.
    #[default]
    Ramp,
    /// c at every scale: c conditional + (1 - c) unconditional. 1 is off, and so is 0.
    Constant,
}

/// How codes are drawn from the logits.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// Guidance; `guidance` is its meaning.
    pub cfg: f64,
    /// 0 means argmax.
    pub temperature: f64,
    /// Keep the k most likely codes.
    pub top_k: Option<usize>,
    /// Keep the smallest set of codes whose probabilities sum to p; 1 keeps all.
    pub top_p: f64,
    /// TokenFlow-t2i only: further passes over every scale but the first, each with its own filter.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub later_passes: Vec<Filter>,
    /// Number of guided scales; later ones use the conditional row alone, in half the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cfg_until: Option<usize>,
    /// Number of scales skipped at the end: a draft of full size, without the finest detail.
    #[serde(default, skip_serializing_if = "is_default")]
    pub draft: usize,
    /// The meaning of `cfg`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub guidance: Guidance,
    /// Constant guidance of every scale, in place of `cfg`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cfg_scales: Vec<f64>,
    /// The temperature of every scale, in place of `temperature`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub temperature_scales: Vec<f64>,
    /// Infinity only: guidance is applied inside the network, each of these numbers of blocks
    /// before its end; 0 means on the logits, as without any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cfg_layers: Vec<usize>,
    /// How much the words alone, without the picture that is edited, count beside both in guidance.
    /// OneCAT's edits alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_cfg: Option<f64>,
    /// Steps of the refiner; 0 is off.
    #[serde(default, skip_serializing_if = "is_default")]
    pub refine: usize,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for Sampling {
    /// Plain sampling from the model, without guidance.
    fn default() -> Self {
        Self {
            cfg: 0.0,
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            later_passes: Vec::new(),
            cfg_until: None,
            draft: 0,
            guidance: Guidance::Ramp,
            cfg_scales: Vec::new(),
            temperature_scales: Vec::new(),
            cfg_layers: Vec::new(),
            image_cfg: None,
            refine: 0,
        }
    }
}

impl Sampling {
    /// The first invalid setting: its name, its value and the rule that it breaks.
    pub fn fault(&self) -> Option<(&'static str, f64, &'static str)> {
        let filters =
            std::iter::once((self.top_k, self.top_p)).chain(self.later_passes.iter().map(|f| (f.top_k, f.top_p)));
        let inside = |x: f64, most: f64| (0.0..=most).contains(&x);
        let mut faults = Vec::new();
        for &cfg in [self.cfg].iter().chain(&self.cfg_scales) {
            faults.push((inside(cfg, MAX_CFG), ("cfg", cfg, "a number from 0 to 1000")));
        }
        if let Some(cfg) = self.image_cfg {
            faults.push((inside(cfg, MAX_CFG), ("image-cfg", cfg, "a number from 0 to 1000")));
        }
        for &temperature in [self.temperature].iter().chain(&self.temperature_scales) {
            let good = inside(temperature, MAX_TEMPERATURE);
            faults.push((good, ("temperature", temperature, "a number from 0 to 1000000")));
        }
        faults
            .push((self.refine <= MAX_REFINE_STEPS, ("refine", self.refine as f64, "a number of steps from 1 to 100")));
        for (top_k, top_p) in filters {
            faults.push((top_k != Some(0), ("top-k", 0.0, "1 or more")));
            faults.push((inside(top_p, 1.0) && top_p > 0.0, ("top-p", top_p, "above 0 and at most 1")));
        }
        faults.into_iter().find_map(|(good, fault)| (!good).then_some(fault))
    }

    /// Errors: usage, if the draft leaves none of `scales` scales, or a list has another number of
    /// values.
    pub fn check(&self, scales: usize) -> Result<()> {
        if self.guidance == Guidance::Ramp && !self.cfg_scales.is_empty() {
            return Err(Error::usage("--cfg with a value for every scale is for Infinity").hint("--cfg 3"));
        }
        for (flag, list) in [("cfg", &self.cfg_scales), ("temperature", &self.temperature_scales)] {
            if !list.is_empty() && list.len() != scales {
                let message = format!("--{flag} has {} values, but the image has {scales} scales", list.len());
                return Err(Error::usage(message).hint(format!("--{flag} X, or {scales} values: X,Y,...")));
            }
        }
        if self.draft < scales {
            return Ok(());
        }
        Err(Error::usage(format!("--draft {} leaves none of the {scales} scales", self.draft)).hint("--draft 1"))
    }

    /// Whether any scale is guided.
    pub fn is_guided(&self) -> bool {
        match self.guidance {
            Guidance::Ramp => self.cfg > 0.0,
            Guidance::Constant if self.cfg_scales.is_empty() => self.constant(0) != 0.0,
            Guidance::Constant => (0..self.cfg_scales.len()).any(|scale| self.constant(scale) != 0.0),
        }
    }

    /// How many of the first scales are guided, up to the last one that is.
    pub fn guided_scales(&self, scales: usize) -> usize {
        let until = self.cfg_until.unwrap_or(scales).min(scales);
        match self.guidance {
            Guidance::Ramp if self.cfg > 0.0 => until,
            Guidance::Ramp => 0,
            Guidance::Constant => (0..until).rfind(|&scale| self.constant(scale) != 0.0).map_or(0, |scale| scale + 1),
        }
    }

    /// Guidance t at scale `scale` of `scales`: logits = (1 + t) conditional - t unconditional.
    pub fn guidance(&self, scale: usize, scales: usize) -> f64 {
        match self.guidance {
            Guidance::Ramp => self.cfg * scale as f64 / scales.saturating_sub(1).max(1) as f64,
            Guidance::Constant => self.constant(scale),
        }
    }

    /// t of constant guidance.
    fn constant(&self, scale: usize) -> f64 {
        match self.cfg_scales.get(scale).copied().unwrap_or(self.cfg) {
            0.0 => 0.0,
            cfg => cfg - 1.0,
        }
    }

    /// Weight of the words alone in guidance of edits; 0 is none.
    pub fn image_cfg(&self) -> f64 {
        self.image_cfg.unwrap_or(0.0)
    }

    /// The temperature at the scale of an index.
    pub fn temperature_at(&self, scale: usize) -> f64 {
        self.temperature_scales.get(scale).copied().unwrap_or(self.temperature)
    }

    /// How many of `scales` scales are drawn.
    pub fn drawn(&self, scales: usize) -> usize {
        scales.saturating_sub(self.draft)
    }

    /// Passes over all drawn scales of `scales`.
    pub fn all_passes(&self, scales: usize) -> usize {
        (0..self.drawn(scales)).map(|scale| self.passes(scale)).sum()
    }

    /// Passes over the scale of an index.
    pub fn passes(&self, scale: usize) -> usize {
        if scale == 0 { 1 } else { 1 + self.later_passes.len() }
    }

    /// Candidates of a pass; the first is pass 0.
    pub(super) fn filter(&self, pass: usize) -> Filter {
        let first = Filter { top_k: self.top_k, top_p: self.top_p };
        if pass == 0 { first } else { self.later_passes.get(pass - 1).copied().unwrap_or(first) }
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
    fn constant_guidance_is_one_number_or_one_for_every_scale() {
        let sampling = Sampling { cfg: 3.0, guidance: Guidance::Constant, ..Sampling::default() };
        assert_eq!((0..3).map(|scale| sampling.guidance(scale, 3)).collect::<Vec<_>>(), [2.0; 3]);
        assert_eq!((sampling.guided_scales(13), sampling.is_guided()), (13, true));
        for off in [0.0, 1.0] {
            let off = Sampling { cfg: off, ..sampling.clone() };
            assert_eq!((off.guided_scales(13), off.guidance(4, 13), off.is_guided()), (0, 0.0, false));
        }
        let cfg_scales = vec![4.0, 1.0, 3.0, 1.0, 1.0];
        let each = Sampling { cfg_scales, temperature_scales: vec![1.0, 0.9, 0.8, 0.7, 0.6], ..sampling };
        assert_eq!(each.guided_scales(5), 3);
        assert_eq!(Sampling { cfg_until: Some(2), ..each.clone() }.guided_scales(5), 1);
        assert_eq!((0..5).map(|scale| each.guidance(scale, 5)).collect::<Vec<_>>(), [3.0, 0.0, 2.0, 0.0, 0.0]);
        assert_eq!(each.temperature_at(3), 0.7);
        assert!(each.check(5).is_ok());
        assert_eq!(each.check(4).unwrap_err().exit_code(), 2);
        let json = serde_json::to_string(&Sampling::default()).unwrap();
        assert_eq!(json, r#"{"cfg":0.0,"temperature":1.0,"top_k":null,"top_p":1.0}"#);
    }

    #[test]
    fn a_draft_leaves_a_scale_to_draw() {
        let sampling =
            Sampling { draft: 2, later_passes: vec![Filter { top_k: None, top_p: 1.0 }], ..Sampling::default() };
        assert_eq!((sampling.drawn(5), sampling.all_passes(5)), (3, 5));
        assert!(sampling.check(3).is_ok());
        assert_eq!(sampling.check(2).unwrap_err().exit_code(), 2);
    }
}

//! Noise levels of image-to-image: the last part of a rectified flow, as diffusers'
//! `FlowMatchEulerDiscreteScheduler` with a constant shift has it.

use serde_json::Value;

use crate::checkpoint::Source;
use crate::error::{Error, Result};

/// The scheduler's settings in a model folder.
const FILE: &str = "scheduler/scheduler_config.json";

/// Passes from noise alone to a picture: Z-Image-Turbo is distilled for these.
pub const STEPS: usize = 8;

/// Noise levels by their shift.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// s of sigma' = s sigma / (1 + (s - 1) sigma).
    pub shift: f64,
}

impl Schedule {
    /// Reads the settings of a model folder.
    ///
    /// Errors: [`crate::error::Kind::Model`] for settings of another scheduler.
    pub fn read(source: &Source) -> Result<Self> {
        let json = source.read_json(FILE)?;
        let on = |key: &&&str| !matches!(json.get(**key), None | Some(Value::Null | Value::Bool(false)));
        let others = [
            "use_dynamic_shifting",
            "invert_sigmas",
            "shift_terminal",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "stochastic_sampling",
        ];
        let bad = |what: String| {
            Error::model(format!("{FILE} of {source} {what}"))
                .hint(format!("copy it from {} again: it has a constant shift", super::HUB))
        };
        if let Some(key) = others.iter().find(on) {
            return Err(bad(format!("sets {key}, which is not read")));
        }
        if json.get("num_train_timesteps").is_some_and(|n| n.as_u64() != Some(1000)) {
            return Err(bad("has other than 1000 time steps".into()));
        }
        let shift = json.get("shift").and_then(Value::as_f64).unwrap_or(1.0);
        match shift.is_finite() && shift > 0.0 {
            true => Ok(Self { shift }),
            false => Err(bad(format!("has a shift of {shift}"))),
        }
    }

    /// The noise levels of the last part of the [`STEPS`] passes, as large a part as `strength` (in
    /// (0, 1]) says: one for the start of every pass, then 0.
    pub fn sigmas(&self, strength: f64) -> Vec<f64> {
        let steps = STEPS as f64;
        let first = (steps - steps * strength.clamp(0.0, 1.0)) as usize;
        let level = |i: usize| {
            let sigma = 1.0 - i as f64 / steps;
            self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)
        };
        (first..STEPS).map(level).chain([0.0]).collect()
    }

    /// Passes of a strength.
    pub fn passes(&self, strength: f64) -> usize {
        self.sigmas(strength).len() - 1
    }
}

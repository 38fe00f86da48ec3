//! Rectified flow: z = t x + (1 - t) z_0 on the straight way from the tokenizer's picture with some
//! noise, z_0, to the true one, x. The network predicts x; the loss and the steps are those of the
//! velocity (x - z) / (1 - t).
//!
//! It begins at the picture, and not at noise alone, because most of the picture is right: what is
//! left to draw has a much smaller scale than the picture has, and noise of that scale serves.

use std::ops::ControlFlow;

use candle_core::{Device, Result, Tensor};

use crate::rng::Rng;

/// How times are drawn in training, and how much an error counts.
#[derive(Clone, Copy, Debug)]
pub struct Time {
    /// Mean and standard deviation of the logit of t.
    pub logit: (f64, f64),
    /// 1 - t is taken to be at least this much where it divides.
    pub floor: f32,
}

impl Default for Time {
    fn default() -> Self {
        Self { logit: (-0.8, 0.8), floor: 0.05 }
    }
}

impl Time {
    /// A time in (0, 1), by one normal draw.
    pub fn sample(&self, normal: f64) -> f32 {
        let logit = self.logit.0 + self.logit.1 * normal;
        (1.0 / (1.0 + (-logit).exp())) as f32
    }

    /// The weight of the squared error of x at a time: that of the velocity's.
    pub fn weight(&self, t: f32) -> f32 {
        (1.0 - t).max(self.floor).powi(-2)
    }
}

/// Standard normals (B, T, C), each a function of the image's stream and its place alone.
pub(super) fn noise(rngs: &[Rng], (tokens, channels): (usize, usize), device: &Device) -> Result<Tensor> {
    let count = tokens * channels;
    let values = rngs.iter().flat_map(|rng| rng.normals(count)).collect();
    Tensor::from_vec(values, (rngs.len(), tokens, channels), device)
}

/// Euler's method in equal steps from `start` at t = 0 to a picture at t = 1, where `predict` says
/// what picture it sees in z at a time. `None` if `progress` breaks.
pub(super) fn integrate(
    start: Tensor,
    steps: usize,
    predict: impl Fn(&Tensor, f32) -> Result<Tensor>,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<Tensor>> {
    let mut z = start;
    for step in 0..steps {
        let t = step as f32 / steps as f32;
        let x = predict(&z, t)?;
        // The share of what is left of the way: all of it in the last step.
        let share = 1.0 / (steps - step) as f64;
        z = ((z * (1.0 - share))? + (x * share)?)?;
        if progress(step + 1, steps).is_break() {
            return Ok(None);
        }
    }
    Ok(Some(z))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn the_noise_of_an_image_does_not_depend_on_its_batch() -> Result<()> {
        let [a, b] = [1, 2].map(|seed| Rng::new(seed, 0, Stream::Refine, 0));
        let both = noise(&[a, b], (6, 5), &Device::Cpu)?;
        let alone = noise(&[b], (6, 5), &Device::Cpu)?;
        assert_eq!(both.get(1)?.to_vec2::<f32>()?, alone.get(0)?.to_vec2::<f32>()?);
        Ok(())
    }

    /// With a perfect prediction every number of steps arrives; with that of a linear flow each
    /// step is Euler's.
    #[test]
    fn steps_are_those_of_euler() -> Result<()> {
        let start = Tensor::new(&[[3f32, -1.0]], &Device::Cpu)?;
        let goal = Tensor::new(&[[0.5f32, 0.25]], &Device::Cpu)?;
        for steps in [1, 3, 8] {
            let end = integrate(start.clone(), steps, |_, _| Ok(goal.clone()), &mut |_, _| ControlFlow::Continue(()))?;
            assert!((end.unwrap() - &goal)?.abs()?.sum_all()?.to_scalar::<f32>()? < 1e-6);
        }
        let (mut z, steps) = (3f32, 4);
        for step in 0..steps {
            let t = step as f32 / steps as f32;
            z += (0.5 * z - z) / (1.0 - t) / steps as f32;
        }
        let end = integrate(start, steps, |z, _| z * 0.5, &mut |_, _| ControlFlow::Continue(()))?.unwrap();
        assert!((end.get(0)?.get(0)?.to_scalar::<f32>()? - z).abs() < 1e-6);
        let stopped = integrate(goal.clone(), 3, |z, _| Ok(z.clone()), &mut |_, _| ControlFlow::Break(()))?;
        assert!(stopped.is_none());
        Ok(())
    }

    #[test]
    fn the_weight_is_that_of_the_velocity() {
        let time = Time::default();
        assert_eq!((time.weight(0.0), time.weight(0.5)), (1.0, 4.0));
        assert_eq!(time.weight(0.999), time.weight(1.0));
        assert!((time.sample(0.0) - 0.310).abs() < 1e-3);
    }
}

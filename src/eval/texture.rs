//! What drawn images look like close by, compared with true pictures: patches of a Laplacian
//! pyramid, edges, and the distribution of semantic features.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use crate::pixels::GridResampling;
use crate::rng::{Rng, Stream};

/// How far images are from true pictures.
#[derive(Clone, Debug, Serialize)]
pub struct Texture {
    /// Sliced Wasserstein distance between patches of the Laplacian pyramid's levels, fine to
    /// coarse, times 1000 (Karras et al., 2018, but with both sets normalised by the true pictures'
    /// statistics, so that blur counts).
    pub wasserstein: Vec<f64>,
    /// Energy of edges, relative to the true pictures'.
    pub edges: f64,
    /// Fréchet distance between the distributions of semantic features.
    pub frechet: f64,
}

impl Texture {
    /// The mean over the levels.
    pub fn mean_wasserstein(&self) -> f64 {
        self.wasserstein.iter().sum::<f64>() / self.wasserstein.len().max(1) as f64
    }
}

/// Levels of the pyramid.
const LEVELS: usize = 3;
/// Side of a patch in pixels, and patches of an image and level.
const PATCH: usize = 7;
const PATCHES: usize = 64;
const CHANNELS: usize = PATCH * PATCH * 3;
/// Directions that patches are projected on.
const DIRECTIONS: usize = 128;

/// What is kept of a set of equally large images.
#[derive(Default)]
pub struct Summary {
    /// Patches of every level, `CHANNELS` numbers each.
    levels: [Vec<f32>; LEVELS],
    edges: f64,
    features: Vec<Vec<f32>>,
}

impl Summary {
    /// Adds the RGB bytes (side, side, 3) of an image and its semantic features. The places of its
    /// patches are those of the image with the same number in another set.
    pub fn add(&mut self, rgb: &[u8], side: usize, features: Vec<f32>) {
        let mut image: Vec<f32> = rgb.iter().map(|&v| f32::from(v) / 127.5 - 1.0).collect();
        self.edges += edges(&image, side);
        let rng = Rng::new(0, self.features.len() as u64, Stream::Train, 0);
        let mut side = side;
        for (level, patches) in self.levels.iter_mut().enumerate() {
            let half = side / 2;
            let coarse = GridResampling::area((side, side), (half, half)).apply(&image, 3);
            let smooth = GridResampling::bilinear((half, half), (side, side)).apply(&coarse, 3);
            let detail: Vec<f32> = image.iter().zip(smooth).map(|(a, b)| a - b).collect();
            let rng = rng.fork(level as u64);
            for i in 0..PATCHES as u64 {
                let [x, y] = [0, 1].map(|axis| rng.below(2 * i + axis, side + 1 - PATCH));
                for row in y..y + PATCH {
                    patches.extend(&detail[3 * (row * side + x)..][..3 * PATCH]);
                }
            }
            (image, side) = (coarse, half);
        }
        self.features.push(features);
    }

    /// How far this set is from the true one.
    ///
    /// Errors: sets without images.
    pub fn texture(&self, truth: &Self) -> Result<Texture> {
        let levels = self.levels.iter().zip(&truth.levels);
        let per_image = |summary: &Self| summary.edges / summary.features.len().max(1) as f64;
        Ok(Texture {
            wasserstein: levels.map(|(a, b)| 1e3 * wasserstein(a, b)).collect(),
            edges: per_image(self) / per_image(truth),
            frechet: frechet(&self.features, &truth.features)?,
        })
    }
}

/// Mean gradient of an image's luminance.
fn edges(image: &[f32], side: usize) -> f64 {
    let luma: Vec<f32> = image.chunks_exact(3).map(|p| 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]).collect();
    let mut sum = 0.0;
    for y in 0..side - 1 {
        for x in 0..side - 1 {
            let at = y * side + x;
            let (dx, dy) = (luma[at + 1] - luma[at], luma[at + side] - luma[at]);
            sum += f64::from(dx.hypot(dy));
        }
    }
    sum / ((side - 1) * (side - 1)) as f64
}

/// Mean and standard deviation of every colour over all patches.
fn statistics(patches: &[f32]) -> [(f32, f32); 3] {
    [0, 1, 2].map(|colour| {
        let values = || patches.iter().skip(colour).step_by(3).map(|&v| f64::from(v));
        let count = (patches.len() / 3).max(1) as f64;
        let mean = values().sum::<f64>() / count;
        let variance = values().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        (mean as f32, variance.sqrt().max(1e-6) as f32)
    })
}

/// The sliced Wasserstein distance of two sets of as many patches, in standard deviations of the
/// true ones.
fn wasserstein(patches: &[f32], truth: &[f32]) -> f64 {
    let statistics = statistics(truth);
    let distance = |direction: usize| {
        let rng = Rng::new(1, direction as u64, Stream::Train, 0);
        let axis: Vec<f32> = (0..CHANNELS as u64).map(|i| rng.normal(i) as f32).collect();
        let norm = axis.iter().map(|v| v * v).sum::<f32>().sqrt();
        let axis: Vec<f32> = axis.iter().enumerate().map(|(i, v)| v / norm / statistics[i % 3].1).collect();
        let shift: f32 = axis.iter().enumerate().map(|(i, v)| v * statistics[i % 3].0).sum();
        let project = |patches: &[f32]| {
            let mut projections: Vec<f32> = patches
                .chunks_exact(CHANNELS)
                .map(|patch| patch.iter().zip(&axis).map(|(p, a)| p * a).sum::<f32>() - shift)
                .collect();
            projections.sort_unstable_by(f32::total_cmp);
            projections
        };
        let (a, b) = (project(patches), project(truth));
        a.iter().zip(&b).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / a.len().max(1) as f64
    };
    (0..DIRECTIONS).into_par_iter().map(distance).sum::<f64>() / DIRECTIONS as f64
}

/// The Fréchet distance of two Gaussians with the mean and covariance of features.
fn frechet(features: &[Vec<f32>], truth: &[Vec<f32>]) -> Result<f64> {
    let ((m1, c1), (m2, c2)) = (gaussian(features)?, gaussian(truth)?);
    let root = square_root(&c2)?;
    let both = square_root(&root.matmul(&c1)?.matmul(&root)?)?;
    let trace = |m: &Tensor| (m * Tensor::eye(m.dim(0)?, m.dtype(), m.device())?)?.sum_all()?.to_scalar::<f64>();
    let shift = (m1 - m2)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    Ok(shift + trace(&c1)? + trace(&c2)? - 2.0 * trace(&both)?)
}

/// The mean (D) and covariance (D, D) of rows, in f64.
fn gaussian(rows: &[Vec<f32>]) -> Result<(Tensor, Tensor)> {
    let count = rows.len();
    let values: Vec<f64> = rows.iter().flatten().map(|&v| f64::from(v)).collect();
    let x = Tensor::from_vec(values, (count, rows.first().map_or(0, Vec::len)), &Device::Cpu)?;
    let mean = x.mean(0)?;
    let centred = x.broadcast_sub(&mean)?;
    Ok((mean, (centred.t()?.matmul(&centred)? / (count.max(2) - 1) as f64)?))
}

/// The square root of a symmetric positive semidefinite matrix, by Newton and Schulz's coupled
/// iteration.
fn square_root(m: &Tensor) -> Result<Tensor> {
    let eye = Tensor::eye(m.dim(0)?, m.dtype(), m.device())?;
    let norm = m.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt().max(1e-300);
    // Directions without any variance would keep the iteration from ending.
    let (mut y, mut z) = (((m / norm)? + (&eye * 1e-12)?)?, eye.clone());
    for _ in 0..60 {
        let step = (((&eye * 3.0)? - z.matmul(&y)?)? * 0.5)?;
        (y, z) = (y.matmul(&step)?, step.matmul(&z)?);
    }
    y * norm.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random images with blocks of so many pixels.
    fn noise(seed: u64, block: usize) -> Summary {
        let mut summary = Summary::default();
        for image in 0..12 {
            let rng = Rng::new(seed, image, Stream::Train, 0);
            let side = 64;
            let value = |i: usize| {
                let (pixel, colour) = (i / 3, i % 3);
                let place = (pixel / side / block * side + pixel % side / block) * 3 + colour;
                (rng.uniform(place as u64) * 255.0) as u8
            };
            let rgb: Vec<u8> = (0..side * side * 3).map(value).collect();
            summary.add(&rgb, side, (0..4).map(|i| rng.normal(1 << 40 | i) as f32).collect());
        }
        summary
    }

    #[test]
    fn blur_counts_and_another_draw_of_the_same_does_not() -> Result<()> {
        let truth = noise(1, 1);
        let (same, blurred) = (noise(2, 1).texture(&truth)?, noise(3, 4).texture(&truth)?);
        assert!(same.wasserstein[0] < 0.2 * blurred.wasserstein[0], "{same:?} {blurred:?}");
        assert!((same.edges - 1.0).abs() < 0.05 && blurred.edges < 0.6, "{same:?} {blurred:?}");
        let itself = truth.texture(&truth)?;
        assert!(itself.mean_wasserstein() == 0.0 && itself.frechet.abs() < 1e-3, "{itself:?}");
        Ok(())
    }

    /// Two Gaussians with diagonal covariances: the sum of (m1 - m2)^2 and (s1 - s2)^2.
    #[test]
    fn the_frechet_distance_is_that_of_gaussians() -> Result<()> {
        let rows = |scale: [f32; 2], shift: f32| -> Vec<Vec<f32>> {
            [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)]
                .iter()
                .map(|(a, b)| vec![a * scale[0] + shift, b * scale[1]])
                .collect()
        };
        let spread = |s: f64| (4.0 * s * s / 3.0).sqrt();
        let expected = 0.25 + (spread(1.0) - spread(3.0)).powi(2) + (spread(2.0) - spread(0.5)).powi(2);
        let found = frechet(&rows([1.0, 2.0], 0.5), &rows([3.0, 0.5], 0.0))?;
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        Ok(())
    }
}

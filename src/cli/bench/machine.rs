//! The peak of this machine, measured in the same run as the model.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

use crate::checkpoint::Matrices;
use crate::error::Result;
use crate::ops::{Int8Matrix, WeightMatrix};

/// Peak throughput of this machine.
pub struct Machine {
    /// Floating-point operations a second of a large matrix product.
    pub flops: f64,
    /// Bytes a second of reading memory, or of copying a GPU's.
    pub bandwidth: f64,
}

impl Machine {
    /// Measures matrix products in f32, in `dtype` on a GPU, or in int8 for int8 weights. Takes
    /// about a second.
    pub fn measure(device: &Device, dtype: DType, matrices: Matrices) -> Result<Self> {
        // Large enough for all of a GPU, and a second's work for a CPU.
        let side = if device.is_cpu() { 2048 } else { 8192 };
        let random = || Tensor::randn(0f32, 1.0, (side, side), device)?.to_dtype(dtype);
        let w = match matrices {
            Matrices::Bytes => {
                let bytes = (0..side * side).map(|i| (i % 251) as u8).collect();
                WeightMatrix::Int8(Int8Matrix::new(bytes, &vec![0.01; side], (side, side))?)
            }
            _ => WeightMatrix::Dense(random()?),
        };
        let x = random()?;
        let product = || -> Result<()> {
            w.linear(&x, None)?;
            Ok(device.synchronize()?)
        };
        let flops = 2.0 * (side as f64).powi(3) / best(product)?.as_secs_f64();
        if !device.is_cpu() {
            let numbers = Tensor::zeros(1 << 28, DType::F32, device)?;
            let copy = || -> Result<()> {
                numbers.copy()?;
                Ok(device.synchronize()?)
            };
            let bandwidth = (2 * 4 * numbers.elem_count()) as f64 / best(copy)?.as_secs_f64();
            return Ok(Self { flops, bandwidth });
        }
        use rayon::prelude::*;
        let numbers = vec![1u64; 1 << 25];
        let sum = || -> Result<()> {
            let sum: u64 =
                numbers.par_chunks(1 << 16).map(|part| part.iter().fold(0u64, |a, b| a.wrapping_add(*b))).sum();
            std::hint::black_box(sum);
            Ok(())
        };
        let bandwidth = (numbers.len() * 8) as f64 / best(sum)?.as_secs_f64();
        Ok(Self { flops, bandwidth })
    }

    /// The shortest time of a pass: its arithmetic, or reading the weights.
    pub fn floor(&self, flops: f64, weights: u64) -> f64 {
        (flops / self.flops).max(weights as f64 / self.bandwidth)
    }
}

/// The best of a few runs.
fn best(mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..7 {
        let started = Instant::now();
        run()?;
        best = best.min(started.elapsed());
    }
    Ok(best)
}

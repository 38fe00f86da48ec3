//! The peak of this machine, measured in the same run as the model.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

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
    /// a few seconds.
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
        let operations = 2.0 * (side as f64).powi(3);
        if !device.is_cpu() {
            let numbers = Tensor::zeros(1 << 28, DType::F32, device)?;
            let copy = || -> Result<()> {
                numbers.copy()?;
                Ok(device.synchronize()?)
            };
            let bandwidth = (2 * 4 * numbers.elem_count()) as f64 / best(copy)?.as_secs_f64();
            return Ok(Self { flops: operations / best(product)?.as_secs_f64(), bandwidth });
        }
        // More than the caches of any processor hold.
        let numbers = vec![1u64; 1 << 26];
        let (mut computing, mut reading) = (Duration::MAX, Duration::MAX);
        // In turn, for other work on the machine comes and goes. A thread reads faster or slower
        // from several places at once, by the processor.
        for streams in STREAMS.into_iter().cycle().take(2 * STREAMS.len()) {
            computing = computing.min(best(product)?);
            reading = reading.min(best(|| {
                std::hint::black_box(sum(&numbers, streams));
                Ok(())
            })?);
        }
        let bandwidth = (numbers.len() * 8) as f64 / reading.as_secs_f64();
        Ok(Self { flops: operations / computing.as_secs_f64(), bandwidth })
    }

    /// The shortest time of a pass: its arithmetic, or reading the weights.
    pub fn floor(&self, flops: f64, weights: u64) -> f64 {
        (flops / self.flops).max(weights as f64 / self.bandwidth)
    }
}

/// Places of memory that a thread reads in turn.
const STREAMS: [usize; 3] = [1, 2, 4];

/// The sum of all numbers, of which every thread reads an equal part from `streams` places.
fn sum(numbers: &[u64], streams: usize) -> u64 {
    /// Numbers from one place at a time: a page.
    const PIECE: usize = 512;
    let part = |part: &[u64]| {
        let places: Vec<&[u64]> = part.chunks(part.len().div_ceil(streams)).collect();
        let pieces = (0..places[0].len()).step_by(PIECE);
        let pieces = pieces.flat_map(|at| places.iter().filter_map(move |place| place.get(at..)));
        let sum = |piece: &[u64]| piece.iter().take(PIECE).fold(0, |a: u64, b| a.wrapping_add(*b));
        pieces.fold(0, |total: u64, piece| total.wrapping_add(sum(piece)))
    };
    numbers.par_chunks(numbers.len().div_ceil(rayon::current_num_threads())).map(part).reduce(|| 0, u64::wrapping_add)
}

/// The best of a few runs.
fn best(mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let started = Instant::now();
        run()?;
        best = best.min(started.elapsed());
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_read_once() {
        for count in [1, 511, 4096, 100_003] {
            let numbers: Vec<u64> = (1..=count).collect();
            for streams in STREAMS {
                assert_eq!(sum(&numbers, streams), count * (count + 1) / 2, "{count} from {streams} places");
            }
        }
    }
}

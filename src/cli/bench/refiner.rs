//! Measures the diffusion decoder: every step of a refinement, against the arithmetic of its
//! products.

use std::ops::ControlFlow;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;

use super::machine::Machine;
use super::{BenchArgs, gb};
use crate::checkpoint::{Matrices, WeightType, Weights};
use crate::cli::run::{Load, Run};
use crate::error::{Error, Result};
use crate::generate::{Size, cost};
use crate::memory;
use crate::refiner::{Captions, Condition, Refiner, RefinerConfig};
use crate::rng::{Rng, Stream};
use crate::terminal::{self, Level};

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    weights: Option<WeightType>,
    parameters: usize,
    weight_bytes: u64,
    load_seconds: f64,
    /// (width, height) of the refined image, in pixels.
    size: (usize, usize),
    batch: usize,
    steps: usize,
    /// Of the condition, and of every step.
    condition_seconds: f64,
    step_seconds: Vec<f64>,
    /// Matrix product as measured here, and the share of it that a step of median time reaches.
    peak_gflops: f64,
    share_of_peak: f64,
    forecast_bytes: u64,
    peak_bytes: Option<u64>,
}

/// Refines an image of random codes with random weights.
pub(super) fn run(args: &BenchArgs, name: &str, config: &RefinerConfig, usual: usize) -> Result<()> {
    let device = args.device.get()?;
    let (width, height) = match args.size.parse()? {
        Size::Auto => (usual, usual),
        Size::Pixels { width, height } => (width as usize, height as usize),
        Size::Ratio(_) => return Err(Error::usage("the refiner's size is in pixels").hint("--size 512x512")),
    };
    let cell = config.code_cell * config.upscale;
    if width % cell > 0 || height % cell > 0 || width.min(height) < cell || width.max(height) > 1 << 13 {
        return Err(Error::usage(format!("{width}x{height} is not a multiple of {cell} pixels from {cell} to 8192"))
            .hint(format!("--size {usual}x{usual}")));
    }
    let (h, w, batch) = (height / cell, width / cell, args.batch as usize);
    let (dtype, matrices) = match (args.quant, device.is_cpu()) {
        // The built-in one is stored as bytes.
        (None, true) if name == "nano-refiner" => (DType::F32, Matrices::Bytes),
        (quant, cpu) => quant.unwrap_or(WeightType::F32).placed(cpu),
    };
    let requested = Weights::inventory();
    Refiner::load(&requested, config)?;
    let weight_bytes = requested.bytes(dtype, matrices);
    let forecast = weight_bytes + config.activations(&[(h, w)], batch) + cost::PROGRAM;
    let smaller = "--quant q8_0, or a smaller --size or --batch";
    let Run { stop, .. } = Load { source: None, device: &device, peak: forecast, smaller }.start(Level::Quiet, 1)?;

    let started = Instant::now();
    let refiner = Refiner::load(&Weights::synthetic(dtype, &device).with_matrices(matrices), config)?;
    let load_seconds = started.elapsed().as_secs_f64();
    let (condition, captions, condition_seconds) =
        condition(config, (batch, h, w), args.prompt.unwrap_or(16), &device)?;
    let rngs: Vec<Rng> = (0..args.batch).map(|seed| Rng::new(seed.into(), 0, Stream::Refine, 0)).collect();
    let mut marks = vec![Instant::now()];
    refiner.refine(&condition, &captions, &rngs, config.steps, &mut |_, _| {
        // A GPU may have done less than it was asked for; a fault shows in the result.
        let _ = device.synchronize();
        marks.push(Instant::now());
        if stop.check().is_break() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let step_seconds: Vec<f64> = marks.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
    let mut sorted = step_seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let peak_bytes = memory::peak(&device);
    let machine = Machine::measure(&device, dtype, matrices)?;
    let step = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
    let report = Report {
        model: name.into(),
        weights: args.quant,
        parameters: requested.requested().values().map(|shape| shape.iter().product::<usize>()).sum(),
        weight_bytes,
        load_seconds,
        size: (width, height),
        batch,
        steps: config.steps,
        condition_seconds,
        step_seconds,
        peak_gflops: machine.flops / 1e9,
        share_of_peak: config.flops(&[(h, w)], batch) / step / machine.flops,
        forecast_bytes: forecast,
        peak_bytes,
    };
    let _ = match args.json {
        true => terminal::emit_json(&report)?,
        false => terminal::emit(report.table().as_bytes())?,
    };
    Ok(())
}

/// A random condition, a caption of so many tokens, and how long the condition took.
fn condition(
    config: &RefinerConfig,
    (batch, h, w): (usize, usize, usize),
    words: u32,
    device: &Device,
) -> Result<(Condition, Captions, f64)> {
    let random = |shape: &[usize]| Tensor::randn(0f32, 0.5, shape, device);
    let picture = random(&[batch, 3, h * config.code_cell, w * config.code_cell])?;
    let (f, semantic) = (random(&[batch, h, w, config.code_dim])?, random(&[batch, h * w, config.semantic_dim])?);
    let started = Instant::now();
    let condition = Condition::new(&picture, &f, &semantic, config)?;
    device.synchronize()?;
    let seconds = started.elapsed().as_secs_f64();
    let caption: Vec<u32> = (0..words).map(|i| i % config.caption.vocab_size as u32).collect();
    Ok((condition, Captions::new(&vec![&caption[..]; batch], &config.caption, device)?, seconds))
}

impl Report {
    fn table(&self) -> String {
        let weights = self.weights.map_or(String::new(), |w| format!(" in {w}"));
        let steps: Vec<String> = self.step_seconds.iter().map(|seconds| format!("{:.1}", 1e3 * seconds)).collect();
        let all = self.condition_seconds + self.step_seconds.iter().sum::<f64>();
        format!(
            "{}, {:.3} B parameters{weights}, {} of weights, made in {:.1} s\n\n\
             condition {:.1} ms, steps {} ms\n\
             {} of {}x{} in {} steps: {all:.2} s · {:.0}% of the {:.0} GFLOP/s that this machine computes\n\
             peak memory {}, forecast {}\n",
            self.model,
            self.parameters as f64 / 1e9,
            gb(self.weight_bytes),
            self.load_seconds,
            1e3 * self.condition_seconds,
            steps.join(" "),
            self.batch,
            self.size.0,
            self.size.1,
            self.steps,
            100.0 * self.share_of_peak,
            self.peak_gflops,
            self.peak_bytes.map_or("unknown".into(), gb),
            gb(self.forecast_bytes),
        )
    }
}

//! Measures Z-Image-Turbo as a refiner: the autoencoder and every pass of the transformer.

use std::ops::ControlFlow;
use std::time::Instant;

use candle_core::Tensor;
use serde::Serialize;

use super::{BenchArgs, gb};
use crate::checkpoint::WeightType;
use crate::cli::args::REFINE_STRENGTH;
use crate::cli::run::{Load, Run};
use crate::error::{Error, Result};
use crate::generate::{Size, cost};
use crate::memory;
use crate::terminal::{self, Level};
use crate::z_image::{DTYPE, MULTIPLE, Memory, ZImage, ZImageConfig, with_noise};

#[derive(Debug, Serialize)]
struct Report {
    model: &'static str,
    weights: WeightType,
    load_seconds: f64,
    /// (width, height) in pixels.
    size: (usize, usize),
    /// Of the autoencoder's halves, of reading the features of the text, and of every pass.
    encode_seconds: f64,
    text_seconds: f64,
    pass_seconds: Vec<f64>,
    decode_seconds: f64,
    /// Of encoding the text and of refining.
    forecast: Memory,
    forecast_bytes: u64,
    peak_bytes: Option<u64>,
}

/// Refines a random image with random weights, without the text encoder.
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    let device = args.device.get()?;
    if args.quant.is_some_and(|weights| weights != WeightType::Bf16) {
        return Err(Error::usage("z-image-turbo is computed in bf16 only").hint("leave out --quant"));
    }
    let (width, height) = match args.size.parse()? {
        Size::Auto => (1024, 1024),
        Size::Pixels { width, height } => (width as usize, height as usize),
        Size::Ratio(_) => return Err(Error::usage("the refiner's size is in pixels").hint("--size 512x512")),
    };
    let (config, step) = (ZImageConfig::turbo(), MULTIPLE as usize);
    let most = config.largest() as usize;
    if [width, height].iter().any(|side| !side.is_multiple_of(step) || !(step..=most).contains(side)) {
        let message = format!("{width}x{height} is not a multiple of {step} pixels from {step} to {most}");
        return Err(Error::usage(message).hint("--size 1024x1024"));
    }
    let text_tokens = args.prompt.unwrap_or(32) as usize;
    let forecast = config.memory((width as u32, height as u32), text_tokens, &device)?;
    let forecast_bytes = forecast.refining + cost::PROGRAM;
    let load = Load { source: None, device: &device, peak: forecast_bytes, smaller: "a smaller --size" };
    let Run { stop, .. } = load.start(Level::Quiet, 1)?;
    let started = Instant::now();
    let model = ZImage::synthetic(&config, DTYPE, &device)?;
    let load_seconds = started.elapsed().as_secs_f64();

    let mut last = Instant::now();
    let mut lap = || {
        // A GPU may have done less than it was asked for; a fault shows in the result.
        let _ = device.synchronize();
        let now = Instant::now();
        (now - std::mem::replace(&mut last, now)).as_secs_f64()
    };
    let latents = (1, config.vae.latent_channels, height / 8, width / 8);
    let noise = Tensor::randn(0f32, 1f32, latents, &device)?;
    let picture = Tensor::randn(0f32, 0.5f32, (1, 3, height, width), &device)?;
    let features = Tensor::randn(0f32, 1f32, (text_tokens, config.text.hidden_size), &device)?;
    lap();
    let encoded = model.vae().encode(&picture, &noise)?;
    let encode_seconds = lap();
    let prompt = model.transformer().read(&features)?;
    let text_seconds = lap();
    let sigmas = config.schedule.sigmas(REFINE_STRENGTH);
    let start = with_noise(&encoded, &noise, sigmas[0])?;
    let mut pass_seconds = Vec::new();
    let refined = model.denoise(start, &prompt, &sigmas, &mut |_, _| {
        pass_seconds.push(lap());
        if stop.check().is_break() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let Some(refined) = refined else { return Err(terminal::interrupted()) };
    lap();
    model.vae().decode(&refined)?;
    let decode_seconds = lap();
    let report = Report {
        model: "z-image-turbo",
        weights: WeightType::Bf16,
        load_seconds,
        size: (width, height),
        encode_seconds,
        text_seconds,
        pass_seconds,
        decode_seconds,
        forecast,
        forecast_bytes,
        peak_bytes: memory::peak(&device),
    };
    match args.json {
        true => terminal::emit_json(&report).map(drop),
        false => terminal::emit(report.table().as_bytes()).map(drop),
    }
}

impl Report {
    fn table(&self) -> String {
        let passes: Vec<String> = self.pass_seconds.iter().map(|seconds| format!("{seconds:.2}")).collect();
        let all = self.encode_seconds + self.text_seconds + self.pass_seconds.iter().sum::<f64>() + self.decode_seconds;
        format!(
            "{} in bf16, weights made in {:.1} s, without the text encoder\n\n\
             autoencoder {:.2} s in and {:.2} s out, text {:.2} s, passes {} s\n\
             {}x{} in {} passes: {all:.2} s\n\
             peak memory {}, forecast {} (text encoder {})\n",
            self.model,
            self.load_seconds,
            self.encode_seconds,
            self.decode_seconds,
            self.text_seconds,
            passes.join(" "),
            self.size.0,
            self.size.1,
            self.pass_seconds.len(),
            self.peak_bytes.map_or("unknown".into(), gb),
            gb(self.forecast_bytes),
            gb(self.forecast.text),
        )
    }
}

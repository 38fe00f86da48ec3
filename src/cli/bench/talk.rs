//! A model that talks: an image, a prompt, and an answer word by word.

use std::fmt::Write;
use std::time::Instant;

use candle_core::Tensor;
use serde::Serialize;

use super::machine::Machine;
use super::{BenchArgs, gb};
use crate::backbone::sequence::Layout;
use crate::backbone::{Backbone, BackboneConfig, Cache, Context, Rope, Step};
use crate::chat::{ChatConfig, Reader as Networks};
use crate::checkpoint::{WeightType, Weights};
use crate::error::{Error, Result};
use crate::generate::cost;
use crate::size::Size;
use crate::vision::{Patches, VisionConfig};
use crate::{memory, terminal};

#[derive(Debug, Serialize)]
struct Report {
    model: &'static str,
    weights: Option<WeightType>,
    parameters: u64,
    weight_bytes: u64,
    load_seconds: f64,
    parts: Vec<Part>,
    /// Matrix product in the type of the activations, as measured here.
    peak_gflops: f64,
    /// Reading of memory, or copying a GPU's, as measured here.
    read_gbytes_per_second: f64,
    forecast_bytes: u64,
    peak_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Part {
    name: &'static str,
    tokens: usize,
    seconds: f64,
    floor_seconds: f64,
}

/// Reads an image, if there are eyes, and a prompt, and answers.
pub(super) fn run(
    args: &BenchArgs,
    model: &'static str,
    transformer: BackboneConfig,
    eyes: Option<VisionConfig>,
) -> Result<()> {
    let device = args.device.get()?;
    let config = ChatConfig::synthetic(transformer, eyes.clone());
    let processor = config.vision.as_ref().map(|(_, processor)| processor);
    let image = match (eyes.as_ref().zip(processor), args.size.parse()?) {
        (None, Size::Auto) => None,
        (None, _) => return Err(Error::usage(format!("{model} sees no images")).hint("leave out --size")),
        (Some((eyes, processor)), size) => {
            let pixels = match size {
                Size::Auto => (448, 448),
                Size::Ratio(ratio) => (448, (448.0 * ratio) as u32),
                Size::Pixels { width, height } => (width.min(8192) as u32, height.min(8192) as u32),
            };
            Some((processor.tokens(pixels, eyes)?, eyes))
        }
    };
    let (prompt, words) = (args.prompt.unwrap_or(512) as usize, args.words as usize);
    let seen = image.as_ref().map_or(0, |((h, w), _)| h * w);
    let total = seen + prompt + words;
    let forecast = config.memory(None, args.quant, total, image.as_ref().map(|(grid, _)| *grid), &device)?;
    memory::check(forecast.peak(), &device, "--quant q8_0, --quant q4_K, or a smaller --size")?;
    let (dtype, matrices) = args.quant.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
    let stop = terminal::interrupts()?;
    let started = Instant::now();
    let reader = config.build(&Weights::synthetic(dtype, &device).with_matrices(matrices))?;
    let Networks::Backbone(backbone, tower) = reader else { return Ok(()) };
    let load_seconds = started.elapsed().as_secs_f64();

    let mut parts = Vec::new();
    let (mut layout, mut features) = (Layout::new(), None);
    if let (Some(tower), Some((grid, eyes))) = (&tower, &image) {
        let pixels = 3 * (eyes.patch_size * eyes.spatial_merge_size).pow(2);
        let values = (0..seen * pixels).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
        let started = Instant::now();
        features = Some(tower.forward(&Patches { values, tokens: *grid })?);
        device.synchronize()?;
        parts.push(("image", seen, started.elapsed().as_secs_f64(), eyes.flops(*grid)));
        layout.push_patches(*grid);
    }
    layout.push_text(prompt + words);
    let mut reader =
        Reader { cache: Cache::new(&config.backbone, total, dtype, &device)?, backbone: &backbone, layout };
    let ids: Vec<u32> = (0..prompt as u32).collect();
    let text = backbone.embed_text(&Tensor::new(ids, &device)?.unsqueeze(0)?)?;
    let x = match features {
        Some(features) => Tensor::cat(&[&features.unsqueeze(0)?.to_dtype(dtype)?, &text], 1)?,
        None => text,
    };
    let started = Instant::now();
    let mut word = reader.read(&x)?;
    let flops = cost::flops(&config.backbone, 1, seen + prompt, 0, 0);
    parts.push(("prompt", seen + prompt, started.elapsed().as_secs_f64(), flops));
    let started = Instant::now();
    for _ in 0..words {
        word = reader.read(&backbone.embed_text(&Tensor::new(&[[word]], &device)?)?)?;
        if stop.check().is_break() {
            return Err(terminal::interrupted());
        }
    }
    parts.push(("words", words, started.elapsed().as_secs_f64(), 0.0));
    let peak_bytes = memory::peak(&device);

    let machine = Machine::measure(&device, dtype, matrices)?;
    let read = tower.as_ref().map_or(0, |_| config.vision_bytes(dtype, matrices));
    let parts = parts.into_iter().map(|(name, tokens, seconds, flops)| {
        let floor_seconds = match name {
            // All weights are read for every word.
            "words" => tokens as f64 * machine.floor(0.0, forecast.weights - read),
            _ => machine.floor(flops, 0),
        };
        Part { name, tokens, seconds, floor_seconds }
    });
    let eyes = eyes.as_ref().map_or(0, VisionConfig::parameters);
    let report = Report {
        model,
        weights: args.quant,
        parameters: (config.backbone.parameters() + eyes) as u64,
        weight_bytes: forecast.weights,
        load_seconds,
        parts: parts.collect(),
        peak_gflops: machine.flops / 1e9,
        read_gbytes_per_second: machine.bandwidth / 1e9,
        forecast_bytes: forecast.peak(),
        peak_bytes,
    };
    let _ = match args.json {
        true => terminal::emit_json(&report)?,
        false => terminal::emit(report.table().as_bytes())?,
    };
    Ok(())
}

struct Reader<'a> {
    backbone: &'a Backbone,
    cache: Cache,
    layout: Layout,
}

impl Reader<'_> {
    /// Reads tokens (1, T, hidden); the likeliest next word.
    fn read(&mut self, x: &Tensor) -> Result<u32> {
        let (start, tokens) = (self.cache.len(), x.dim(1)?);
        let rope = Rope::new(self.backbone.config(), &[&self.layout.positions[start..start + tokens]], x.device())?;
        let context = Context::Cached { caches: std::slice::from_mut(&mut self.cache), step: Step::Text };
        let hidden = self.backbone.forward(x, &rope, context)?.narrow(1, tokens - 1, 1)?.contiguous()?;
        Ok(self.backbone.text_logits(&hidden)?.flatten_all()?.argmax(0)?.to_scalar()?)
    }
}

impl Report {
    fn table(&self) -> String {
        let weights = self.weights.map_or(String::new(), |w| format!(" in {w}"));
        let mut text = format!(
            "{}, {:.2} B parameters{weights}, {} of weights, made in {:.1} s\n\n{:<8} {:>7} {:>10} {:>10} {:>10} {:>9}\n",
            self.model,
            self.parameters as f64 / 1e9,
            gb(self.weight_bytes),
            self.load_seconds,
            "",
            "tokens",
            "ms",
            "tokens/s",
            "floor ms",
            "of floor",
        );
        for Part { name, tokens, seconds, floor_seconds } in &self.parts {
            let (speed, share) = (*tokens as f64 / seconds, 100.0 * floor_seconds / seconds);
            let (ms, floor) = (1e3 * seconds, 1e3 * floor_seconds);
            let _ = writeln!(text, "{name:<8} {tokens:>7} {ms:>10.1} {speed:>10.1} {floor:>10.1} {share:>8.0}%");
        }
        let read = format!(" and reads {:.1} GB/s", self.read_gbytes_per_second);
        let _ = writeln!(text, "\nthis machine computes {:.0} GFLOP/s{read}", self.peak_gflops);
        let peak = self.peak_bytes.map_or("unknown".into(), gb);
        let _ = writeln!(text, "peak memory {peak}, forecast {}", gb(self.forecast_bytes));
        text
    }
}

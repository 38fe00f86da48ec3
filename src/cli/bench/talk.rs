//! A model that generates text: an image, a prompt, and an answer token by token.

use std::fmt::Write;
use std::time::Instant;

use candle_core::Tensor;
use serde::Serialize;

use super::machine::Machine;
use super::{BenchArgs, gb, onecat};
use crate::backbone::{Cache, Layout, Step};
use crate::chat::{ChatConfig, ImageEncoder, Reader};
use crate::checkpoint::{WeightType, Weights};
use crate::cli::run::{Load, Run};
use crate::error::{Error, Kind, Result};
use crate::generate::{Size, cost};
use crate::memory;
use crate::terminal::{self, Level, Stop};
use crate::vision::Patches;

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

/// Reads an image, if there is something that reads images, and a prompt, and answers.
pub(super) fn run(args: &BenchArgs, model: &'static str, config: &ChatConfig) -> Result<()> {
    let device = args.device.get()?;
    let image = image_size(args, model, config)?.map(|size| config.image_tokens(size)).transpose()?;
    let (prompt, words) = (args.prompt.unwrap_or(512) as usize, args.words as usize);
    let seen = image.map_or(0, |(_, tokens)| tokens);
    let total = seen + prompt + words;
    let forecast = config.memory(None, args.quant, total, image.map(|(grid, _)| grid), &device)?;
    let load = Load {
        source: None,
        device: &device,
        peak: forecast.peak(),
        smaller: "--quant q8_0, --quant q4_K, or a smaller --size",
    };
    let Run { stop, .. } = load.start(Level::Quiet, 1)?;
    let (dtype, matrices) = args.quant.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
    let started = Instant::now();
    let reader = config.build(&Weights::synthetic(dtype, &device).with_matrices(matrices))?;
    let load_seconds = started.elapsed().as_secs_f64();

    let mut parts = Vec::new();
    let (mut layout, mut features) = (Layout::new(), None);
    if let Some((grid, tokens)) = image {
        let started = Instant::now();
        let (encoded, flops) = encode(&reader, config, grid)?;
        device.synchronize()?;
        parts.push(("image", seen, started.elapsed().as_secs_f64(), flops));
        match &reader {
            Reader::Backbone(..) => layout.push_patches(grid),
            Reader::OneCat(..) => layout.push_text(tokens),
        }
        features = Some(encoded);
    }
    layout.push_text(prompt + words);
    let mut answer = Answer { cache: reader.cache(total)?, reader: &reader, layout };
    let ids: Vec<u32> = (0..prompt as u32).collect();
    let text = reader.embed_text(&Tensor::new(ids, &device)?.unsqueeze(0)?)?;
    let features = features.map(|features| features.unsqueeze(0)?.to_dtype(dtype)).transpose()?;
    let (read_seconds, words_seconds) = answer.generate(features, &text, words, &stop)?;
    let flops = cost::flops(&config.backbone, 1, seen + prompt, 0, 0);
    parts.push(("prompt", seen + prompt, read_seconds, flops));
    parts.push(("words", words, words_seconds, 0.0));
    let peak_bytes = memory::peak(&device);

    let machine = Machine::measure(&device, dtype, matrices)?;
    let unread = config.vision_bytes(dtype, matrices);
    let parts = parts.into_iter().map(|(name, tokens, seconds, flops)| {
        let floor_seconds = match name {
            // Every token reads all weights of text.
            "words" => tokens as f64 * machine.floor(0.0, forecast.weights - unread),
            _ => machine.floor(flops, 0),
        };
        Part { name, tokens, seconds, floor_seconds }
    });
    let requested = Weights::inventory();
    config.build(&requested)?;
    let report = Report {
        model,
        weights: args.quant,
        parameters: requested.requested().values().map(|shape| shape.iter().map(|&n| n as u64).product::<u64>()).sum(),
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

/// Pixels (width, height) of the image that is read; none for a model of text alone.
///
/// Errors: usage, for a size that such a model is given.
fn image_size(args: &BenchArgs, model: &str, config: &ChatConfig) -> Result<Option<(u32, u32)>> {
    let usual: u32 = match (&config.vision, args.size.parse()?) {
        (None, Size::Auto) => return Ok(None),
        (None, _) => return Err(Error::usage(format!("{model} reads no images")).hint("leave out --size")),
        (Some(_), Size::Pixels { width, height }) => {
            return Ok(Some((width.min(8192) as u32, height.min(8192) as u32)));
        }
        (Some((ImageEncoder::Tower(_), _)), _) => 448,
        (Some((ImageEncoder::Patches(_), _)), _) => 512,
    };
    Ok(Some(match args.size.parse()? {
        Size::Ratio(ratio) => (usual, (f64::from(usual) * ratio) as u32),
        _ => (usual, usual),
    }))
}

/// Features of a made-up image of a grid (height, width) of tokens, and the operations that they
/// take.
fn encode(reader: &Reader, config: &ChatConfig, grid: (usize, usize)) -> Result<(Tensor, f64)> {
    match (reader, &config.vision) {
        (Reader::Backbone(_, Some(tower)), Some((ImageEncoder::Tower(eyes), _))) => {
            let pixels = 3 * (eyes.patch_size * eyes.spatial_merge_size).pow(2);
            let values = (0..grid.0 * grid.1 * pixels).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
            Ok((tower.forward(&Patches { values, tokens: grid })?, eyes.flops(grid)))
        }
        (Reader::OneCat(_, reading), Some((ImageEncoder::Patches(config), _))) => {
            let thumbnail = (config.thumbnail_tokens().isqrt(), config.thumbnail_tokens().isqrt());
            let parts = [grid, thumbnail].map(|grid| onecat::synthetic(config, grid));
            let (tokens, hidden) = (grid.0 * grid.1 + config.thumbnail_tokens(), config.transformer.hidden_size);
            let patch = 4 * config.patch_width * (3 * config.patch_size.pow(2) + hidden);
            Ok((reading.features(&parts)?, 2.0 * (tokens * (patch + hidden * hidden)) as f64))
        }
        _ => Err(Error::new(Kind::Failure, "nothing reads images")),
    }
}

/// A conversation that is read and answered.
struct Answer<'a> {
    reader: &'a Reader,
    cache: Cache,
    layout: Layout,
}

impl Answer<'_> {
    /// Reads an image, if there is one, and a prompt, both (1, T, hidden), then generates `tokens`
    /// tokens. Returns the seconds of both.
    fn generate(&mut self, image: Option<Tensor>, prompt: &Tensor, tokens: usize, stop: &Stop) -> Result<(f64, f64)> {
        let started = Instant::now();
        let mut token = match (image, self.reader) {
            (Some(image), Reader::Backbone(..)) => self.read(&Tensor::cat(&[&image, prompt], 1)?, Step::Text)?,
            (Some(image), Reader::OneCat(..)) => {
                self.read(&image, Step::Scale)?;
                self.read(prompt, Step::Text)?
            }
            (None, _) => self.read(prompt, Step::Text)?,
        };
        let read = started.elapsed();
        for _ in 0..tokens {
            let ids = Tensor::new(&[[token]], prompt.device())?;
            token = self.read(&self.reader.embed_text(&ids)?, Step::Text)?;
            if stop.check().is_break() {
                return Err(terminal::interrupted());
            }
        }
        Ok((read.as_secs_f64(), (started.elapsed() - read).as_secs_f64()))
    }

    /// Reads tokens (1, T, hidden). Returns the most likely next token.
    fn read(&mut self, x: &Tensor, step: Step) -> Result<u32> {
        let (start, tokens) = (self.cache.len(), x.dim(1)?);
        let positions = &self.layout.positions[start..start + tokens];
        let hidden = self.reader.read(x, positions, &mut self.cache, step)?.narrow(1, tokens - 1, 1)?.contiguous()?;
        Ok(self.reader.text_logits(&hidden)?.flatten_all()?.argmax(0)?.to_scalar()?)
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

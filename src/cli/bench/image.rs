//! A model that draws: one image.

use std::fmt::Write;
use std::time::Instant;

use candle_core::{DType, Device};
use serde::Serialize;

use super::machine::Machine;
use super::{BenchArgs, Shape, gb};
use crate::backbone::Backbone;
use crate::backbone::presets::QWEN2_5_VL_7B;
use crate::checkpoint::{Matrices, WeightType, Weights};
#[cfg(feature = "nano")]
use crate::checkpoint::{Source, TRANSFORMER};
use crate::cli::run::{Load, Run};
use crate::error::Result;
use crate::generate::cost::{self, Work};
use crate::generate::next_input::NextInput;
use crate::generate::{Batch, Event, ModelConfig, Prefix, Size, draw_after, tokenflow};
use crate::memory;
use crate::terminal::{self, Level, Stop};
use crate::tokenizer::{ImageDecoder, Preset, TokenizerConfig, VitConfig};

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    weights: Option<WeightType>,
    parameters: u64,
    weight_bytes: u64,
    load_seconds: f64,
    parts: Vec<Part>,
    decode_seconds: f64,
    /// Images that are drawn at once, in the times above.
    batch: u32,
    /// Prompt, scales and pixels of one of them.
    image_seconds: f64,
    tokens_per_second: f64,
    /// Matrix product in the type of the activations, as measured here.
    peak_gflops: f64,
    /// Reading of memory, or copying a GPU's, as measured here.
    read_gbytes_per_second: f64,
    /// Of one image without its pixels.
    floor_seconds: f64,
    /// Of the time of prompt and scales.
    share_of_floor: f64,
    forecast_bytes: u64,
    /// Of the process, or of the tensors on a GPU.
    peak_bytes: Option<u64>,
    /// How much more memory is taken after the last image than after the second one.
    growth_bytes: Option<i64>,
}

/// How one image went.
#[derive(Clone)]
struct Image {
    /// Of the prompt, every scale, and the pixels.
    seconds: Vec<f64>,
    /// Bytes of memory that were taken since before the model was loaded.
    taken: Option<u64>,
}

impl Image {
    fn total(&self) -> f64 {
        self.seconds.iter().sum()
    }
}

/// The prompt, or a scale with all its passes.
#[derive(Debug, Serialize)]
struct Part {
    name: String,
    passes: usize,
    /// Of all rows and passes.
    tokens: usize,
    seconds: f64,
    floor_seconds: f64,
}

/// Draws one image of a shape.
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    let device = args.device.get()?;
    let mut config = config(args.synthetic)?;
    config.sampling.cfg_until = args.cfg_until;
    config.sampling.draft = args.draft;
    let scales = args.size.parse::<Size>()?.grids(&config)?;
    config.sampling.check(scales.len())?;
    let (dtype, matrices, filters) = weight_types(args, &config, &device);
    let text_tokens = args.prompt.unwrap_or(16) as usize;
    let work =
        Work { scales: &scales, images: args.batch as usize, text_tokens, sampling: &config.sampling, prompts: 1 };
    let needed = cost::synthetic_memory(&config, dtype, (matrices, filters), work)?;
    let load = Load {
        source: None,
        device: &device,
        peak: needed.peak(),
        smaller: "--quant q8_0, --quant q4_K, or a smaller --size or --batch",
    };
    let Run { stop, .. } = load.start(Level::Quiet, 1)?;

    let (started, started_free) = (Instant::now(), memory::free(&device));
    let weights = Weights::synthetic(dtype, &device).with_matrices(matrices);
    let backbone = Backbone::load(&weights, &config.backbone)?;
    let tokenizer = Weights::synthetic(DType::F32, &device).with_matrices(filters);
    let tokenizer = ImageDecoder::load(&tokenizer, &config.tokenizer)?;
    let load_seconds = started.elapsed().as_secs_f64();

    let seeds: Vec<u64> = (0..u64::from(args.batch)).collect();
    let batch = Batch { scales: &scales, sampling: &config.sampling, seeds: &seeds };
    let prefixes = prefixes(&config, text_tokens);
    let model = Loaded { config: &config, backbone, tokenizer, device: &device };
    let taken = || started_free.zip(memory::free(&device)).map(|(before, now)| before.saturating_sub(now));
    let images = (0..args.images).map(|_| {
        let seconds = model.draw(batch, &prefixes, &stop)?;
        Ok(Image { seconds, taken: taken() })
    });
    let mut images = images.collect::<Result<Vec<_>>>()?;
    let peak_bytes = memory::peak(&device);
    let (mut seconds, growth_bytes) = median(&mut images);
    let decode_seconds = seconds.pop().unwrap_or(0.0);

    let machine = Machine::measure(&device, dtype, matrices)?;
    // An image needs none of the rows for text tokens.
    let read = config.backbone.parameters_of_images() as f64 / config.backbone.parameters() as f64;
    let read = (needed.transformer as f64 * read) as u64;
    let parts = parts(&config, batch, &prefixes, &seconds, &machine, read);
    let sum = |f: fn(&Part) -> f64| parts.iter().map(f).sum::<f64>();
    let (spent, floor) = (sum(|p| p.seconds), sum(|p| p.floor_seconds));
    let report = Report {
        model: config.name.clone(),
        weights: args.quant,
        parameters: config.backbone.parameters() as u64,
        weight_bytes: needed.transformer,
        load_seconds,
        decode_seconds,
        batch: args.batch,
        image_seconds: (spent + decode_seconds) / f64::from(args.batch),
        tokens_per_second: parts.iter().map(|p| p.tokens).sum::<usize>() as f64 / spent,
        peak_gflops: machine.flops / 1e9,
        read_gbytes_per_second: machine.bandwidth / 1e9,
        floor_seconds: floor / f64::from(args.batch),
        share_of_floor: floor / spent,
        forecast_bytes: needed.peak(),
        peak_bytes,
        growth_bytes,
        parts,
    };
    let _ = match args.json {
        true => terminal::emit_json(&report)?,
        false => terminal::emit(report.table().as_bytes())?,
    };
    Ok(())
}

/// The type of tensors, and how matrices and filters of convolutions are stored.
#[cfg_attr(not(feature = "nano"), allow(unused_variables))]
fn weight_types(args: &BenchArgs, config: &ModelConfig, device: &Device) -> (DType, Matrices, Matrices) {
    match args.synthetic {
        #[cfg(feature = "nano")]
        Shape::Nano => {
            let (dtype, matrices) = Source::Embedded.placed(TRANSFORMER, args.quant, device);
            (dtype, matrices, config.filters(&Source::Embedded, device, args.quant))
        }
        _ => {
            let (dtype, matrices) = args.quant.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
            (dtype, matrices, Matrices::Tensors)
        }
    }
}

/// Seconds of the median image, and the growth of memory from the second image to the last.
fn median(images: &mut [Image]) -> (Vec<f64>, Option<i64>) {
    let growth_bytes = match (images.get(1).and_then(|i| i.taken), images.last().and_then(|i| i.taken)) {
        (Some(early), Some(late)) if images.len() > 2 => Some(late as i64 - early as i64),
        _ => None,
    };
    // The first one of several warms up.
    let warm = if images.len() > 1 { &mut images[1..] } else { images };
    warm.sort_by(|a, b| a.total().total_cmp(&b.total()));
    (warm[warm.len() / 2].seconds.clone(), growth_bytes)
}

/// A model with random weights.
struct Loaded<'a> {
    config: &'a ModelConfig,
    backbone: Backbone,
    tokenizer: ImageDecoder,
    device: &'a Device,
}

impl Loaded<'_> {
    /// Draws a batch. Returns the seconds of its prompt, of every scale, and of the pixels.
    fn draw(&self, batch: Batch, prefixes: &[Prefix; 2], stop: &Stop) -> Result<Vec<f64>> {
        let prompts = vec![prefixes[0].clone(); batch.seeds.len()];
        let mut marks = vec![Instant::now()];
        let mut waited = Ok(());
        let input = NextInput::of(&self.tokenizer, self.config.backbone.input_mode, batch.scales);
        let drawn = draw_after(&self.backbone, input, &prompts, &prefixes[1], batch, &mut |event| {
            if !matches!(event, Event::Decode) {
                // A GPU may still have work queued.
                waited = self.device.synchronize();
                marks.push(Instant::now());
            }
            stop.check()
        })?;
        waited?;
        for codes in &drawn {
            self.tokenizer.decode_image(codes, batch.scales)?;
        }
        marks.push(Instant::now());
        Ok(marks.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect())
    }
}

fn config(shape: Shape) -> Result<ModelConfig> {
    match shape {
        #[cfg(feature = "nano")]
        Shape::Nano => ModelConfig::read(&Source::Embedded),
        Shape::TokenflowT2i7b => Ok(tokenflow::config()),
        // The others do not draw.
        _ => {
            let public = Preset::clipb_32k_enhanced().config;
            let tokenizer = TokenizerConfig { semantic: VitConfig::siglip2_so400m_naflex(), ..public };
            Ok(ModelConfig::nextflow("nextflow-7b", QWEN2_5_VL_7B, tokenizer))
        }
    }
}

/// A prompt of `tokens` tokens, and the unconditional one.
fn prefixes(config: &ModelConfig, tokens: usize) -> [Prefix; 2] {
    let prompt = &config.prompt;
    let opening: Vec<u32> = if prompt.image_start.is_empty() { vec![config.backbone.boi()] } else { vec![1, 2, 3] };
    let text: Vec<u32> = (0..tokens as u32).collect();
    let unconditional = if prompt.negative.is_empty() { &[][..] } else { &text };
    [prompt.prefix(&text, &opening), prompt.prefix(unconditional, &opening)]
}

fn parts(
    config: &ModelConfig,
    batch: Batch,
    prefixes: &[Prefix; 2],
    seconds: &[f64],
    machine: &Machine,
    weights: u64,
) -> Vec<Part> {
    let (c, scales, images) = (&config.backbone, batch.scales, batch.seeds.len());
    let guided = config.sampling.guided_scales(scales.len());
    let rows = if guided > 0 { 2 } else { 1 };
    let read: Vec<usize> = prefixes[..rows].iter().flat_map(|p| vec![p.ids.len(); images]).collect();
    let prompt_flops: f64 = read.iter().map(|&n| cost::flops(c, 1, n, 0, 0)).sum();
    let prompt_floor = machine.floor(prompt_flops, weights);
    let (mut seen, mut parts) = (read[0], Vec::new());
    for (si, &(h, w)) in scales[..scales.len().saturating_sub(config.sampling.draft)].iter().enumerate() {
        let rows = if si < guided { 2 * images } else { images };
        let passes = config.sampling.passes(si);
        // The last token of the prompt predicts the first code.
        let (tokens, name) = if si == 0 { (0, "1x1".into()) } else { (h * w, format!("{h}x{w}")) };
        let flops = cost::flops(c, rows, tokens, seen, h * w);
        let floor = machine.floor(flops, if si == 0 { 0 } else { weights }) * passes as f64;
        seen += tokens;
        let seconds = seconds.get(si + 1).copied().unwrap_or(0.0);
        parts.push(Part { name, passes, tokens: rows * tokens * passes, seconds, floor_seconds: floor });
    }
    let tokens = read.iter().sum();
    let seconds = seconds.first().copied().unwrap_or(0.0);
    parts.insert(0, Part { name: "prompt".into(), passes: 1, tokens, seconds, floor_seconds: prompt_floor });
    parts
}

impl Report {
    fn table(&self) -> String {
        let weights = self.weights.map_or(String::new(), |w| format!(" in {w}"));
        let mut text = format!(
            "{}, {:.2} B parameters{weights}, {} of weights, made in {:.1} s\n\n{:<10} {:>6} {:>7} {:>10} {:>10} {:>10}\n",
            self.model,
            self.parameters as f64 / 1e9,
            gb(self.weight_bytes),
            self.load_seconds,
            "",
            "passes",
            "tokens",
            "ms",
            "tokens/s",
            "floor ms",
        );
        for Part { name, passes, tokens, seconds, floor_seconds } in &self.parts {
            let speed = if *tokens > 0 { format!("{:.0}", *tokens as f64 / seconds) } else { "-".into() };
            let (ms, floor) = (1e3 * seconds, 1e3 * floor_seconds);
            let _ = writeln!(text, "{name:<10} {passes:>6} {tokens:>7} {ms:>10.1} {speed:>10} {floor:>10.1}");
        }
        let _ = writeln!(text, "{:<10} {:>25.1}\n", "pixels", 1e3 * self.decode_seconds);
        let read = format!(" and reads {:.1} GB/s", self.read_gbytes_per_second);
        let _ = writeln!(
            text,
            "image {:.2} s · {:.1} tokens/s · {:.0}% of the floor ({:.2} s; this machine computes {:.0} GFLOP/s{read})",
            self.image_seconds,
            self.tokens_per_second,
            100.0 * self.share_of_floor,
            self.floor_seconds,
            self.peak_gflops,
        );
        let peak = self.peak_bytes.map_or("unknown".into(), gb);
        let growth = self.growth_bytes.map_or(String::new(), |b| format!(", growth {:+.1} MB", b as f64 / 1e6));
        let _ = writeln!(text, "peak memory {peak}, forecast {}{growth}", gb(self.forecast_bytes));
        text
    }
}

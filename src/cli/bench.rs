//! `nextflow bench`: how fast a model's shape runs here, with random weights.

use std::fmt::Write;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::backbone::Backbone;
use crate::backbone::presets::NEXTFLOW_7B;
use crate::checkpoint::{WeightType, Weights};
use crate::error::Result;
use crate::generate::{Event, Job, ModelConfig, Prefix, Sampling, cost, draw_codes, tokenflow};
use crate::request::Size;
use crate::tokenizer::{ImageTokenizer, Preset, TokenizerConfig, VitConfig};
use crate::{device, memory, ops, pixels, terminal};

/// Shapes to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// The built-in model's
    #[cfg(feature = "nano")]
    Nano,
    /// TokenFlow-t2i, 256 px
    #[value(name = "tokenflow-t2i-7b")]
    TokenflowT2i7b,
    /// NextFlow on Qwen2.5-VL-7B with TokenFlow's tokenizer
    #[value(name = "nextflow-7b")]
    Nextflow7b,
}

/// Flags of `nextflow bench`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  nextflow bench --synthetic nextflow-7b --quant q8_0 --size 256x256")]
pub struct BenchArgs {
    /// Random weights of these shapes
    #[arg(long, value_name = "PRESET", value_enum)]
    pub synthetic: Shape,
    /// Keep the transformer's weights in this type [default: f32 on a CPU, else bf16]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub quant: Option<WeightType>,
    /// WIDTHxHEIGHT in pixels, WIDTH:HEIGHT as a ratio, or auto (the largest square)
    #[arg(long, default_value = "auto")]
    pub size: String,
    /// Text tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub prompt: u32,
    /// auto, cpu, cuda:N or metal
    #[arg(long, default_value = "auto", env = "NEXTFLOW_DEVICE")]
    pub device: String,
    /// Print JSON in place of a table
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    weights: Option<WeightType>,
    parameters: u64,
    weight_bytes: u64,
    load_seconds: f64,
    parts: Vec<Part>,
    decode_seconds: f64,
    /// Prompt, scales and pixels.
    image_seconds: f64,
    tokens_per_second: f64,
    /// f32 matrix product, as measured here.
    peak_gflops: f64,
    /// Reading of memory, as measured here; nothing is known of a GPU's.
    read_gbytes_per_second: Option<f64>,
    floor_seconds: f64,
    /// Of the time of prompt and scales.
    share_of_floor: f64,
    forecast_bytes: u64,
    peak_bytes: Option<u64>,
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

/// Runs `nextflow bench`.
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    let device = device::parse(&args.device)?;
    let config = config(args.synthetic)?;
    let scales = args.size.parse::<Size>()?.grids(&config)?;
    let (dtype, blocks) = args.quant.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
    let needed = cost::synthetic_memory(&config, dtype, blocks, &scales, &config.sampling)?;
    memory::check(needed.peak(), &device, "--quant q8_0, --quant q4_K, or a smaller --size")?;
    let stop = terminal::interrupts()?;

    let started = Instant::now();
    let weights = Weights::synthetic(dtype, &device).with_matrices(blocks);
    let backbone = Backbone::load(&weights, &config.backbone)?;
    let tokenizer = ImageTokenizer::load(&Weights::synthetic(DType::F32, &device), &config.tokenizer)?;
    let load_seconds = started.elapsed().as_secs_f64();

    let job = Job { prompt: String::new(), scales: scales.clone(), sampling: config.sampling.clone(), seed: 0 };
    let prefixes = prefixes(&config, args.prompt);
    let mut marks = vec![Instant::now()];
    let rows = [&prefixes[0], &prefixes[1]];
    let codes = draw_codes(&backbone, tokenizer.quantizer(), rows, &job, &mut |event| {
        if !matches!(event, Event::Decode) {
            marks.push(Instant::now());
        }
        stop.check()
    })?;
    let drawn = Instant::now();
    pixels::to_image(&tokenizer.decode(&codes, &scales)?)?;
    let decode = drawn.elapsed();
    let peak_bytes = memory::peak();

    let machine = Machine::measure(&device, dtype)?;
    let seconds: Vec<f64> = marks.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
    let parts = parts(&config, &scales, &prefixes, &seconds, &machine, needed.transformer);
    let sum = |f: fn(&Part) -> f64| parts.iter().map(f).sum::<f64>();
    let (spent, floor) = (sum(|p| p.seconds), sum(|p| p.floor_seconds));
    let report = Report {
        model: config.name.clone(),
        weights: args.quant,
        parameters: config.backbone.parameters() as u64,
        weight_bytes: needed.transformer,
        load_seconds,
        decode_seconds: decode.as_secs_f64(),
        image_seconds: spent + decode.as_secs_f64(),
        tokens_per_second: parts.iter().map(|p| p.tokens).sum::<usize>() as f64 / spent,
        peak_gflops: machine.flops / 1e9,
        read_gbytes_per_second: machine.bandwidth.map(|b| b / 1e9),
        floor_seconds: floor,
        share_of_floor: floor / spent,
        forecast_bytes: needed.peak(),
        peak_bytes,
        parts,
    };
    let _ = match args.json {
        true => terminal::emit_json(&report)?,
        false => terminal::emit(report.table().as_bytes())?,
    };
    Ok(())
}

fn config(shape: Shape) -> Result<ModelConfig> {
    match shape {
        #[cfg(feature = "nano")]
        Shape::Nano => ModelConfig::read(&crate::checkpoint::Source::Embedded),
        Shape::TokenflowT2i7b => Ok(tokenflow::config()),
        Shape::Nextflow7b => {
            let public = Preset::clipb_32k_enhanced().config;
            Ok(ModelConfig {
                name: "nextflow-7b".into(),
                scales: 18,
                grids: Vec::new(),
                sampling: Sampling { cfg: 3.0, temperature: 1.0, top_k: Some(600), top_p: 0.95, refine: Vec::new() },
                prompt: Default::default(),
                backbone: NEXTFLOW_7B,
                tokenizer: TokenizerConfig { semantic: VitConfig::siglip2_so400m_naflex(), ..public },
            })
        }
    }
}

/// A prompt of so many tokens, and what guidance sets against it.
fn prefixes(config: &ModelConfig, tokens: u32) -> [Prefix; 2] {
    let prompt = &config.prompt;
    let opening: Vec<u32> = if prompt.image_start.is_empty() { vec![config.backbone.boi()] } else { vec![1, 2, 3] };
    let text: Vec<u32> = (0..tokens).collect();
    let unconditional = if prompt.negative.is_empty() { &[][..] } else { &text };
    [prompt.prefix(&text, &opening), prompt.prefix(unconditional, &opening)]
}

fn parts(
    config: &ModelConfig,
    scales: &[(usize, usize)],
    prefixes: &[Prefix; 2],
    seconds: &[f64],
    machine: &Machine,
    weights: u64,
) -> Vec<Part> {
    let c = &config.backbone;
    let rows = if config.sampling.cfg > 0.0 { 2 } else { 1 };
    let read: Vec<usize> = prefixes[..rows].iter().map(|p| p.ids.len()).collect();
    let prompt_floor = read.iter().map(|&n| machine.floor(cost::flops(c, 1, n, 0, 0), weights)).sum();
    let (mut seen, mut parts) = (read[0], Vec::new());
    for (si, &(h, w)) in scales.iter().enumerate() {
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
    parts.insert(0, Part { name: "prompt".into(), passes: rows, tokens, seconds, floor_seconds: prompt_floor });
    parts
}

/// How fast this machine could be.
struct Machine {
    /// Floating-point operations a second of a large matrix product.
    flops: f64,
    /// Bytes a second of reading memory; unknown of a GPU's.
    bandwidth: Option<f64>,
}

impl Machine {
    fn measure(device: &Device, dtype: DType) -> Result<Self> {
        const SIDE: usize = 2048;
        let random = || Tensor::randn(0f32, 1.0, (SIDE, SIDE), device)?.to_dtype(dtype);
        let (x, w) = (random()?, random()?);
        let product = || -> Result<()> {
            ops::linear(&x, &w, None)?;
            Ok(device.synchronize()?)
        };
        let flops = 2.0 * (SIDE as f64).powi(3) / best(product)?.as_secs_f64();
        if !device.is_cpu() {
            return Ok(Self { flops, bandwidth: None });
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
        Ok(Self { flops, bandwidth: Some(bandwidth) })
    }

    /// The shortest time of a pass: its arithmetic, or reading the weights.
    fn floor(&self, flops: f64, weights: u64) -> f64 {
        let read = self.bandwidth.map_or(0.0, |bandwidth| weights as f64 / bandwidth);
        (flops / self.flops).max(read)
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

impl Report {
    fn table(&self) -> String {
        let gb = |bytes: u64| match bytes as f64 {
            b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
            b => format!("{:.1} MB", b / 1e6),
        };
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
        let read = self.read_gbytes_per_second.map_or(String::new(), |b| format!(" and reads {b:.1} GB/s"));
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
        let _ = writeln!(text, "peak memory {peak}, forecast {}", gb(self.forecast_bytes));
        text
    }
}

//! Infinity: text, drawing and decoding of one image, one phase after the other.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::BenchArgs;
use super::machine::Machine;
use super::phases::{Phase, Report, Scale};
use crate::checkpoint::{WeightType, Weights};
use crate::cli::run::{Load, Run};
use crate::error::Result;
use crate::generate::cost::{Memory, Work};
use crate::generate::infinity::{InfinityRows, InfinitySetup, Variant, lattice};
use crate::generate::next_input::NextInput;
use crate::generate::{Batch, Event, draw_codes};
use crate::infinity::{Infinity, InfinityConfig};
use crate::memory;
use crate::t5::{self, Encoder};
use crate::terminal::Level;
use crate::tokenizer::{BitPreset, ImageDecoder};

/// Draws one image of a released shape with random weights.
pub(super) fn run(args: &BenchArgs, name: &str) -> Result<()> {
    let device = args.device.get()?;
    let Some(variant) = Variant::named(name) else { return Ok(()) };
    let presets = BitPreset::all();
    let tokenizer =
        presets.iter().find(|preset| preset.file() == variant.tokenizer).map(|preset| preset.config.clone());
    let Some(tokenizer) = tokenizer else { return Ok(()) };
    let mut setup = InfinitySetup::new(Some(variant), variant.shape.clone(), tokenizer, Some(t5::flan_t5_xl()));
    setup.sampling.cfg_until = args.cfg_until;
    setup.sampling.draft = args.draft;
    let scales = setup.grids(args.size.parse()?)?;
    setup.sampling.check(scales.len())?;
    let text_tokens = args.prompt.unwrap_or(16) as usize;
    let images = args.batch as usize;
    let work = Work { scales: &scales, images, text_tokens, sampling: &setup.sampling, prompts: 1 };
    let needed = setup.memory(None, args.quant, work, &device)?;
    let load = Load {
        source: None,
        device: &device,
        peak: needed.peak(),
        smaller: "--quant q8_0, --quant q4_K, or a smaller --size or --batch",
    };
    let Run { stop, .. } = load.start(Level::Quiet, 1)?;
    let (phases, seconds) = measure(&setup, args, &scales, text_tokens, &device, &needed, &mut |_| stop.check())?;

    let (dtype, matrices) = args.quant.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
    let machine = Machine::measure(&device, dtype, matrices)?;
    let guided = setup.sampling.guided_scales(scales.len());
    let (mut seen, mut parts) = (0, Vec::new());
    for (si, (&grid, &seconds)) in scales.iter().zip(&seconds).enumerate() {
        let (rows, tokens) = (if si < guided { 2 * images } else { images }, grid.0 * grid.1);
        let floor = machine.floor(flops(&setup.transformer, rows, tokens, seen, text_tokens), needed.transformer);
        seen += tokens;
        parts.push(Scale { grid, tokens: rows * tokens, seconds, floor_seconds: floor });
    }
    let (width, height) = setup.pixels(&scales);
    let report = Report {
        model: variant.title,
        weights: args.quant,
        size: format!("{width}x{height}"),
        phases,
        scales: parts,
        peak_gflops: machine.flops / 1e9,
        forecast_bytes: needed.peak(),
        peak_bytes: memory::peak(&device),
    };
    report.emit(args.json)
}

/// The phases of the last image, and the seconds of each of its scales.
fn measure(
    setup: &InfinitySetup,
    args: &BenchArgs,
    scales: &[(usize, usize)],
    text_tokens: usize,
    device: &Device,
    needed: &Memory,
    observe: &mut dyn FnMut(Event) -> std::ops::ControlFlow<()>,
) -> Result<(Vec<Phase>, Vec<f64>)> {
    let [(_, text_bytes), (_, drawing_bytes), (_, decoding_bytes)] = needed.phases();
    let phase = |name, load_seconds, seconds, forecast_bytes| Phase {
        name,
        load_seconds,
        seconds,
        forecast_bytes,
        peak_bytes: memory::peak(device),
    };
    let seconds = |from: Instant| from.elapsed().as_secs_f64();
    let since = Instant::now();
    let mut encoder = Encoder::synthetic(&t5::flan_t5_xl(), device, args.quant)?;
    let loaded = seconds(since);
    let since = Instant::now();
    let ids: Vec<u32> = (0..text_tokens as u32).map(|i| 3 + i).collect();
    let text = encoder.forward(&ids)?;
    device.synchronize()?;
    let mut phases = vec![phase("text", loaded, seconds(since), text_bytes)];
    drop(encoder);
    memory::give_back();

    let since = Instant::now();
    let (dtype, matrices) = args.quant.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
    let weights = Weights::synthetic(dtype, device).with_matrices(matrices);
    let transformer = Infinity::load(&weights, &setup.transformer)?;
    let images = ImageDecoder::load_bits(&Weights::synthetic(DType::F32, device), &setup.tokenizer)?;
    let loaded = seconds(since);
    let ImageDecoder::Bits(decoder) = &images else { return Ok((phases, Vec::new())) };
    let count = args.batch as usize;
    let seeds: Vec<u64> = (0..u64::from(args.batch)).collect();
    let batch = Batch { scales, sampling: &setup.sampling, seeds: &seeds };
    let mut marks = Vec::new();
    let mut drawn = Vec::new();
    for _ in 0..args.images {
        marks = vec![Instant::now()];
        let mut texts: Vec<Tensor> = vec![text.clone(); count];
        if setup.sampling.guided_scales(scales.len()) > 0 {
            texts.extend(vec![transformer.unconditional(text_tokens)?; count]);
        }
        let lattice = lattice(scales).unwrap_or_default();
        let (rows, hidden) = InfinityRows::start(&transformer, &setup.sampling, &texts, scales, lattice)?;
        let mut waited = Ok(());
        drawn = draw_codes(rows, hidden, NextInput::of_bits(decoder.quantizer(), scales), batch, &mut |event| {
            waited = device.synchronize();
            marks.push(Instant::now());
            observe(event)
        })?;
        waited?;
    }
    let each: Vec<f64> = marks.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
    phases.push(phase("drawing", loaded, each.iter().sum(), drawing_bytes));
    let since = Instant::now();
    for codes in &drawn {
        images.decode_image(codes, scales)?;
    }
    phases.push(phase("decoding", 0.0, seconds(since), decoding_bytes));
    Ok((phases, each))
}

/// Floating-point operations of a forward pass of `tokens` tokens in each of `rows` rows after
/// `seen` ones; `text_tokens` are the tokens of the text.
fn flops(c: &InfinityConfig, rows: usize, tokens: usize, seen: usize, text_tokens: usize) -> f64 {
    let linear = 6 * c.width * c.width + 2 * c.width * c.mlp;
    let attention = 2 * (seen + tokens + text_tokens) * c.width;
    2.0 * (rows * tokens) as f64 * (c.depth * (linear + attention)) as f64
}

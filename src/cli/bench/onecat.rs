//! OneCAT: a prompt, or a picture and an instruction, then drawing and decoding, one phase after
//! the other.

use std::ops::ControlFlow;
use std::time::Instant;

use candle_core::{DType, Device};

use super::BenchArgs;
use super::machine::Machine;
use super::phases::{Phase, Report, Scale};
use crate::backbone::Cache;
use crate::checkpoint::{WeightType, Weights};
use crate::cli::run::{Load, Run};
use crate::error::{Error, Kind, Result};
use crate::generate::cost::{self, Memory, Work};
use crate::generate::next_input::NextInput;
use crate::generate::onecat::{Guided, OneCatRows, OneCatSetup};
use crate::generate::{Batch, Event, draw_codes};
use crate::memory;
use crate::onecat::prompt::Piece;
use crate::onecat::{Drawing, OneCatConfig, Reading, ReadingParts, Trunk, patches};
use crate::terminal::Level;
use crate::tokenizer::ImageDecoder;
use crate::vision::Patches;

/// Tokens around a prompt: the system prompt and the marks.
const AROUND: usize = 33;
/// Pixels of the picture that is edited, along each side.
const SOURCE: u32 = 512;

/// Draws one image, or edits one of 512x512 pixels, with random weights.
pub(super) fn run(args: &BenchArgs, edit: bool) -> Result<()> {
    let device = args.device.get()?;
    let setup =
        OneCatSetup::onecat_3b().ok_or_else(|| Error::new(Kind::Failure, "its image tokenizer is not known"))?;
    let mut sampling = if edit { setup.edit_sampling() } else { setup.sampling.clone() };
    (sampling.cfg_until, sampling.draft) = (args.cfg_until, args.draft);
    let scales = setup.grids(args.size.parse()?)?;
    sampling.check(scales.len())?;
    let text_tokens = args.prompt.unwrap_or(16) as usize;
    let picture = edit.then(|| patches::edit_grid(&setup.transformer, (SOURCE, SOURCE), scales.len())).transpose()?;
    let images = args.batch as usize;
    let work = Work { scales: &scales, images, text_tokens, sampling: &sampling, prompts: 1 };
    let needed = setup.memory(None, args.quant, work, picture.map(|(h, w)| h * w), &device)?;
    let load = Load {
        source: None,
        device: &device,
        peak: needed.peak(),
        smaller: "--quant q8_0, --quant q4_K, or a smaller --size or --batch",
    };
    let Run { stop, .. } = load.start(Level::Quiet, 1)?;
    let (phases, seconds, prefix) = measure(&setup, args, work, picture, &device, &needed, &mut |_| stop.check())?;

    let (dtype, matrices) = args.quant.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
    let machine = Machine::measure(&device, dtype, matrices)?;
    let guided = sampling.guided_scales(scales.len());
    let kinds = |si: usize| 1 + usize::from(sampling.image_cfg() != 0.0) + usize::from(si < guided);
    let c = &setup.transformer;
    // One adapter of each is read, of all.
    let weights = needed.transformer - adapters(c, dtype, matrices) / c.adapters as u64 * (c.adapters as u64 - 1);
    let (mut seen, mut parts) = (prefix, Vec::new());
    for (si, (&grid, &seconds)) in scales.iter().zip(&seconds).enumerate() {
        let (rows, tokens) = (kinds(si) * images, grid.0 * grid.1);
        let floor = machine.floor(flops(c, rows, tokens, seen), weights);
        seen += tokens;
        parts.push(Scale { grid, tokens: rows * tokens, seconds, floor_seconds: floor });
    }
    let (width, height) = setup.pixels(&scales);
    let report = Report {
        model: if edit { "OneCAT-3B, an edit" } else { "OneCAT-3B" },
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

/// The phases of the last image, the seconds of each of its scales, and the tokens before them.
fn measure(
    setup: &OneCatSetup,
    args: &BenchArgs,
    work: Work,
    picture: Option<(usize, usize)>,
    device: &Device,
    needed: &Memory,
    observe: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<(Vec<Phase>, Vec<f64>, usize)> {
    let Work { scales, images, text_tokens, sampling, .. } = work;
    let [(_, text_bytes), (_, drawing_bytes), (_, decoding_bytes)] = needed.phases();
    let phase = |name, load_seconds, seconds, forecast_bytes| Phase {
        name,
        load_seconds,
        seconds,
        forecast_bytes,
        peak_bytes: memory::peak(device),
    };
    let seconds = |from: Instant| from.elapsed().as_secs_f64();
    let (dtype, matrices) = args.quant.unwrap_or(WeightType::usual(device.is_cpu())).placed(device.is_cpu());
    let weights = Weights::synthetic(dtype, device).with_matrices(matrices);
    let since = Instant::now();
    let trunk = Trunk::load(&weights, &setup.transformer)?;
    let parts = ReadingParts { pictures: picture.is_some(), head: false };
    let reading = Reading::load(&weights, &setup.transformer, parts)?;
    let loaded = seconds(since);
    let since = Instant::now();
    let features = picture.map(|grid| reading.features(&[synthetic(&setup.transformer, grid)])).transpose()?;
    let said = |count: usize| Piece::Tokens((0..count as u32).collect());
    let prefix = |pieces: &[Piece]| reading.prefix(&trunk, pieces, features.as_ref());
    let guided = sampling.guided_scales(scales.len()) > 0;
    let mut prefixes: Vec<Cache> = vec![match picture {
        Some(_) => prefix(&[said(AROUND), Piece::Picture, said(text_tokens)])?,
        None => prefix(&[said(AROUND + text_tokens)])?,
    }];
    if picture.is_some() && sampling.image_cfg() != 0.0 {
        prefixes.push(prefix(&[said(AROUND + text_tokens)])?);
    }
    if guided {
        prefixes.push(prefix(&[said(AROUND)])?);
    }
    device.synchronize()?;
    let mut phases = vec![phase("prompt", loaded, seconds(since), text_bytes)];
    drop((reading, features));
    memory::give_back();

    let since = Instant::now();
    let drawing = Drawing::load(&weights, &setup.transformer)?;
    let decoder = ImageDecoder::load_bits(&Weights::synthetic(DType::F32, device), &setup.tokenizer)?;
    let loaded = seconds(since);
    let ImageDecoder::Bits(bits) = &decoder else { return Ok((phases, Vec::new(), 0)) };
    let seeds: Vec<u64> = (0..images as u64).collect();
    let batch = Batch { scales, sampling, seeds: &seeds };
    let rows: Vec<&Cache> = prefixes.iter().flat_map(|prefix| std::iter::repeat_n(prefix, images)).collect();
    let kind = picture.map_or(Guided::Text, |_| Guided::Edit(sampling.image_cfg()));
    let (mut marks, mut drawn) = (Vec::new(), Vec::new());
    for _ in 0..args.images {
        // The first scale is read before the loop begins.
        marks = vec![Instant::now()];
        let (rows, hidden) = OneCatRows::start(&trunk, &drawing, &rows, images, kind, scales)?;
        let mut waited = Ok(());
        drawn = draw_codes(rows, hidden, NextInput::of_bits(bits.quantizer(), scales), batch, &mut |event| {
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
        decoder.decode_image(codes, scales)?;
    }
    phases.push(phase("decoding", 0.0, seconds(since), decoding_bytes));
    Ok((phases, each, prefixes[0].len()))
}

/// A picture of made-up pixels, of a grid (height, width) of tokens.
pub(super) fn synthetic(config: &OneCatConfig, tokens: (usize, usize)) -> Patches {
    let pixels = 3 * (2 * config.patch_size).pow(2);
    Patches { values: (0..tokens.0 * tokens.1 * pixels).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect(), tokens }
}

/// Bytes of all adapters.
fn adapters(c: &OneCatConfig, dtype: DType, matrices: crate::checkpoint::Matrices) -> u64 {
    let none = OneCatConfig { adapters: 1, ..c.clone() };
    let bytes = |config: &OneCatConfig| {
        let requested = Weights::inventory();
        Drawing::load(&requested, config).map_or(0, |_| requested.bytes(dtype, matrices))
    };
    (bytes(c) - bytes(&none)) / (c.adapters as u64 - 1).max(1) * c.adapters as u64
}

/// Floating-point operations of one pass of `tokens` codes in each of `rows` rows after `seen`
/// tokens.
fn flops(c: &OneCatConfig, rows: usize, tokens: usize, seen: usize) -> f64 {
    let t = &c.transformer;
    let adapters = t.num_hidden_layers * 3 * c.adapter_rank * (t.hidden_size + t.intermediate_size);
    cost::flops(t, rows, tokens, seen, 0) + 2.0 * (rows * tokens * adapters) as f64
}

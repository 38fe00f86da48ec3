//! `nextflow gen`: draw images from prompts.

mod from_png;
mod job_file;
mod job_line;
mod job_path;
mod jobs;
mod think;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::Args;

use super::delivery::Delivery;
use super::request::{self, Request};
use super::run::{Load, Plan};
use super::{DrawArgs, PromptArgs};
use crate::chat::{ChatConfig, ChatModel};
use crate::checkpoint::REFINER;
use crate::error::{Error, Result};
use crate::generate::cost::{Memory, Work};
use crate::generate::{Generator, GeneratorConfig, Job, tokenflow};
use crate::io::input;
use crate::terminal;
use jobs::JobsArgs;

/// The most images in one pass.
const MAX_BATCH: u64 = 1024;

/// Flags of `nextflow gen`, as typed; `Request` holds them checked.
#[derive(Args, Clone, Debug, Default)]
#[command(after_help = "Examples:\n  nextflow gen -p \"a red apple\" -o apple.png\n  \
                  nextflow gen -p \"三只蓝色的猫\" --count 4 --out-dir cats\n  \
                  nextflow gen --prompt-file prompts.txt --seed 7 --json\n  \
                  nextflow gen --jsonl jobs.jsonl --out-dir pictures --resume\n  \
                  nextflow gen --from apple.png --seed 1,2,3           # the same settings, three new seeds\n  \
                  nextflow gen \"a red fox\" --refiner Tongyi-MAI/Z-Image-Turbo --dry-run")]
pub struct GenArgs {
    /// The prompts.
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// Reuse the prompt, seed, size and settings stored in this PNG; other flags override them
    #[arg(long, help_heading = "Prompt", value_name = "PNG", conflicts_with_all = ["think", "prompt_file"])]
    pub from: Option<PathBuf>,
    /// Negative prompt; an empty TEXT is the default [default: none, or the model's]
    #[arg(short, long, help_heading = "Prompt", value_name = "TEXT", conflicts_with = "think")]
    pub negative: Option<OsString>,
    /// Let the model reason in text first, then draw the result
    #[arg(long, help_heading = "Prompt", conflicts_with = "refine")]
    pub think: bool,
    /// What `gen` and `edit` share.
    #[command(flatten)]
    pub draw: DrawArgs,
    /// Skip the last N scales: a draft of full size without the finest detail [default: the
    /// model's]
    #[arg(long, help_heading = "Sampling", value_name = "N", conflicts_with = "think", allow_negative_numbers = true)]
    pub draft: Option<usize>,
    /// TokenFlow-t2i only: draw every scale but the first in N passes, 1 to 3, each refining the
    /// one before
    #[arg(
        long,
        help_heading = "Sampling",
        value_name = "N",
        conflicts_with = "think",
        value_parser = clap::value_parser!(u8).range(1..=3),
        allow_negative_numbers = true
    )]
    pub passes: Option<u8>,
    /// Infinity only: apply guidance inside the network, before its last K blocks, instead of on
    /// the logits
    #[arg(long, help_heading = "Sampling", value_name = "K", value_delimiter = ',', conflicts_with = "think")]
    pub cfg_layers: Vec<usize>,
    /// Infinity only: cache of encoded prompts, a safetensors file or a folder; new prompts are
    /// added to it
    #[arg(long, help_heading = "Model", value_name = "FILE", conflicts_with = "think")]
    pub text_features: Option<PathBuf>,
    /// A file of jobs.
    #[command(flatten)]
    pub jobs: JobsArgs,
    /// Draw N images per pass: faster on GPUs, and takes more memory
    #[arg(
        long,
        help_heading = "Batch",
        value_name = "N",
        default_value_t = 1,
        conflicts_with = "think",
        allow_negative_numbers = true
    )]
    pub batch: u64,
}

/// Grids (height, width) of an image, coarse to fine.
type Grids = Vec<(usize, usize)>;

/// The flags, completed from a PNG, the checked request, and the grids of its images.
fn checked(typed: &GenArgs) -> Result<(GenArgs, Request, Grids)> {
    let (mut args, old) = match &typed.from {
        Some(path) => from_png::filled(typed, path).map(|(args, old)| (args, Some(old)))?,
        None => (typed.clone(), None),
    };
    let mut request = Request::new(&args.prompts, &args.draw).map_err(|e| match &args.from {
        // Errors that occur without the PNG as well are not about it.
        Some(path) if Request::new(&args.prompts, &typed.draw).is_ok() => {
            Error { message: format!("as {} has it: {}", input::shown(path), e.message), ..e }
        }
        _ => e,
    })?;
    // Of a PNG by another model what does not fit this one is left out.
    args.passes = typed.passes.or(args.passes.filter(|_| takes_passes(&request.config)));
    args.set_passes(&mut request)?;
    args.set_features(&mut request)?;
    if let Some(old) = old.as_ref().filter(|old| old.model != request.model && !args.draw.report.quiet) {
        terminal::note(&format!("(it was drawn by {}, this is {}: another image)", old.model, request.model));
    }
    if let Some(old) = old.as_ref().filter(|_| typed.draw.sampling.refine.is_none()) {
        let refines = !typed.draw.sampling.no_refine && request.config.refiner_steps().is_some();
        request.sampling.refine = old.refine.filter(|_| refines).unwrap_or(0);
    }
    if args.think || request.refiner.is_some() {
        request.sampling.refine = 0;
    }
    let scales = match old {
        // Several ratios share a last grid, and with it a size in pixels.
        Some(old) if typed.draw.sampling.size == "auto" && request.config.has_scales(&old.scales) => old.scales,
        _ => request.grids()?,
    };
    set_negative(&args, &mut request, scales.len())?;
    if let Some(limit) =
        request.config.prompt_limit().filter(|&limit| request.tokens > limit && !args.draw.report.quiet)
    {
        let tokens = request.tokens;
        terminal::note(&format!("(a prompt has {tokens} tokens; the model reads the first {limit})"));
    }
    if !args.think {
        request.sampling.draft = args.draft.unwrap_or(request.config.sampling().draft);
    }
    request.sampling.check(scales.len())?;
    args.draw.sampling.check_scales(&request.sampling, scales.len())?;
    Ok((args, request, scales))
}

/// Runs `nextflow gen`. Stops at the first error; the images before it stay.
pub(super) fn run(args: &GenArgs) -> Result<()> {
    args.jobs.check()?;
    if let Some(file) = &args.jobs.jsonl {
        return jobs::run(args, file);
    }
    let (args, request, scales) = checked(args)?;
    let preview = args.draw.output.preview(args.draw.report.verbose)?;
    let (json, batch) = (args.draw.report.json, batch(&args, request.images() as usize)?);
    if args.think {
        request.config.nextflow()?;
    }
    let thinking = args.think.then(|| ChatConfig::read(&request.source)).transpose()?;
    if args.draw.report.dry_run {
        let size = request.config.pixels(&scales, &request.sampling);
        let Some(config) = &thinking else {
            request.config.check(&request.source, args.text_features.as_deref())?;
            if request.sampling.refine > 0 {
                request.source.find(REFINER)?;
            }
            let memory = forecast(&request, &scales, batch)?;
            return Plan::new(&request, size, &scales, memory, memory.peak())?.emit(json, &memory.parts());
        };
        ChatModel::check(&request.source, config)?;
        let memory = think::forecast(&request, config, &scales)?;
        return Plan::new(&request, size, &scales, memory, memory.peak())?.emit(json, &memory.parts());
    }
    let peak = match &thinking {
        Some(config) => think::forecast(&request, config, &scales)?.peak(),
        None => forecast(&request, &scales, batch)?.peak(),
    };
    let smaller = if batch > 1 { "a smaller --batch" } else { "--quant q8_0, --quant q4_K, or a smaller --size" };
    let (peak, smaller) = request.limit(request.config.pixels(&scales, &request.sampling), peak, smaller)?;
    let load = Load { source: Some(&request.source), device: &request.device, peak, smaller };
    let run = load.start(args.draw.report.level(), request.images())?;
    let mut delivery = Delivery::new(&request, run, json);
    delivery.preview = preview;
    match thinking {
        Some(config) => think::run(&mut delivery, config, &scales)?,
        None => draw(&mut delivery, &scales, batch, args.text_features.as_deref())?,
    }
    delivery.finish()
}

/// Draws all images, `batch` at once.
fn draw(delivery: &mut Delivery, scales: &[(usize, usize)], batch: usize, features: Option<&Path>) -> Result<()> {
    let request = delivery.request;
    let prompts: Vec<&str> = request.prompts.iter().chain(&request.negative).map(String::as_str).collect();
    let Request { source, config, device, weights, .. } = request;
    let load = || Generator::load(source, config, (device, *weights), &prompts, features, request.sampling.refine > 0);
    let model = delivery.console.load(&request.model, load)?;
    let read = match &model {
        Generator::NextFlow(_) => None,
        Generator::Infinity(model) => Some(("the text encoder", model.encoding())),
        Generator::OneCat(model) => Some(("the text expert", model.reading())),
    };
    if let Some((who, took)) = read {
        delivery.console.detail(&format!("of that, {:.2} s for {who} to read the prompts", took.as_secs_f64()));
    }
    if delivery.console.is_verbose() {
        let unknown = request.config.compare(&request.source)?.1.unknown;
        if let Some(first) = unknown.first() {
            let count = unknown.len();
            let text = format!("{count} tensors are not used, {first} among them; nextflow info lists them");
            delivery.console.detail(&text);
        }
    }
    let mut jobs = request.jobs(scales);
    loop {
        let jobs: Vec<Job> = jobs.by_ref().take(batch).collect();
        if jobs.is_empty() {
            return Ok(());
        }
        let (images, took) = delivery.draw(&model, &jobs.iter().collect::<Vec<_>>())?;
        for (job, image) in jobs.iter().zip(&images) {
            if delivery.emit(job, image, None, took)?.is_break() {
                return Ok(()); // The reader of our output has gone: nobody wants the rest.
            }
        }
    }
}

/// Whether a model may draw a scale in several passes.
fn takes_passes(config: &GeneratorConfig) -> bool {
    matches!(config, GeneratorConfig::NextFlow(config) if tokenflow::takes_passes(config))
}

impl GenArgs {
    /// Sets the filters of `--passes`, where neither flags nor lines set others.
    pub(super) fn set_passes(&self, request: &mut Request) -> Result<()> {
        let Some(passes) = self.passes else { return Ok(()) };
        match &mut request.config {
            GeneratorConfig::NextFlow(config) => tokenflow::set_passes(config, passes.into())?,
            _ if passes == 1 => {}
            config => {
                let message = format!("{} draws every scale in one pass: --passes is for TokenFlow-t2i", config.name());
                return Err(Error::usage(message).hint("leave out --passes, or --model ByteVisionLab/TokenFlow-t2i"));
            }
        }
        let refine = request.sampling.refine;
        request.sampling = request::sampling(&self.draw.sampling, request.config.sampling().clone());
        request.sampling.refine = refine;
        Ok(())
    }

    /// Sets what Infinity alone has.
    ///
    /// Errors: usage, for another model.
    pub(super) fn set_features(&self, request: &mut Request) -> Result<()> {
        let flag = match &request.config {
            GeneratorConfig::Infinity(setup) => {
                let depth = setup.transformer.depth;
                if let Some(layer) = self.cfg_layers.iter().find(|&&layer| layer >= depth) {
                    let message = format!("--cfg-layers {layer}, but the transformer has {depth} blocks");
                    return Err(Error::usage(message).hint(format!("--cfg-layers {}", depth - 1)));
                }
                request.sampling.cfg_layers.clone_from(&self.cfg_layers);
                return Ok(());
            }
            _ if self.text_features.is_some() => "--text-features FILE",
            _ if !self.cfg_layers.is_empty() => "--cfg-layers K",
            _ => return Ok(()),
        };
        Err(Error::usage(format!("{flag} is for Infinity, this is {}", request.model))
            .hint("leave it out, or --model FoundationVision/Infinity:2b"))
    }
}

/// Takes what guidance is to lead away from.
pub(super) fn set_negative(args: &GenArgs, request: &mut Request, scales: usize) -> Result<()> {
    let text = args.negative.as_deref().map(OsStr::as_encoded_bytes);
    if let Some((text, tokens)) = request::negative(text, &request.counter, &request.sampling, scales)? {
        (request.negative, request.tokens) = (Some(text), request.tokens.max(tokens));
    }
    Ok(())
}

/// How many of `images` images are drawn at once.
pub(super) fn batch(args: &GenArgs, images: usize) -> Result<usize> {
    let what = match args.batch {
        0 => "draws nothing".into(),
        more if more > MAX_BATCH => format!("is more than {MAX_BATCH}"),
        batch => return Ok(images.min(batch as usize)),
    };
    Err(Error::usage(format!("--batch {} {what}", args.batch)).hint("--batch 4"))
}

fn forecast(request: &Request, scales: &[(usize, usize)], batch: usize) -> Result<Memory> {
    let Request { config, source, weights, sampling, device, tokens, prompts, .. } = request;
    config.memory(
        source,
        *weights,
        Work { scales, images: batch, text_tokens: *tokens, sampling, prompts: prompts.len() },
        device,
    )
}

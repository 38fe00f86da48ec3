//! `nextflow gen`: draw images from prompts.

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{ArgGroup, Args};
use serde::Serialize;

use super::ModelArgs;
use crate::checkpoint::WeightType;
use crate::error::Result;
use crate::generate::cost::{self, Memory};
use crate::generate::{Job, Model, schedule};
use crate::memory;
use crate::output::{self, Settings};
use crate::request::Request;
use crate::terminal::{self, Console, Level};

/// Flags of `nextflow gen`, as typed; [`Request`] holds them checked.
#[derive(Args, Debug, Default)]
#[command(
    group = ArgGroup::new("text").args(["prompt", "words", "prompt_file"]),
    after_help = "Examples:\n  nextflow gen -p \"a red apple\" -o apple.png\n  \
                  nextflow gen -p \"三只蓝色的猫\" --count 4 --out-dir cats\n  \
                  nextflow gen --prompt-file prompts.txt --seed 7 --json"
)]
pub struct GenArgs {
    /// What to draw; `-` reads it from standard input
    #[arg(value_name = "PROMPT")]
    pub words: Option<OsString>,
    /// What to draw; `-` reads it from standard input
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<OsString>,
    /// One prompt a line; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Decides all randomness [default: chosen, printed and stored]
    #[arg(long, allow_negative_numbers = true)]
    pub seed: Option<u64>,
    /// Images per prompt, with seeds SEED, SEED+1, ...
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    pub count: u64,
    /// WIDTHxHEIGHT in pixels, WIDTH:HEIGHT as a ratio, or auto (square)
    #[arg(long, default_value = "auto")]
    pub size: String,
    /// Guidance: how closely to follow the prompt; 0 turns it off [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub cfg: Option<f64>,
    /// Spread of the drawn codes; 0 always takes the likeliest [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Draw among the K likeliest codes [default: the model's]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Draw among the likeliest codes whose probabilities sum to P; 1 keeps all [default: the model's]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Write the image here; `-` writes the PNG to standard output
    #[arg(short, long, value_name = "FILE", conflicts_with = "out_dir")]
    pub output: Option<PathBuf>,
    /// Write the images, under names that are free, into this folder [default: the current one]
    #[arg(long, value_name = "FOLDER")]
    pub out_dir: Option<PathBuf>,
    /// Let -o replace a file
    #[arg(long, requires = "output")]
    pub force: bool,
    /// Which model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Keep the transformer's weights in this type [default: f32 on a CPU, else bf16]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub quant: Option<WeightType>,
    /// auto, cpu, cuda:N or metal
    #[arg(long, default_value = "auto", env = "NEXTFLOW_DEVICE")]
    pub device: String,
    /// Check everything, tell what would be drawn and how much memory it takes, and draw nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Say nothing but results and errors
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more: every step and its time
    #[arg(short, long)]
    pub verbose: bool,
    /// Print one JSON object per image to standard output
    #[arg(long)]
    pub json: bool,
}

/// One line of `--json`.
#[derive(Serialize)]
struct Line<'a> {
    path: &'a str,
    seed: u64,
    size: &'a str,
    prompt: &'a str,
    seconds: f64,
}

/// Runs `nextflow gen`. Stops at the first error; the images before it stay.
pub(super) fn run(args: &GenArgs) -> Result<()> {
    let request = Request::new(args)?;
    if args.dry_run {
        return plan(&request, args.json);
    }
    let needed = forecast(&request)?.peak();
    memory::check(needed, &request.device, "--quant q8_0, --quant q4_K, or a smaller --size")?;
    let level = match (args.quiet, args.verbose) {
        (true, _) => Level::Quiet,
        (_, true) => Level::Verbose,
        _ => Level::Normal,
    };
    let mut console = Console::new(level, request.images());
    let stop = terminal::interrupts()?;
    let started = Instant::now();
    console.loading();
    let model = Model::load(&request.source, &request.device, request.weights)?;
    console.detail(&format!("loaded {} in {:.2} s", request.model, started.elapsed().as_secs_f64()));
    if level == Level::Verbose {
        let unknown = request.config.compare(&request.source)?.1.unknown;
        if let Some(first) = unknown.first() {
            console.detail(&format!(
                "{} tensors are not used, {first} among them; nextflow info lists them",
                unknown.len()
            ));
        }
    }
    for job in request.jobs() {
        let started = Instant::now();
        console.start();
        let image = model.draw(&job, &mut |event| {
            console.event(&event);
            stop.check()
        })?;
        let settings = Settings::new(&job, &request.model, image.dimensions());
        let png = output::encode(&image, &settings)?;
        if stop.check().is_break() {
            return Err(terminal::interrupted());
        }
        let seconds = started.elapsed().as_secs_f64();
        let path = request.destination.save(&png, &job.prompt, job.seed)?;
        console.finish(&format!("seed {} · {} · {seconds:.2} s", job.seed, settings.size));
        let flow = match path {
            None => terminal::emit(&png)?,
            Some(path) => announce(args.json, &path, &job, &settings.size, seconds)?,
        };
        if flow.is_break() {
            break; // The reader of our output has gone: nobody wants the rest.
        }
    }
    Ok(())
}

/// What `--dry-run` tells.
#[derive(Serialize)]
struct Plan<'a> {
    model: &'a str,
    images: u64,
    seed: u64,
    size: String,
    scales: &'a [(usize, usize)],
    codes: usize,
    passes: usize,
    memory: Memory,
    peak_memory: u64,
}

fn forecast(request: &Request) -> Result<Memory> {
    let Request { config, source, weights, scales, sampling, device, .. } = request;
    cost::memory(config, source, *weights, scales, sampling, device)
}

fn plan(request: &Request, json: bool) -> Result<()> {
    let (config, scales, memory) = (&request.config, &request.scales, forecast(request)?);
    let stride = config.tokenizer.encoder.stride();
    let (h, w) = scales.last().copied().unwrap_or((0, 0));
    let plan = Plan {
        model: &request.model,
        images: request.images(),
        seed: request.seed,
        size: format!("{}x{}", w * stride, h * stride),
        scales,
        codes: schedule::codes(scales),
        passes: (0..scales.len()).map(|si| request.sampling.passes(si)).sum(),
        peak_memory: memory.peak(),
        memory,
    };
    if json {
        return terminal::emit_json(&plan).map(drop);
    }
    let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
    let Plan { model, images, seed, size, codes, passes, .. } = &plan;
    let Memory { transformer, cache, activations, tokenizer, decode, program } = plan.memory;
    let text = format!(
        "{images} x {size} with {model}, seed {seed}: {codes} codes in {} scales, {passes} passes\n\
         memory {}: transformer {}, cache {}, image tokenizer {}, at work {}, program {}\n",
        scales.len(),
        mb(plan.peak_memory),
        mb(transformer),
        mb(cache),
        mb(tokenizer),
        mb(activations.max(decode)),
        mb(program),
    );
    terminal::emit(text.as_bytes()).map(drop)
}

/// Prints what was saved, for people and scripts.
fn announce(json: bool, path: &Path, job: &Job, size: &str, seconds: f64) -> Result<ControlFlow<()>> {
    if !json {
        return terminal::emit_path(path);
    }
    let path = path.to_string_lossy();
    let seconds = (seconds * 1e3).round() / 1e3;
    terminal::emit_json(&Line { path: &path, seed: job.seed, size, prompt: &job.prompt, seconds })
}

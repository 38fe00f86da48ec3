//! `nextflow chat`: questions about images, one at a time or as a conversation.

mod host;
mod lines;
mod repl;
mod saved;

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use clap::Args;
use image::RgbImage;
use serde::Serialize;

use super::run::{Load, Run, memory_line};
use super::{LoadArgs, ReportArgs, request};
use crate::chat::{ChatConfig, ChatMemory, ChatModel, FinishReason, Picture, ReplyOptions, Session, TextSampling};
use crate::checkpoint::{Source, TRANSFORMER};
use crate::error::{Error, Result};
use crate::generate::{Sampling, Size};
use crate::io::input;
use crate::io::output::Destination;
use crate::pixels;
use crate::terminal::{self, Console};
use host::{Ask, Host};
use repl::Repl;

/// How an image comes from standard input.
const PIPE: &str = "nextflow gen \"a red apple\" -o - | nextflow chat -i - \"what is in the picture?\"";

/// Flags of `nextflow chat`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  nextflow chat -i photo.jpg \"what is this?\"\n  echo \"describe it\" | nextflow chat -i photo.jpg -\n  \
                        nextflow chat --model Qwen/Qwen2.5-VL-3B-Instruct --quant q8_0\n\nWithout TEXT every line of the \
                        terminal, or of standard input, is a message; type /help for the commands."
)]
pub struct ChatArgs {
    /// The message; `-` reads it from standard input; without it a conversation starts
    #[arg(value_name = "TEXT")]
    pub text: Option<String>,
    /// Image to talk about; repeat for several; `-` reads standard input
    #[arg(short, long = "image", help_heading = "Prompt", value_name = "FILE")]
    pub images: Vec<PathBuf>,
    /// System prompt [default: the model's]
    #[arg(long, help_heading = "Prompt", value_name = "TEXT")]
    pub system: Option<String>,
    /// Scale smaller images up to N pixels [default: the model's]
    #[arg(long, help_heading = "Prompt", value_name = "N", value_parser = clap::value_parser!(u32).range(784..))]
    pub min_pixels: Option<u32>,
    /// Scale larger images down to N pixels: fewer are faster and take less memory [default: the
    /// model's]
    #[arg(long, help_heading = "Prompt", value_name = "N", value_parser = clap::value_parser!(u32).range(784..))]
    pub max_pixels: Option<u32>,
    /// How text is sampled.
    #[command(flatten)]
    pub sampling: TextSamplingArgs,
    /// Write drawn images into FOLDER, under unused names [default: the current folder]
    #[arg(long, help_heading = "Output", value_name = "FOLDER")]
    pub out_dir: Option<PathBuf>,
    /// What is printed.
    #[command(flatten)]
    pub report: ReportArgs,
    /// The model.
    #[command(flatten)]
    pub load: LoadArgs,
}

/// How text is sampled.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct TextSamplingArgs {
    /// Maximum length of a reply, in tokens
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Random seed [default: random; printed with -v and --json]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Sampling temperature of text; 0 takes the most likely token [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Sample from the K most likely tokens [default: the model's]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Sample from the most likely tokens whose probabilities sum to P; 1 is off [default: the
    /// model's]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Above 1, repeated tokens become less likely [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,
}

/// The plan of `--dry-run`.
#[derive(Serialize)]
struct Plan {
    images: Vec<ImagePlan>,
    memory: ChatMemory,
    peak_memory: u64,
}

#[derive(Serialize)]
struct ImagePlan {
    file: String,
    tokens: usize,
}

/// Runs `nextflow chat`.
pub(super) fn run(args: &ChatArgs) -> Result<()> {
    let text = args.text.as_deref().map(message).transpose()?;
    check_message(args, text.as_deref())?;
    let images = pixels::open_all(&args.images, PIPE)?;
    let device = args.load.device.get()?;
    let folder = Destination::Folder { path: args.out_dir.clone().unwrap_or_default(), force: false };
    if args.out_dir.is_some() {
        folder.check()?;
    }
    let source = args.load.model.source()?;
    let mut config = ChatConfig::read(&source)?;
    source.check_type(TRANSFORMER, args.load.quant)?;
    config.check_images(images.len())?;
    configure(args, &mut config)?;
    let sampling = sampling(&args.sampling, config.sampling)?;
    // Before anything is counted in sizes that the weights may not have.
    source.check(TRANSFORMER, |w| config.build(w))?;
    let plan = plan(args, text.as_deref(), &config, &source, &images, &device)?;
    if args.report.dry_run {
        ChatModel::check(&source, &config)?;
        return plan.emit(args.report.json);
    }
    let smaller = "--quant q8_0, --quant q4_K, smaller images, or a smaller --max-tokens";
    let load = Load { source: Some(&source), device: &device, peak: plan.peak_memory, smaller };
    let Run { mut console, stop } = load.start(args.report.level(), 1)?;
    let model = console.load("the model", || ChatModel::load(&source, config, &device, args.load.quant))?;
    if !args.report.quiet {
        model.config().notes.iter().for_each(|note| terminal::note(note));
    }
    let pictures = read_images(args, &images, &model, &mut console)?;
    console.clear();
    let image = model.config().drawing.as_ref().map(|config| config.sampling.clone());
    let (seed, max_tokens) = (args.sampling.seed.unwrap_or_else(request::any_seed), args.sampling.max_tokens as usize);
    let mut session = Session::new(&model)?;
    if let Some(system) = &args.system {
        session.set_system(system);
    }
    let mut host = Host {
        options: ReplyOptions { sampling, max_tokens, image, seed, guide_from_sources: true },
        model: model.config().drawing.as_ref().map_or("Qwen2.5-VL".into(), |config| config.name.clone()),
        size: Size::Auto,
        images: folder,
        json: args.report.json,
        verbose: args.report.verbose,
        console,
        stop,
    };
    match text {
        None => Repl::new(&model, session, host, pictures, args.report.quiet)?.run(),
        Some(text) if text.starts_with('/') => {
            Repl::new(&model, session, host, pictures, args.report.quiet)?.once(&text)
        }
        Some(text) => {
            let reply = host.say(&mut session, pictures, &text, Ask::Answer)?;
            // A reader that goes away ends the reply as well, and is no error.
            match reply.ending == FinishReason::Interrupted && host.stop.check().is_break() {
                true => Err(terminal::interrupted()),
                false => Ok(()),
            }
        }
    }
}

/// Errors: usage, for a message that standard input cannot bring, and for text flags where no text
/// is generated.
fn check_message(args: &ChatArgs, text: Option<&str>) -> Result<()> {
    if text.is_none() && args.images.iter().any(|path| input::is_stdin(path)) {
        return Err(Error::usage("standard input holds the image, and there is no question")
            .hint("nextflow chat -i - \"what is in the picture?\""));
    }
    if text.is_some_and(|text| text.starts_with("/gen ")) {
        let flags = [
            (args.sampling.temperature.is_some(), "temperature"),
            (args.sampling.top_k.is_some(), "top-k"),
            (args.sampling.top_p.is_some(), "top-p"),
            (args.sampling.repetition_penalty.is_some(), "repetition-penalty"),
        ];
        if let Some((_, flag)) = flags.iter().find(|(given, _)| *given) {
            return Err(Error::usage(format!("--{flag} is about text, and /gen writes none"))
                .hint("leave it out, or nextflow gen, which has --temperature for images"));
        }
    }
    Ok(())
}

/// Sets the limits of image sizes.
///
/// Errors: usage, for flags that mean nothing to the model, and limits that contradict each other.
fn configure(args: &ChatArgs, config: &mut ChatConfig) -> Result<()> {
    if config.vision.is_none() && (args.min_pixels.is_some() || args.max_pixels.is_some()) {
        return Err(Error::usage("this model has no limits of pixels: it scales images to the size that it draws")
            .hint("leave out --min-pixels and --max-pixels"));
    }
    if config.drawing.is_none() && args.out_dir.is_some() {
        return Err(Error::usage("this model draws nothing that could go to --out-dir").hint("leave out --out-dir"));
    }
    if let Some((_, processor)) = &mut config.vision {
        processor.min_pixels = args.min_pixels.map_or(processor.min_pixels, |n| n as usize);
        processor.max_pixels = args.max_pixels.map_or(processor.max_pixels, |n| n as usize);
        if processor.min_pixels > processor.max_pixels {
            let message = format!("--min-pixels {} is above {}", processor.min_pixels, processor.max_pixels);
            return Err(Error::usage(message).hint(format!("--min-pixels {}", processor.max_pixels)));
        }
    }
    Ok(())
}

/// Encodes the images of `-i`, and reports each.
fn read_images(args: &ChatArgs, images: &[RgbImage], model: &ChatModel, console: &mut Console) -> Result<Vec<Picture>> {
    let pictures = args.images.iter().zip(images).map(|(path, image)| {
        let started = Instant::now();
        let picture = model.picture(&path.display().to_string(), image)?;
        console.detail(&format!(
            "read {} as {} tokens in {:.2} s",
            picture.name,
            picture.tokens(),
            started.elapsed().as_secs_f64()
        ));
        Ok(picture)
    });
    pictures.collect()
}

/// The value of TEXT, as a message.
fn message(text: &str) -> Result<String> {
    if text != "-" {
        return lines::check(text.as_bytes());
    }
    lines::check(&input::utf8(input::read(Path::new("-"), 16 << 20, "nextflow chat \"...\"")?))
}

/// The model's own sampling with the given settings in its place.
fn sampling(args: &TextSamplingArgs, defaults: TextSampling) -> Result<TextSampling> {
    if args.top_k == Some(0) {
        return Err(Error::usage("--top-k 0 is not 1 or more").hint("--top-k 50"));
    }
    let sampling = TextSampling {
        temperature: args.temperature.unwrap_or(defaults.temperature),
        top_k: args.top_k.or(defaults.top_k),
        top_p: args.top_p.unwrap_or(defaults.top_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(defaults.repetition_penalty),
    };
    let hint = "--temperature 0.7 --top-p 0.9 --repetition-penalty 1.05";
    sampling.check().map_err(|message| Error::usage(message).hint(hint))?;
    let greedy = Sampling { temperature: sampling.temperature, ..Sampling::default() };
    match request::without_effect(args.top_k, args.top_p, &greedy) {
        Some(flag) => Err(request::no_effect(flag)),
        None => Ok(sampling),
    }
}

/// Tokens and memory of the first answer.
///
/// Errors: usage, if they do not fit into the model's context.
fn plan(
    args: &ChatArgs,
    message: Option<&str>,
    config: &ChatConfig,
    source: &Source,
    images: &[RgbImage],
    device: &Device,
) -> Result<Plan> {
    let sizes = images.iter().map(|image| config.image_tokens(image.dimensions())).collect::<Result<Vec<_>>>()?;
    let of_images: usize = sizes.iter().map(|(_, tokens)| tokens).sum();
    let mut said = of_images;
    let tokenizer = source.text_of(config.backbone.vocab_size)?;
    for text in message.into_iter().chain(args.system.as_deref()) {
        said += tokenizer.encode(text)?.len();
    }
    let tokens = said + config.room(said)?.min(args.sampling.max_tokens as usize);
    let largest = sizes.iter().map(|(grid, _)| *grid).max_by_key(|(h, w)| h * w);
    let memory = config.memory(Some(source), args.load.quant, tokens, largest, device)?;
    let images = args.images.iter().zip(&sizes);
    let images = images.map(|(file, (_, tokens))| ImagePlan { file: file.display().to_string(), tokens: *tokens });
    Ok(Plan { images: images.collect(), peak_memory: memory.peak(), memory })
}

impl Plan {
    fn emit(&self, json: bool) -> Result<()> {
        if json {
            return terminal::emit_json(self).map(drop);
        }
        let mut text = String::new();
        for ImagePlan { file, tokens } in &self.images {
            text += &format!("{}: {tokens} tokens\n", terminal::clean(file));
        }
        text += &memory_line(self.peak_memory, &self.memory.parts());
        terminal::emit(text.as_bytes()).map(drop)
    }
}

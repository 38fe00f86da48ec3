//! `nextflow chat`: questions about images, one at a time or as a conversation.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use clap::Args;
use image::RgbImage;
use serde::Serialize;

use super::repl::Repl;
use super::{DeviceArgs, ModelArgs, lines, plan, request};
use crate::chat::{
    ChatConfig, ChatMemory, ChatModel, Ending, Picture, Reply, ReplyEvent, ReplyOptions, Session, TextSampling,
};
use crate::checkpoint::{Source, TRANSFORMER, WeightType};
use crate::error::{Error, Result};
use crate::generate::png_info::{self, PngInfo};
use crate::generate::{Job, Sampling, Size};
use crate::io::input;
use crate::io::output::Destination;
use crate::terminal::{self, Console, Level, Stop};
use crate::{memory, pixels};

/// How an image comes from standard input.
const PIPE: &str = "nextflow gen \"a red apple\" -o - | nextflow chat -i - \"what is in the picture?\"";

/// Flags of `nextflow chat`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  nextflow chat -i photo.jpg \"what is this?\"\n  echo \"describe it\" | nextflow chat -i photo.jpg -\n  \
                        nextflow chat --model Qwen/Qwen2.5-VL-3B-Instruct --quant q8_0\n\nWithout TEXT every line of the \
                        terminal, or of standard input, is a message; /help tells more."
)]
pub struct ChatArgs {
    /// What to say, or - to read it from standard input; without it a conversation begins
    #[arg(value_name = "TEXT")]
    pub text: Option<String>,
    /// An image to talk about; may be given several times; `-` reads standard input
    #[arg(short, long = "image", value_name = "FILE")]
    pub images: Vec<PathBuf>,
    /// Which model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What the model is told about itself [default: the model's]
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// The longest reply, in tokens
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Random seed [default: chosen, printed with -v and --json]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Sampling temperature of text; 0 always takes the likeliest token [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Draw text among the K likeliest tokens [default: the model's]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Draw text among the likeliest tokens whose probabilities sum to P; 1 keeps all [default: the model's]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Above 1: repeated tokens become less likely [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,
    /// Write drawn images, under unused names, into this folder [default: the current one]
    #[arg(long, value_name = "FOLDER")]
    pub out_dir: Option<PathBuf>,
    /// Enlarge smaller images to N pixels [default: the model's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(784..))]
    pub min_pixels: Option<u32>,
    /// Reduce larger images to N pixels: fewer are faster and take less memory [default: the model's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(784..))]
    pub max_pixels: Option<u32>,
    /// Keep the weights in this type [default: bytes and GGUF as stored, else f32 on a CPU and bf16 on a GPU]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub quant: Option<WeightType>,
    /// What computes.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Print a line of JSON per reply
    #[arg(long)]
    pub json: bool,
    /// Check everything, print tokens and memory, and make no reply
    #[arg(long)]
    pub dry_run: bool,
    /// Print replies and errors only
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Tell what is done, and how fast
    #[arg(short, long)]
    pub verbose: bool,
}

/// How replies are made, shown and kept.
pub(super) struct Host {
    pub options: ReplyOptions,
    /// The model's name, as it is stored with images.
    pub model: String,
    /// How large images are.
    pub size: Size,
    /// Where drawn images go.
    pub images: Destination,
    pub json: bool,
    pub verbose: bool,
    pub console: Console,
    pub stop: Stop,
}

/// One line of `--json`.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    reply: &'a Reply,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    images: Vec<String>,
    seed: u64,
    seconds: f64,
}

/// What is asked of the model.
#[derive(Clone, Copy)]
pub(super) enum Ask {
    /// An answer as it comes.
    Answer,
    /// An image that has nothing to do with those before, and no words.
    Image,
    /// An image that fits the conversation, and before it what it will be.
    Edit,
}

/// What `--dry-run` tells.
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
    if text.is_none() && args.images.iter().any(|path| input::is_stdin(path)) {
        return Err(Error::usage("standard input is to be the image, and there is no question")
            .hint("nextflow chat -i - \"what is in the picture?\""));
    }
    if text.as_ref().is_some_and(|text| text.starts_with("/gen ")) {
        let flags = [
            (args.temperature.is_some(), "temperature"),
            (args.top_k.is_some(), "top-k"),
            (args.top_p.is_some(), "top-p"),
            (args.repetition_penalty.is_some(), "repetition-penalty"),
        ];
        if let Some((_, flag)) = flags.iter().find(|(given, _)| *given) {
            return Err(Error::usage(format!("--{flag} is about words, and /gen says none"))
                .hint("leave it out, or nextflow gen, which has --temperature for images"));
        }
    }
    let images = pixels::open_all(&args.images, PIPE)?;
    let device = args.device.get()?;
    let folder = Destination::Folder { path: args.out_dir.clone().unwrap_or_default(), force: false };
    if args.out_dir.is_some() {
        folder.check()?;
    }
    let source = args.model.source()?;
    let mut config = ChatConfig::read(&source)?;
    source.check_type(TRANSFORMER, args.quant)?;
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
    let sampling = sampling(args, config.sampling)?;
    // Before anything is counted in sizes that the weights may not have.
    source.check(TRANSFORMER, |w| config.build(w))?;
    let plan = plan(args, text.as_deref(), &config, &source, &images, &device)?;
    if args.dry_run {
        ChatModel::check(&source, &config)?;
        return plan.emit(args.json);
    }
    memory::check(plan.peak_memory, &device, "--quant q8_0, --quant q4_K, smaller images, or a smaller --max-tokens")?;

    let stop = terminal::interrupts()?;
    let mut console = Console::new(Level::new(args.quiet, args.verbose), 1);
    let model = console.load("the model", || ChatModel::load(&source, config, &device, args.quant))?;
    if !args.quiet {
        model.config().notes.iter().for_each(|note| terminal::note(note));
    }
    let pictures = args.images.iter().zip(&images).map(|(path, image)| {
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
    let pictures = pictures.collect::<Result<Vec<_>>>()?;
    console.clear();
    let image = model.config().drawing.as_ref().map(|config| config.sampling.clone());
    let (seed, max_tokens) = (args.seed.unwrap_or_else(request::any_seed), args.max_tokens as usize);
    let mut session = Session::new(&model)?;
    if let Some(system) = &args.system {
        session.set_system(system);
    }
    let host = Host {
        options: ReplyOptions { sampling, max_tokens, image, seed, guide_from_sources: true },
        model: model.config().drawing.as_ref().map_or("Qwen2.5-VL".into(), |config| config.name.clone()),
        size: Size::Auto,
        images: folder,
        json: args.json,
        verbose: args.verbose,
        console,
        stop,
    };
    match text {
        None => Repl::new(&model, session, host, pictures, args.quiet)?.run(),
        Some(text) if text.starts_with('/') => Repl::new(&model, session, host, pictures, args.quiet)?.once(&text),
        Some(text) => {
            let mut host = host;
            let reply = host.say(&mut session, pictures, &text, Ask::Answer)?;
            // A reader that goes away ends the reply as well, and is no error.
            match reply.ending == Ending::Interrupted && host.stop.check().is_break() {
                true => Err(terminal::interrupted()),
                false => Ok(()),
            }
        }
    }
}

/// The value of TEXT, as a message.
fn message(text: &str) -> Result<String> {
    if text != "-" {
        return lines::check(text.as_bytes());
    }
    lines::check(&input::utf8(input::read(Path::new("-"), 16 << 20, "nextflow chat \"...\"")?))
}

/// The model's own sampling with the given settings in its place.
fn sampling(args: &ChatArgs, defaults: TextSampling) -> Result<TextSampling> {
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
/// Errors: usage, for what the model's context has no room for.
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
    let tokens = said + config.room(said)?.min(args.max_tokens as usize);
    let largest = sizes.iter().map(|(grid, _)| *grid).max_by_key(|(h, w)| h * w);
    let memory = config.memory(Some(source), args.quant, tokens, largest, device)?;
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
        text += &plan::memory(self.peak_memory, &self.memory.parts());
        terminal::emit(text.as_bytes()).map(drop)
    }
}

impl Host {
    /// Says something, shows the answer as it comes and keeps its images.
    pub fn say(&mut self, session: &mut Session, pictures: Vec<Picture>, text: &str, ask: Ask) -> Result<Reply> {
        let (started, mut first, mut lost, mut paths) = (Instant::now(), None, None, Vec::new());
        let mut seed = self.options.seed;
        let model = session.model();
        // Of another size than the image that is changed, or than usual.
        let asked = model.config().drawing.as_ref().filter(|_| self.size != Size::Auto);
        let asked = asked.map(|config| self.size.grids(config)).transpose()?;
        let Self { options, console, stop, .. } = self;
        console.start(1);
        let (json, name, images) = (self.json, &self.model, &self.images);
        let mut words_before = false;
        let mut hear = |heard: ReplyEvent| -> Result<ControlFlow<()>> {
            let flow = match heard {
                ReplyEvent::Read => ControlFlow::Continue(()),
                ReplyEvent::Words(words) => {
                    if !words.is_empty() {
                        first.get_or_insert_with(|| started.elapsed());
                        words_before = true;
                    }
                    if json { ControlFlow::Continue(()) } else { terminal::speak(words)? }
                }
                ReplyEvent::Drawing(event) => {
                    console.event(&event);
                    ControlFlow::Continue(())
                }
                ReplyEvent::Drawn(picture, drawn_with) => {
                    seed = drawn_with;
                    let Some(sampling) = options.image.clone() else { return Ok(ControlFlow::Continue(())) };
                    let image = model.decode(picture)?;
                    let png = png(&image, picture, text, sampling, seed, name)?;
                    console.clear();
                    let Some(path) = images.save(&png, text, seed)? else { return Ok(ControlFlow::Continue(())) };
                    picture.name = path.display().to_string();
                    paths.push(picture.name.clone());
                    let words = std::mem::take(&mut words_before) && !json;
                    let gap = if words { terminal::speak("\n")? } else { stop.check() };
                    if !json {
                        terminal::show(&image);
                    }
                    if json || gap.is_break() { gap } else { terminal::emit_path(&path)? }
                }
            };
            Ok(if flow.is_break() { flow } else { stop.check() })
        };
        let mut listen = |heard: ReplyEvent| {
            hear(heard).unwrap_or_else(|error| {
                lost.get_or_insert(error);
                ControlFlow::Break(())
            })
        };
        let reply = match ask {
            Ask::Answer => session.say(pictures, text, options, &mut listen),
            Ask::Image => {
                let silent = ReplyOptions { max_tokens: 0, ..options.clone() };
                let scales = asked.map_or_else(|| model.usual_scales(), Ok)?;
                session.draw_anew(pictures, text, &silent, &scales, &mut listen)
            }
            Ask::Edit => session.draw(pictures, text, options, asked.as_deref(), &mut listen),
        };
        if let Some(error) = lost {
            // An image that could not be kept could not be shown, changed or saved later: nothing was said.
            if reply.is_ok() {
                session.undo();
            }
            return Err(error);
        }
        let reply = reply?;
        let seconds = started.elapsed().as_secs_f64();
        if self.json {
            let seconds = (1e3 * seconds).round() / 1e3;
            let _ = terminal::emit_json(&Line { reply: &reply, images: paths, seed, seconds })?;
        } else if words_before || paths.is_empty() {
            let _ = terminal::speak("\n")?;
        }
        if self.verbose {
            let first = first.unwrap_or_default().as_secs_f64();
            let speed = (reply.tokens as f64 - 1.0).max(0.0) / (seconds - first).max(1e-9);
            terminal::note(&format!(
                "seed {seed} · {} tokens read, {} of them before · first word after {first:.2} s · {} tokens at {speed:.1}/s",
                reply.prompt_tokens, reply.cached_tokens, reply.tokens
            ));
        }
        if reply.ending == Ending::Length && !self.json {
            terminal::note("(cut at --max-tokens)");
        }
        Ok(reply)
    }
}

/// The PNG of an image that was drawn in a conversation, which it does not tell.
fn png(image: &RgbImage, picture: &Picture, text: &str, sampling: Sampling, seed: u64, model: &str) -> Result<Vec<u8>> {
    let scales = picture.codes().map(|codes| codes.scales.clone()).unwrap_or_default();
    let job = Job { prompt: text.into(), negative: None, scales, sampling, seed };
    png_info::encode(image, &PngInfo { conversation: true, ..PngInfo::new(&job, model, image.dimensions()) })
}

/// Opens an image for a conversation.
pub(super) fn picture(model: &ChatModel, path: &Path) -> Result<Picture> {
    if input::is_stdin(path) {
        return Err(Error::usage("standard input holds the conversation, no image").hint("/image FILE"));
    }
    model.picture(&path.display().to_string(), &pixels::open(path)?)
}

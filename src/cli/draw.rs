//! The flags that everything that draws has in common, and what is told of what was drawn.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use clap::Args;
use image::RgbImage;
use serde::Serialize;

use super::edit::EditArgs;
use super::per_scale::PerScale;
use super::request::Request;
use super::{DeviceArgs, ModelArgs};
use crate::checkpoint::WeightType;
use crate::error::{Error, Result};
use crate::generate::png_info::{self, PngInfo};
use crate::generate::{Batch, Event, Generator, Job, Sampling, sampler};
use crate::io::output::Destination;
use crate::terminal::{self, Console, Level, Preview, Stop};
use crate::tokenizer::Code;

/// What to draw, in words.
#[derive(Args, Clone, Debug, Default)]
#[command(group = clap::ArgGroup::new("text").args(["prompt", "words", "prompt_file"]))]
pub struct PromptArgs {
    /// What to draw, or how to change the image; `-` reads it from standard input
    #[arg(value_name = "PROMPT")]
    pub words: Option<OsString>,
    /// What to draw, or how to change the image; `-` reads it from standard input
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<OsString>,
    /// One prompt a line; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
}

/// How to draw, with what, and where to.
#[derive(Args, Clone, Debug, Default)]
pub struct DrawArgs {
    /// Random seed, or several: 3,7,11 [default: chosen, printed and stored]
    #[arg(long, value_name = "SEED", allow_negative_numbers = true, value_delimiter = ',', value_parser = seed)]
    pub seed: Vec<u64>,
    /// Images per prompt and seed, with seeds SEED, SEED+1, ...
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    pub count: u64,
    /// WIDTHxHEIGHT in pixels, WIDTH:HEIGHT as a ratio, or auto: a square, or like the image that is edited
    #[arg(long, default_value = "auto")]
    pub size: String,
    /// Guidance: how closely to follow the prompt. As in VAR, where 0, not 1, turns it off; for Infinity as its authors have it,
    /// where 1 is off, and a value for every scale will do: 4,4,3,... [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub cfg: Option<PerScale>,
    /// Guide the first N scales only; the others then take half the time [default: all]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub cfg_until: Option<usize>,
    /// Sampling temperature, or one for every scale; 0 always takes the likeliest code [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<PerScale>,
    /// Draw among the K likeliest codes [default: the model's]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Draw among the likeliest codes whose probabilities sum to P; 1 keeps all [default: the model's]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Write the image here; `-` writes the PNG to standard output
    #[arg(short, long, value_name = "FILE", conflicts_with = "out_dir")]
    pub output: Option<PathBuf>,
    /// Write the images, under unused names unless --force is given, into this folder [default: the current one]
    #[arg(long, value_name = "FOLDER")]
    pub out_dir: Option<PathBuf>,
    /// Replace files of the same name
    #[arg(long)]
    pub force: bool,
    /// Which model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Keep the transformer's weights in this type [default: bytes and GGUF as stored, else f32 on a CPU and bf16 on a GPU]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub quant: Option<WeightType>,
    /// What computes.
    #[command(flatten)]
    pub device: DeviceArgs,
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
    /// Show the image in the terminal as it grows, scale by scale
    #[arg(long, conflicts_with_all = ["json", "dry_run"])]
    pub preview: bool,
}

/// A seed, as typed.
fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("a seed is a whole number from 0 to {}", u64::MAX))
}

/// Seeds in words.
pub(super) fn told(seeds: &[u64]) -> String {
    let numbers: Vec<String> = seeds.iter().map(u64::to_string).collect();
    format!("seed{} {}", if seeds.len() > 1 { "s" } else { "" }, numbers.join(", "))
}

impl DrawArgs {
    /// Whether so many scales can be drawn as these flags say, with the `sampling` that they come to.
    ///
    /// Errors: usage, for scales that there are not, and guidance that is off.
    pub fn check_scales(&self, sampling: &Sampling, scales: usize) -> Result<()> {
        match self.cfg_until {
            Some(n) if n > scales => {
                let message = format!("--cfg-until {n}, but the image has {scales} scales");
                Err(Error::usage(message).hint(format!("--cfg-until {scales}")))
            }
            Some(n) if !sampling.is_guided() => {
                Err(Error::usage(format!("--cfg-until {n} without guidance guides nothing"))
                    .hint("--cfg 3, or leave it out"))
            }
            _ => Ok(()),
        }
    }

    /// The place for images on the terminal, if they are to be shown.
    ///
    /// Errors: usage, where they cannot.
    pub fn preview(&self) -> Result<Option<Preview>> {
        if !self.preview {
            return Ok(None);
        }
        match terminal::cannot_show() {
            Some(why) => Err(Error::usage(format!("--preview cannot show images: {why}")).hint(match why {
                "NO_COLOR is set" => "NO_COLOR= nextflow gen ..., or leave out --preview",
                "TERM is dumb" => "set TERM as your terminal does (TERM=xterm-256color), or leave out --preview",
                _ => "leave out --preview",
            })),
            None => Ok(Some(Preview::new(!self.verbose))),
        }
    }

    /// How much to say.
    pub fn level(&self) -> Level {
        Level::new(self.quiet, self.verbose)
    }
}

/// One line of `--json`.
#[derive(Serialize)]
pub(super) struct Line<'a> {
    path: Cow<'a, str>,
    seed: u64,
    size: &'a str,
    prompt: &'a str,
    /// What the model thought first.
    #[serde(skip_serializing_if = "Option::is_none")]
    thought: Option<&'a str>,
    seconds: f64,
}

/// Where the images of a run go.
pub(super) struct Delivery<'a> {
    pub request: &'a Request,
    pub console: Console,
    pub stop: Stop,
    pub json: bool,
    pub preview: Option<Preview>,
    /// What is changed, and how.
    pub edit: Option<&'a EditArgs>,
    /// What was written under names made of prompt and seed.
    saved: HashSet<PathBuf>,
}

impl<'a> Delivery<'a> {
    /// Without previews and sources.
    pub fn new(request: &'a Request, console: Console, stop: Stop, json: bool) -> Self {
        Self { request, console, stop, json, preview: None, edit: None, saved: HashSet::new() }
    }

    /// Tells of a step, and shows the first of the images as far as it is, of which `decode` makes pixels; `Break` when the
    /// user asked to stop.
    pub fn event(
        &mut self,
        event: &Event,
        decode: impl FnOnce(&[Vec<Code>], &[(usize, usize)]) -> Result<RgbImage>,
    ) -> ControlFlow<()> {
        if let (Event::Scale { codes, scales, drawn }, Some(preview)) = (event, &mut self.preview) {
            let first = |codes: &Tensor| sampler::to_host(&codes.narrow(0, 0, 1)?).map(|mut images| images.remove(0));
            let first: Result<Vec<_>, sampler::Fault> = codes.iter().map(first).collect();
            // The last scale is the image itself.
            let partial = first.ok().filter(|codes| codes.len() < *drawn);
            if let Some(image) = partial.and_then(|codes| decode(&codes, scales).ok()) {
                self.console.clear();
                preview.grow(&image);
            }
        }
        self.console.event(event);
        self.stop.check()
    }

    /// Draws some jobs in one pass over every scale. They differ in prompt and seed alone. Gives their images, and the time that
    /// each took.
    pub fn draw(&mut self, model: &Generator, jobs: &[&Job]) -> Result<(Vec<RgbImage>, Duration)> {
        let Some(first) = jobs.first() else { return Ok(Default::default()) };
        let started = Instant::now();
        self.console.start(jobs.len() as u64);
        let (prompts, seeds): (Vec<&str>, Vec<u64>) = jobs.iter().map(|job| (&*job.prompt, job.seed)).unzip();
        let batch = Batch { scales: &first.scales, sampling: &first.sampling, seeds: &seeds };
        let images = model.draw_batch(&prompts, first.negative.as_deref(), batch, &mut |event| {
            self.event(&event, |codes, scales| model.decode(codes, scales))
        })?;
        Ok((images, started.elapsed() / jobs.len() as u32))
    }

    /// Keeps an image that it `took` so long to draw and tells of it; `Break` when nobody wants more.
    pub fn deliver(
        &mut self,
        job: &Job,
        image: &RgbImage,
        thought: Option<&str>,
        took: Duration,
    ) -> Result<ControlFlow<()>> {
        let kept = self.keep(job, image, thought, took, &self.request.destination)?;
        match &kept.path {
            None => terminal::emit(&kept.png),
            Some(path) if !self.json => terminal::emit_path(path),
            Some(_) => terminal::emit_json(&kept.line(job, thought)),
        }
    }

    /// Keeps an image somewhere and tells the user, but not what reads the output.
    pub fn keep(
        &mut self,
        job: &Job,
        image: &RgbImage,
        thought: Option<&str>,
        took: Duration,
        to: &Destination,
    ) -> Result<Kept> {
        let settings = PngInfo {
            thought: thought.map(String::from),
            sources: self.edit.iter().flat_map(|edit| &edit.images).map(|path| path.to_string_lossy().into()).collect(),
            free: self.edit.is_some_and(|edit| edit.free),
            ..PngInfo::new(job, &self.request.model, image.dimensions())
        };
        let png = png_info::encode(image, &settings)?;
        if self.stop.check().is_break() {
            return Err(terminal::interrupted());
        }
        let seconds = took.as_secs_f64();
        let path = to.save_beside(&png, &job.prompt, job.seed, &mut self.saved)?;
        self.console.clear();
        if let Some(preview) = &mut self.preview {
            preview.end(image);
        }
        let said = thought.map(|thought| format!("{thought} · ")).unwrap_or_default();
        self.console.finish(&format!("{said}seed {} · {} · {seconds:.2} s", job.seed, settings.size));
        Ok(Kept { path, png, size: settings.size, seconds })
    }
}

/// An image that was kept.
pub(super) struct Kept {
    /// Nothing for standard output, which is not written yet.
    path: Option<PathBuf>,
    png: Vec<u8>,
    size: String,
    seconds: f64,
}

impl Kept {
    /// What `--json` tells of it.
    pub fn line<'a>(&'a self, job: &'a Job, thought: Option<&'a str>) -> Line<'a> {
        Line {
            path: self.path.as_deref().map(Path::to_string_lossy).unwrap_or_default(),
            seed: job.seed,
            size: &self.size,
            prompt: &job.prompt,
            thought,
            seconds: (self.seconds * 1e3).round() / 1e3,
        }
    }
}

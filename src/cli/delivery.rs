//! Where images go: saved, printed and previewed.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use image::RgbImage;
use serde::Serialize;

use super::request::Request;
use super::run::Run;
use crate::error::Result;
use crate::generate::png_info::{self, PngInfo};
use crate::generate::{Batch, Event, Generator, Job, prompt, sampler};
use crate::io::output::Destination;
use crate::memory;
use crate::terminal::{self, Console, Preview, Stop};
use crate::tokenizer::Code;
use crate::z_image::{DTYPE, TextEncoder, ZImage};

/// An image in `--json`.
#[derive(Serialize)]
pub(super) struct Line<'a> {
    path: Cow<'a, str>,
    seed: u64,
    size: &'a str,
    prompt: &'a str,
    /// What the model said before the image.
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
    /// The files that are edited.
    pub sources: Vec<String>,
    /// The edit is guided away from no image, rather than from the sources.
    pub free: bool,
    /// Files of this run whose names were made of prompt and seed.
    saved: HashSet<PathBuf>,
    /// Drawn images that are to be refined when all are drawn.
    held: Vec<Held>,
}

/// A drawn image, before it is refined.
struct Held {
    job: Job,
    image: RgbImage,
    thought: Option<String>,
    took: Duration,
}

impl Held {
    /// What the image shows. An instruction describes none, but the model may have said what it
    /// would draw.
    fn caption(&self) -> &str {
        let said = self.thought.as_deref().and_then(|thought| thought.split_once(prompt::FINAL));
        said.map(|(_, caption)| caption.trim()).filter(|caption| !caption.is_empty()).unwrap_or(&self.job.prompt)
    }
}

impl<'a> Delivery<'a> {
    /// Without previews and sources.
    pub fn new(request: &'a Request, Run { console, stop }: Run, json: bool) -> Self {
        let (preview, sources, free) = (None, Vec::new(), false);
        Self { request, console, stop, json, preview, sources, free, saved: HashSet::new(), held: Vec::new() }
    }

    /// Reports a step, and previews the first of the images with the pixels that `decode` makes of
    /// its codes. `Break` if the user interrupts.
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

    /// Draws jobs that differ in prompt and seed only as one batch. Returns their images, and the
    /// time per image.
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

    /// Saves an image and prints its path, PNG or JSON, with the time that it `took`; or holds it
    /// back until [`Self::finish`], if it is to be refined. `Break` if the reader of stdout is gone.
    pub fn emit(
        &mut self,
        job: &Job,
        image: &RgbImage,
        thought: Option<&str>,
        took: Duration,
    ) -> Result<ControlFlow<()>> {
        if self.request.refiner.is_some() {
            let thought = thought.map(String::from);
            self.held.push(Held { job: job.clone(), image: image.clone(), thought, took });
            return Ok(ControlFlow::Continue(()));
        }
        self.deliver(job, image, thought, took)
    }

    /// Refines and saves the images that were held back. The model that drew them should be dropped
    /// by then, and the text encoder is before the refiner is loaded: only one of the three is in
    /// memory.
    pub fn finish(mut self) -> Result<()> {
        let held = std::mem::take(&mut self.held);
        let request = self.request;
        let Some((refiner, source)) = request.refiner.as_ref().and_then(|r| Some((r, r.source.as_ref()?))) else {
            return Ok(());
        };
        memory::give_back();
        let (config, device) = (&refiner.config, &request.device);
        let features = self.console.load("the refiner's text encoder", || {
            let encoder = TextEncoder::load(source, config, DTYPE, device)?;
            held.iter().map(|held| encoder.encode(held.caption())).collect::<Result<Vec<_>>>()
        })?;
        memory::give_back();
        let model = self.console.load(&refiner.name, || ZImage::load(source, config, DTYPE, device))?;
        self.console.restart();
        for (held, features) in held.iter().zip(&features) {
            let started = Instant::now();
            self.console.start(1);
            let picture = refiner.prepare(&held.image, request.size);
            let refined = model.refine(&picture, features, (refiner.strength, held.job.seed), &mut |step, steps| {
                self.console.event(&Event::Refine { step, steps });
                self.stop.check()
            })?;
            let refined = refined.ok_or_else(terminal::interrupted)?;
            let took = held.took + started.elapsed();
            if self.deliver(&held.job, &refined, held.thought.as_deref(), took)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Saves an image and prints its path, PNG or JSON.
    fn deliver(
        &mut self,
        job: &Job,
        image: &RgbImage,
        thought: Option<&str>,
        took: Duration,
    ) -> Result<ControlFlow<()>> {
        let saved = self.save(job, image, thought, took, &self.request.destination)?;
        match &saved.path {
            None => terminal::emit(&saved.png),
            Some(path) if !self.json => terminal::emit_path(path),
            Some(_) => terminal::emit_json(&saved.line(job, thought)),
        }
    }

    /// Saves an image to `to` and reports it on stderr only.
    pub fn save(
        &mut self,
        job: &Job,
        image: &RgbImage,
        thought: Option<&str>,
        took: Duration,
        to: &Destination,
    ) -> Result<Saved> {
        let settings = PngInfo {
            thought: thought.map(String::from),
            sources: self.sources.clone(),
            free: self.free,
            refiner: self.request.refiner.as_ref().map(|refiner| refiner.name.clone()),
            refine_strength: self.request.refiner.as_ref().map(|refiner| refiner.strength),
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
        Ok(Saved { path, png, size: settings.size, seconds })
    }
}

/// An image that was saved.
pub(super) struct Saved {
    /// Nothing for standard output, which is still to be written.
    path: Option<PathBuf>,
    png: Vec<u8>,
    size: String,
    seconds: f64,
}

impl Saved {
    /// Its line of `--json`.
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

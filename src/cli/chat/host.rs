//! One exchange of a conversation: the reply is printed as it comes, and its images are saved.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use image::RgbImage;
use serde::Serialize;

use crate::chat::{ChatModel, FinishReason, Picture, Reply, ReplyEvent, ReplyOptions, Session};
use crate::error::{Error, Result};
use crate::generate::png_info::{self, PngInfo};
use crate::generate::prompt::EDIT;
use crate::generate::{Job, Sampling, Size};
use crate::io::input;
use crate::io::output::Destination;
use crate::pixels;
use crate::terminal::{self, Console, Stop};

/// How replies are made, printed and saved.
pub(super) struct Host {
    pub options: ReplyOptions,
    /// The model's name, as it is stored with images.
    pub model: String,
    /// Size of drawn images.
    pub size: Size,
    /// Where drawn images go.
    pub images: Destination,
    pub json: bool,
    pub verbose: bool,
    pub console: Console,
    pub stop: Stop,
}

/// What the model is to do.
#[derive(Clone, Copy)]
pub(super) enum Ask {
    /// An answer as it comes.
    Answer,
    /// An image without text, unrelated to those before.
    Image,
    /// An image that fits the conversation, after text that announces it.
    Edit,
}

/// A reply in `--json`.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    reply: &'a Reply,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    images: Vec<String>,
    seed: u64,
    seconds: f64,
}

impl Host {
    /// Sends a message, prints the reply as it comes and saves its images.
    pub fn say(&mut self, session: &mut Session, pictures: Vec<Picture>, text: &str, ask: Ask) -> Result<Reply> {
        let model = session.model();
        // Only where the user set a size: else an edit keeps the size of its source.
        let sized = model.config().drawing.as_ref().filter(|_| self.size != Size::Auto);
        let scales = sized.map(|config| self.size.grids(config)).transpose()?;
        self.console.start(1);
        let options = self.options.clone();
        let mut printer = ReplyPrinter::new(self, model, text);
        let observe = &mut |event: ReplyEvent| printer.event(event);
        let reply = match ask {
            Ask::Answer => session.say(pictures, text, &options, observe),
            Ask::Image => {
                let silent = ReplyOptions { max_tokens: 0, ..options };
                let scales = scales.map_or_else(|| model.usual_scales(), Ok)?;
                session.draw_anew(pictures, text, &silent, &scales, observe)
            }
            Ask::Edit => session.draw(pictures, &format!("{EDIT}{text}"), &options, scales.as_deref(), observe),
        };
        if let Some(error) = printer.error.take() {
            // An image that was not saved cannot be shown, edited or saved later: the exchange is
            // taken back.
            if reply.is_ok() {
                session.undo();
            }
            return Err(error);
        }
        let reply = reply?;
        printer.finish(&reply)?;
        Ok(reply)
    }
}

/// Prints a reply, event by event.
struct ReplyPrinter<'a> {
    host: &'a mut Host,
    model: &'a ChatModel,
    /// The message that is answered.
    message: &'a str,
    started: Instant,
    /// Time to the first text.
    first: Option<Duration>,
    /// Text has been printed since the last image.
    in_line: bool,
    /// Of saved images.
    paths: Vec<String>,
    /// Of the last image, or of the reply.
    seed: u64,
    /// What stopped the reply.
    error: Option<Error>,
}

impl<'a> ReplyPrinter<'a> {
    fn new(host: &'a mut Host, model: &'a ChatModel, message: &'a str) -> Self {
        let (seed, started, paths) = (host.options.seed, Instant::now(), Vec::new());
        Self { host, model, message, started, first: None, in_line: false, paths, seed, error: None }
    }

    /// `Break` if the user interrupts, the reader of stdout is gone, or an image cannot be saved.
    fn event(&mut self, event: ReplyEvent) -> ControlFlow<()> {
        let flow = match event {
            ReplyEvent::Read => Ok(ControlFlow::Continue(())),
            ReplyEvent::Text(text) => self.text(text),
            ReplyEvent::Drawing(event) => {
                self.host.console.event(&event);
                Ok(ControlFlow::Continue(()))
            }
            ReplyEvent::Drawn(picture, seed) => self.image(picture, seed),
        };
        match flow {
            Ok(ControlFlow::Continue(())) => self.host.stop.check(),
            Ok(stop) => stop,
            Err(error) => {
                self.error.get_or_insert(error);
                ControlFlow::Break(())
            }
        }
    }

    fn text(&mut self, text: &str) -> Result<ControlFlow<()>> {
        if !text.is_empty() {
            self.first.get_or_insert_with(|| self.started.elapsed());
            self.in_line = true;
        }
        if self.host.json { Ok(ControlFlow::Continue(())) } else { terminal::speak(text) }
    }

    /// Saves an image, and prints it and its path.
    fn image(&mut self, picture: &mut Picture, seed: u64) -> Result<ControlFlow<()>> {
        self.seed = seed;
        let json = self.host.json;
        let Some(sampling) = self.host.options.image.clone() else { return Ok(ControlFlow::Continue(())) };
        let image = self.model.decode(picture)?;
        let png = png(&image, picture, self.message, sampling, seed, &self.host.model)?;
        self.host.console.clear();
        let Some(path) = self.host.images.save(&png, self.message, seed)? else { return Ok(ControlFlow::Continue(())) };
        picture.name = path.display().to_string();
        self.paths.push(picture.name.clone());
        let in_line = std::mem::take(&mut self.in_line) && !json;
        let flow = if in_line { terminal::speak("\n")? } else { self.host.stop.check() };
        if json {
            return Ok(flow);
        }
        terminal::show(&image);
        if flow.is_break() { Ok(flow) } else { terminal::emit_path(&path) }
    }

    /// The end of the reply: its line of JSON or the end of the last line, then speed and notes.
    fn finish(self, reply: &Reply) -> Result<()> {
        let (host, seed, seconds) = (self.host, self.seed, self.started.elapsed().as_secs_f64());
        if host.json {
            let seconds = (1e3 * seconds).round() / 1e3;
            let _ = terminal::emit_json(&Line { reply, images: self.paths, seed, seconds })?;
        } else if self.in_line || self.paths.is_empty() {
            let _ = terminal::speak("\n")?;
        }
        if host.verbose {
            let first = self.first.unwrap_or_default().as_secs_f64();
            let speed = (reply.tokens as f64 - 1.0).max(0.0) / (seconds - first).max(1e-9);
            terminal::note(&format!(
                "seed {seed} · {} tokens read, {} of them cached · first token after {first:.2} s · {} tokens at {speed:.1}/s",
                reply.prompt_tokens, reply.cached_tokens, reply.tokens
            ));
        }
        if reply.ending == FinishReason::Length && !host.json {
            terminal::note("(cut at --max-tokens)");
        }
        Ok(())
    }
}

/// The PNG of an image drawn in a conversation, which its settings do not hold.
fn png(image: &RgbImage, picture: &Picture, text: &str, sampling: Sampling, seed: u64, model: &str) -> Result<Vec<u8>> {
    let scales = picture.codes().map(|codes| codes.scales.clone()).unwrap_or_default();
    let job = Job { prompt: text.into(), negative: None, scales, sampling, seed };
    png_info::encode(image, &PngInfo { conversation: true, ..PngInfo::new(&job, model, image.dimensions()) })
}

/// Reads an image file into the conversation.
pub(super) fn picture(model: &ChatModel, path: &Path) -> Result<Picture> {
    if input::is_stdin(path) {
        return Err(Error::usage("standard input holds the conversation, not an image").hint("/image FILE"));
    }
    model.picture(&path.display().to_string(), &pixels::open(path)?)
}

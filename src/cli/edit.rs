//! `nextflow edit`: change images by saying how.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::draw::{Delivery, DrawArgs, PromptArgs};
use super::plan::Plan;
use super::request::Request;
use crate::chat::Frame;
use crate::chat::{ChatConfig, ChatModel, ReplyEvent, ReplyOptions, Session};
use crate::error::{Error, Result};
use crate::generate::schedule;
use crate::terminal::{self, Console};
use crate::tokenizer::Code;
use crate::{memory, pixels};

/// Flags of `nextflow edit`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  nextflow edit -i apple.png -p \"make the background light blue\" -o blue.png\n  \
                  nextflow edit -i scene.png \"remove the red circle\" --count 4\n  \
                  echo \"把背景变成浅蓝色\" | nextflow edit -i cat.png -\n  \
                  nextflow gen \"a blue star\" -o - | nextflow edit -i - \"make it red\" -o red.png\n\nThe image is scaled to the model's size and centred; \
                  the result is cropped to the ratio of the first image, unless --size asks for another.")]
pub struct EditArgs {
    /// The image to change; may be given several times; `-` reads standard input
    #[arg(short, long = "image", value_name = "FILE", required = true)]
    pub images: Vec<PathBuf>,
    /// What to change.
    #[command(flatten)]
    pub words: PromptArgs,
    /// Follow the instruction more freely: guidance then does not hold on to the sources
    #[arg(long)]
    pub free: bool,
    /// How to draw.
    #[command(flatten)]
    pub draw: DrawArgs,
}

/// How an image comes from standard input.
const PIPE: &str = "nextflow gen \"a blue star\" -o - | nextflow edit -i - \"make it red\"";
/// Tokens of what stands around a prompt or an instruction, for the forecast.
pub(super) const AROUND: usize = 48;
/// The most words that the model says before it draws.
const THOUGHT: usize = 64;

/// Runs `nextflow edit`. Stops at the first error; the images before it stay.
pub(super) fn run(args: &EditArgs) -> Result<()> {
    let sources = pixels::open_all(&args.images, PIPE)?;
    let Some(first) = sources.first() else { return Err(no_image()) };
    let request = Request::new(&args.words, &args.draw)?;
    let model = request.config.nextflow()?;
    if args.free && request.sampling.cfg == 0.0 {
        return Err(Error::usage("--free without guidance changes nothing").hint("leave out --free, or --cfg 3"));
    }
    let frame = Frame::of(model, first.dimensions(), request.size)?;
    args.draw.check_scales(&request.sampling, frame.scales.len())?;
    let config = ChatConfig::read(&request.source)?;
    let read = sources.iter().map(|image| config.image_tokens(image.dimensions()).map(|(_, tokens)| tokens));
    let said = read.sum::<Result<usize>>()? + request.tokens + AROUND;
    config.room(said)?;
    let tokens = said + THOUGHT + schedule::codes(&frame.scales);
    let memory =
        config.memory(Some(&request.source), request.weights, tokens, frame.scales.last().copied(), &request.device)?;
    let preview = args.draw.preview()?;
    if args.draw.dry_run {
        ChatModel::check(&request.source, &config)?;
        let plan = Plan::new(&request, frame.size(), &frame.scales, memory, memory.peak());
        return plan.emit(args.draw.json, &memory.parts());
    }
    memory::check(memory.peak(), &request.device, "--quant q8_0, --quant q4_K, or a smaller --size")?;
    let mut console = Console::new(args.draw.level(), request.images());
    let stop = terminal::interrupts()?;
    let load = || ChatModel::load(&request.source, config, &request.device, request.weights);
    let model = console.load(&request.model, load)?;
    let mut pictures = vec![model.encode("$1", &frame.fit(first), &frame.scales)?];
    for (n, image) in sources.iter().enumerate().skip(1) {
        pictures.push(model.picture(&format!("${}", n + 1), image)?);
    }
    let mut session = Session::new(&model)?;
    let mut delivery = Delivery::new(&request, console, stop, args.draw.json);
    (delivery.preview, delivery.edit) = (preview, Some(args));
    for job in request.jobs(&frame.scales) {
        let started = Instant::now();
        delivery.console.start(1);
        let options = ReplyOptions {
            sampling: model.config().sampling,
            max_tokens: THOUGHT,
            image: Some(job.sampling.clone()),
            seed: job.seed,
            guide_from_sources: !args.free,
        };
        let reply = session.draw(pictures.clone(), &job.prompt, &options, Some(&frame.scales), &mut |heard| {
            let pixels = |codes: &[Vec<Code>], scales: &[_]| Ok(frame.cut(&model.pixels(codes, scales)?));
            match heard {
                ReplyEvent::Drawing(event) => delivery.event(&event, pixels),
                _ => delivery.stop.check(),
            }
        })?;
        let image = frame.cut(&model.decode(session.last_image().ok_or_else(|| model.draws_nothing())?)?);
        // The sources stay in the cache for the next one.
        session.undo();
        let thought = Some(reply.text.trim()).filter(|thought| !thought.is_empty());
        if delivery.deliver(&job, &image, thought, started.elapsed())?.is_break() {
            break;
        }
    }
    Ok(())
}

fn no_image() -> Error {
    Error::usage("there is no image to change").hint("nextflow edit -i star.png -p \"make it red\"")
}

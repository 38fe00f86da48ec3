//! `nextflow edit`: change images by saying how.

mod onecat;

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use image::RgbImage;

use super::delivery::Delivery;
use super::request::{Request, TEMPLATE_TOKENS};
use super::run::{Load, Plan};
use super::{DrawArgs, PromptArgs};
use crate::chat::{ChatConfig, ChatModel, Letterbox, Picture, ReplyEvent, ReplyOptions, Session};
use crate::error::{Error, Result};
use crate::generate::refinement::{CodeRefiner, Refined};
use crate::generate::{GeneratorConfig, Job, cost, prompt, schedule};
use crate::pixels;
use crate::tokenizer::Code;

/// Flags of `nextflow edit`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  nextflow edit -i apple.png -p \"make the background light blue\" -o blue.png\n  \
                  nextflow edit -i scene.png \"remove the red circle\" --count 4\n  \
                  echo \"把背景变成浅蓝色\" | nextflow edit -i cat.png -\n  \
                  nextflow gen \"a blue star\" -o - | nextflow edit -i - \"make it red\" -o red.png\n\nThe image is scaled to the model's size and centred; \
                  the result is cropped to the ratio of the first image, unless --size is given.\n\
                  OneCAT reads the image in its own ratio, and draws in the nearest of 15.")]
pub struct EditArgs {
    /// Image to edit; repeat for several; `-` reads standard input
    #[arg(short, long = "image", help_heading = "Prompt", value_name = "FILE", required = true)]
    pub images: Vec<PathBuf>,
    /// The instructions.
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// Follow the instruction more freely: guidance does not hold on to the source images
    #[arg(long, help_heading = "Sampling")]
    pub free: bool,
    /// OneCAT only: how much the instruction alone, without the image, counts beside both; 0 is off
    /// [default: 1]
    #[arg(long, help_heading = "Sampling", value_name = "X", allow_negative_numbers = true)]
    pub image_cfg: Option<f64>,
    /// What `gen` and `edit` share.
    #[command(flatten)]
    pub draw: DrawArgs,
}

/// How an image comes from standard input.
const PIPE: &str = "nextflow gen \"a blue star\" -o - | nextflow edit -i - \"make it red\"";

/// Runs `nextflow edit`. Stops at the first error; the images before it stay.
pub(super) fn run(args: &EditArgs) -> Result<()> {
    let sources = pixels::open_all(&args.images, PIPE)?;
    let Some(first) = sources.first() else { return Err(no_image()) };
    let mut request = Request::new(&args.prompts, &args.draw)?;
    if args.draw.sampling.refine.is_none() {
        request.sampling.refine = 0;
    }
    if let GeneratorConfig::OneCat(setup) = &request.config {
        let setup = setup.clone();
        return onecat::run(args, &setup, request, &sources);
    }
    let model = request.config.nextflow()?;
    args.check(&request)?;
    let letterbox = Letterbox::of(model, first.dimensions(), request.size)?;
    args.draw.sampling.check_scales(&request.sampling, letterbox.scales.len())?;
    let config = ChatConfig::read(&request.source)?;
    let read = sources.iter().map(|image| config.image_tokens(image.dimensions()).map(|(_, tokens)| tokens));
    let said = read.sum::<Result<usize>>()? + request.tokens + TEMPLATE_TOKENS;
    config.room(said)?;
    let tokens = said + prompt::MAX_THOUGHT + schedule::codes(&letterbox.scales);
    let memory = config.memory(
        Some(&request.source),
        request.weights,
        tokens,
        letterbox.scales.last().copied(),
        &request.device,
    )?;
    let refines = request.sampling.refine > 0;
    let on = (&request.source, request.weights, &request.device);
    let peak = memory.peak() + if refines { cost::refiner(model, on, &letterbox.scales, 1)? } else { 0 };
    let times = model.upscale(&request.sampling) as u32;
    let size = (letterbox.size().0 * times, letterbox.size().1 * times);
    let preview = args.draw.output.preview(args.draw.report.verbose)?;
    if args.draw.report.dry_run {
        ChatModel::check(&request.source, &config)?;
        let plan = Plan::new(&request, size, &letterbox.scales, memory, peak)?;
        return plan.emit(args.draw.report.json, &memory.parts());
    }
    let smaller = "--quant q8_0, --quant q4_K, or a smaller --size";
    let (peak, smaller) = request.limit(size, peak, smaller)?;
    let load = Load { source: Some(&request.source), device: &request.device, peak, smaller };
    let mut run = load.start(args.draw.report.level(), request.images())?;
    let load = || ChatModel::load(&request.source, config, &request.device, request.weights);
    let model = run.console.load(&request.model, load)?;
    let refiner = match request.sampling.refine {
        0 => None,
        _ => Some(CodeRefiner::load(&request.source, request.config.nextflow()?, (&request.device, request.weights))?),
    };
    let mut pictures = vec![model.encode("$1", &letterbox.apply(first), &letterbox.scales)?];
    for (n, image) in sources.iter().enumerate().skip(1) {
        pictures.push(model.picture(&format!("${}", n + 1), image)?);
    }
    let editor = Editor { model: &model, refiner, letterbox: &letterbox, sources: pictures, free: args.free };
    let mut session = Session::new(&model)?;
    let mut delivery = Delivery::new(&request, run, args.draw.report.json);
    (delivery.preview, delivery.free) = (preview, args.free);
    delivery.sources = args.images.iter().map(|path| path.to_string_lossy().into()).collect();
    for job in request.jobs(&letterbox.scales) {
        let started = Instant::now();
        delivery.console.start(1);
        let (image, text) = editor.edit(&mut session, &job, &mut delivery)?;
        let thought = Some(text.trim()).filter(|thought| !thought.is_empty());
        if delivery.emit(&job, &image, thought, started.elapsed())?.is_break() {
            break;
        }
    }
    drop((session, editor));
    drop(model);
    delivery.finish()
}

impl EditArgs {
    /// Errors: usage, for flags without effect on the model of the request.
    fn check(&self, request: &Request) -> Result<()> {
        if self.image_cfg.is_some() {
            return Err(Error::usage(format!("--image-cfg is for OneCAT, this is {}", request.model))
                .hint("leave it out, or --model onecat-ai/OneCAT-3B"));
        }
        if self.free && request.sampling.cfg == 0.0 {
            return Err(Error::usage("--free without guidance changes nothing").hint("leave out --free, or --cfg 3"));
        }
        Ok(())
    }
}

/// A model, and the images that it edits.
struct Editor<'a> {
    model: &'a ChatModel,
    refiner: Option<CodeRefiner>,
    letterbox: &'a Letterbox,
    sources: Vec<Picture>,
    /// Guidance does not hold on to the sources.
    free: bool,
}

impl Editor<'_> {
    /// The image of a job, cropped, and the text before it. The sources stay in the session's cache
    /// for the next one.
    fn edit(&self, session: &mut Session, job: &Job, delivery: &mut Delivery) -> Result<(RgbImage, String)> {
        let Self { model, letterbox, .. } = *self;
        let options = ReplyOptions {
            sampling: model.config().sampling,
            max_tokens: prompt::MAX_THOUGHT,
            image: Some(job.sampling.clone()),
            seed: job.seed,
            guide_from_sources: !self.free,
        };
        let scales = Some(&letterbox.scales[..]);
        let request = format!("{}{}", prompt::EDIT, job.prompt);
        let reply = session.draw(self.sources.clone(), &request, &options, scales, &mut |heard| {
            let pixels = |codes: &[Vec<Code>], scales: &[_]| Ok(letterbox.crop(&model.pixels(codes, scales)?));
            match heard {
                ReplyEvent::Drawing(event) => delivery.event(&event, pixels),
                _ => delivery.stop.check(),
            }
        })?;
        let drawn = session.last_image().ok_or_else(|| model.draws_nothing())?;
        let mut image = model.decode(drawn)?;
        if let (Some(refiner), Some(codes)) = (&self.refiner, drawn.codes()) {
            // The instruction describes no image; what the model says that it will draw does.
            let caption = reply.text.split_once(prompt::FINAL).map_or("", |(_, caption)| caption.trim());
            let refined = Refined { codes: &codes.codes, caption, seed: job.seed };
            image = refiner.refine(image, &codes.scales, refined, job.sampling.refine, &mut |event| {
                delivery.event(&event, |codes, scales| model.pixels(codes, scales))
            })?;
        }
        session.undo();
        Ok((letterbox.crop(&image), reply.text))
    }
}

fn no_image() -> Error {
    Error::usage("there is no image to change").hint("nextflow edit -i star.png -p \"make it red\"")
}

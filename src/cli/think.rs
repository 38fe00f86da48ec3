//! `nextflow gen --think`: reasoning in words, then the image that it comes to (the paper's chain of thought).

use std::ops::ControlFlow;
use std::time::Instant;

use super::draw::{self, Line};
use crate::chat::{ChatConfig, ChatModel, Heard, Manner, Part, Session};
use crate::error::{Error, Kind, Result};
use crate::generate::prompt::THINK;
use crate::output::{self, Settings};
use crate::request::Request;
use crate::terminal::{self, Console, Stop};

/// The most words that it thinks.
const LONGEST: usize = 256;

/// Thinks about every prompt of `request` and draws. Stops at the first error; the images before it stay.
pub(super) fn run(
    request: &Request,
    scales: &[(usize, usize)],
    json: bool,
    mut console: Console,
    stop: &Stop,
) -> Result<()> {
    let model = ChatModel::load(&request.source, ChatConfig::read(&request.source)?, &request.device, request.weights)?;
    let words = model.config().sampling;
    for job in request.jobs(scales) {
        let started = Instant::now();
        console.start();
        let image = Some(job.sampling.clone());
        let manner = Manner { words, longest: LONGEST, image, seed: job.seed, guide_from_sources: true };
        let mut session = Session::new(&model)?;
        let reply = session.say(Vec::new(), &format!("{THINK}{}", job.prompt), &manner, &mut |heard| {
            if let Heard::Drawing(event) = heard {
                console.event(&event);
            }
            match stop.check() {
                ControlFlow::Continue(()) => ControlFlow::Continue(()),
                flow => flow,
            }
        })?;
        if stop.check().is_break() {
            return Err(terminal::interrupted());
        }
        let Some(picture) = session.turns().last().and_then(|turn| turn.parts.iter().find_map(Part::image)) else {
            let message = format!("the model thought {:?} and drew nothing", reply.text.trim());
            return Err(Error::new(Kind::Failure, message).hint("leave out --think, or say it in other words"));
        };
        let image = model.decode(picture)?;
        let settings = Settings::new(&job, &request.model, image.dimensions());
        let png = output::encode(&image, &settings)?;
        let seconds = started.elapsed().as_secs_f64();
        let path = request.destination.save(&png, &job.prompt, job.seed)?;
        let thought = reply.text.trim();
        console.finish(&format!("{thought} · seed {} · {} · {seconds:.2} s", job.seed, settings.size));
        let thought = Some(thought);
        let line = Line { path: "", seed: job.seed, size: &settings.size, prompt: &job.prompt, thought, seconds };
        let flow = match path {
            None => terminal::emit(&png)?,
            Some(path) => draw::announce(json, &path, line)?,
        };
        if flow.is_break() {
            break;
        }
    }
    Ok(())
}

//! `nextflow gen --think`: reasoning in text, then the image that follows from it (the paper's
//! chain of thought).

use std::time::Instant;

use crate::chat::{ChatConfig, ChatMemory, ChatModel, ReplyEvent, ReplyOptions, Session};
use crate::cli::delivery::Delivery;
use crate::cli::request::{Request, TEMPLATE_TOKENS};
use crate::error::Result;
use crate::generate::prompt::THINK;
use crate::generate::schedule;

/// Most tokens of its reasoning.
const LONGEST: usize = 256;

/// The memory that it takes.
pub(super) fn forecast(request: &Request, config: &ChatConfig, scales: &[(usize, usize)]) -> Result<ChatMemory> {
    let said = request.tokens + TEMPLATE_TOKENS;
    config.room(said)?;
    let tokens = said + LONGEST + schedule::codes(scales);
    config.memory(Some(&request.source), request.weights, tokens, scales.last().copied(), &request.device)
}

/// Thinks about every prompt and draws. Stops at the first error; the images before it stay.
pub(super) fn run(delivery: &mut Delivery, config: ChatConfig, scales: &[(usize, usize)]) -> Result<()> {
    let request = delivery.request;
    let load = || ChatModel::load(&request.source, config, &request.device, request.weights);
    let model = delivery.console.load(&request.model, load)?;
    let sampling = model.config().sampling;
    for job in request.jobs(scales) {
        let started = Instant::now();
        delivery.console.start(1);
        let image = Some(job.sampling.clone());
        let options = ReplyOptions { sampling, max_tokens: LONGEST, image, seed: job.seed, guide_from_sources: true };
        let mut session = Session::new(&model)?;
        let text = format!("{THINK}{}", job.prompt);
        let reply = session.draw(Vec::new(), &text, &options, Some(scales), &mut |heard| match heard {
            ReplyEvent::Drawing(event) => delivery.event(&event, |codes, scales| model.pixels(codes, scales)),
            _ => delivery.stop.check(),
        })?;
        let image = model.decode(session.last_image().ok_or_else(|| model.draws_nothing())?)?;
        if delivery.emit(&job, &image, Some(reply.text.trim()), started.elapsed())?.is_break() {
            break;
        }
    }
    Ok(())
}

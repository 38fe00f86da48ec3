//! `nextflow edit` with OneCAT: one image, read as patches, and an instruction.

use std::time::Instant;

use image::RgbImage;

use super::EditArgs;
use crate::cli::delivery::Delivery;
use crate::cli::request::{self, Request, TEMPLATE_TOKENS};
use crate::cli::run::{Load, Plan};
use crate::error::{Error, Result};
use crate::generate::Batch;
use crate::generate::cost::Work;
use crate::generate::onecat::{OneCatModel, OneCatSetup};
use crate::onecat::patches;

/// Edits the one image of `sources` in the ratio that is nearest to its own. Stops at the first
/// error; the images before it stay.
pub(super) fn run(args: &EditArgs, setup: &OneCatSetup, mut request: Request, sources: &[RgbImage]) -> Result<()> {
    let [image] = sources else {
        return Err(Error::usage(format!("{} edits one image, not {}", setup.name, sources.len()))
            .hint("nextflow edit -i IMAGE -p TEXT for each of them"));
    };
    if args.free {
        return Err(Error::usage(format!("--free is not for {}, which has two strengths of guidance", setup.name))
            .hint("leave out --free, or --image-cfg 0 and another --cfg"));
    }
    request.sampling = request::sampling(&args.draw.sampling, setup.edit_sampling());
    request.sampling.image_cfg = args.image_cfg.or(request.sampling.image_cfg);
    if let Some((flag, value, rule)) = request.sampling.fault() {
        return Err(Error::usage(format!("--{flag} {value} is not {rule}")).hint("--image-cfg 1"));
    }
    let scales = setup.grids_like(request.size, image.dimensions())?;
    request.sampling.check(scales.len())?;
    args.draw.sampling.check_scales(&request.sampling, scales.len())?;
    let (h, w) = patches::edit_grid(&setup.transformer, image.dimensions(), scales.len())?;
    let (read, context) = (h * w + request.tokens + TEMPLATE_TOKENS, setup.transformer.context);
    if read > context {
        return Err(Error::usage(format!("image and instruction have {read} tokens, the model's limit is {context}"))
            .hint("a shorter instruction, or --size 512x512, for which the image is read at fewer pixels"));
    }
    let report = &args.draw.report;
    let Request { source, weights, device, tokens, sampling, prompts, .. } = &request;
    let work = Work { scales: &scales, images: 1, text_tokens: *tokens, sampling, prompts: prompts.len() };
    let memory = setup.memory(Some(source), *weights, work, Some(h * w), device)?;
    let preview = args.draw.output.preview(report.verbose)?;
    if report.dry_run {
        setup.check(source, true)?;
        let plan = Plan::new(&request, setup.pixels(&scales), &scales, memory, memory.peak())?;
        return plan.emit(report.json, &memory.parts());
    }
    let smaller = "--quant q8_0, --quant q4_K, or a smaller --size";
    let (peak, smaller) = request.limit(setup.pixels(&scales), memory.peak(), smaller)?;
    let load = Load { source: Some(source), device, peak, smaller };
    let mut run = load.start(report.level(), request.images())?;
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let load = || OneCatModel::load(source, setup, (device, *weights), &prompts, Some((image, scales.len())));
    let model = run.console.load(&request.model, load)?;
    let seconds = model.reading().as_secs_f64();
    run.console
        .detail(&format!("of that, {seconds:.2} s to read the image, as {} tokens, and the instructions", h * w));
    let mut delivery = Delivery::new(&request, run, report.json);
    delivery.preview = preview;
    delivery.sources = args.images.iter().map(|path| path.to_string_lossy().into()).collect();
    for job in request.jobs(&scales) {
        let started = Instant::now();
        delivery.console.start(1);
        let batch = Batch { scales: &scales, sampling: &job.sampling, seeds: &[job.seed] };
        let images = model.edit_batch(&[&job.prompt], batch, &mut |event| {
            delivery.event(&event, |codes, scales| model.decode(codes, scales))
        })?;
        for image in &images {
            if delivery.emit(&job, image, None, started.elapsed())?.is_break() {
                return Ok(()); // The reader of our output has gone: nobody wants the rest.
            }
        }
    }
    drop(model);
    delivery.finish()
}

//! `nextflow gen --from`: draws again with the settings stored in a PNG.

use std::ffi::OsString;
use std::path::Path;

use super::GenArgs;
use crate::cli::per_scale::PerScale;
use crate::error::{Error, Result};
use crate::generate::Guidance;
use crate::generate::png_info::{self, PngInfo};
use crate::io::input;

/// The largest PNG that is read, in bytes.
const MAX_PNG: u64 = 256 << 20;

/// The flags, completed from the settings stored in a PNG, and those settings.
pub(super) fn filled(args: &GenArgs, path: &Path) -> Result<(GenArgs, PngInfo)> {
    const HINT: &str = "name a PNG that nextflow gen drew; other programs may have removed its text chunks";
    let other = |why: &str| Error::usage(format!("{} {why}", input::shown(path)));
    let png = input::piped(path, MAX_PNG, HINT)?;
    let Some(old) = PngInfo::of_png(&png) else {
        return Err(match png_info::stranger(&png) {
            Some(what) => other(&what).hint("name a PNG that nextflow gen drew"),
            None => other("holds no nextflow settings").hint(HINT),
        });
    };
    // A file's content never becomes part of a command to copy.
    if old.conversation {
        return Err(other("was drawn in a conversation, which is not stored").hint("nextflow chat"));
    }
    let again = |command: &str| format!("{command} --seed {}, with the flags that it was drawn with", old.seed);
    if !old.sources.is_empty() {
        return Err(other("is an edit").hint(again("nextflow edit -i IMAGE -p TEXT")));
    }
    if old.thought.is_some() {
        return Err(other("was drawn with --think").hint(again("nextflow gen --think -p TEXT")));
    }
    if old.prompt == "-" && args.prompts.prompt.is_none() && args.prompts.positional.is_none() {
        return Err(other("has the prompt -, which means standard input").hint("echo - | nextflow gen --from FILE -"));
    }
    let mut args = args.clone();
    let draw = &mut args.draw.sampling;
    if args.prompts.prompt.is_none() && args.prompts.positional.is_none() {
        args.prompts.prompt = Some(old.prompt.clone().into());
    }
    if draw.seed.is_empty() {
        draw.seed = vec![old.seed];
    }
    if draw.size == "auto" {
        draw.size = old.size.clone();
    }
    draw.cfg = draw.cfg.take().or(Some(PerScale::of(old.cfg, &old.cfg_scales)));
    let off: &[f64] = if old.guidance == Guidance::Ramp { &[0.0] } else { &[0.0, 1.0] };
    let guided = !draw.cfg.as_ref().is_some_and(|cfg| cfg.is_all(off));
    args.negative = args.negative.or(old.negative.clone().map(OsString::from).filter(|_| guided));
    draw.temperature = draw.temperature.take().or(Some(PerScale::of(old.temperature, &old.temperature_scales)));
    if !draw.temperature.as_ref().is_some_and(|temperature| temperature.is_all(&[0.0])) {
        draw.top_k = draw.top_k.or(old.top_k);
        draw.top_p = draw.top_p.or(Some(old.top_p));
    }
    // Without guidance there is nothing to end.
    draw.cfg_until = draw.cfg_until.or(old.cfg_until.filter(|_| guided));
    if args.cfg_layers.is_empty() {
        args.cfg_layers = old.cfg_layers.clone();
    }
    let sampling = &args.draw.sampling;
    if args.draw.refiner.refiner.is_none() && sampling.refine.is_none() && !sampling.no_refine {
        args.draw.refiner.refiner.clone_from(&old.refiner);
        args.draw.refiner.stored = true;
    }
    if args.draw.refiner.refiner.is_some() {
        args.draw.refiner.refine_strength = args.draw.refiner.refine_strength.or(old.refine_strength);
    }
    args.draft = args.draft.or(old.draft).or(Some(0));
    args.passes = args.passes.or(old.passes);
    Ok((args, old))
}

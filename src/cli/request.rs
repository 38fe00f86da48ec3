//! One checked request: everything that can be refused is refused here, before weights load.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use candle_core::Device;

use super::per_scale::PerScale;
use super::refiner::PictureRefiner;
use super::{DrawArgs, OutputArgs, PromptArgs, ReportArgs, SamplingArgs};
use crate::checkpoint::{Source, TRANSFORMER, WeightType};
use crate::error::{Error, Result};
use crate::generate::refinement;
use crate::generate::{GeneratorConfig, Job, MAX_REFINE_STEPS, PromptCounter, Sampling, Size};
use crate::io::input::{self, shown};
use crate::io::output::{self, Destination};
use crate::text;

/// What to draw, with what, and where to.
pub struct Request {
    /// Every one of them is drawn with every seed; none where jobs have their own.
    pub prompts: Vec<String>,
    /// The negative prompt, if it is not the model's own.
    pub negative: Option<String>,
    /// Counts the tokens of prompts.
    pub counter: PromptCounter,
    /// Tokens of the longest of the prompts.
    pub tokens: usize,
    /// With all of them; never empty.
    pub seeds: Vec<u64>,
    /// Images per prompt and seed; their seeds count up.
    pub count: u64,
    /// How large they are to be.
    pub size: Size,
    /// How codes are sampled.
    pub sampling: Sampling,
    /// Another model, which refines.
    pub refiner: Option<PictureRefiner>,
    /// Where images go.
    pub destination: Destination,
    /// Where weights come from.
    pub source: Source,
    /// The model's config.
    pub config: GeneratorConfig,
    /// The model's name, with the weight type of `--quant`.
    pub model: String,
    /// The weight type of `--quant`.
    pub weights: Option<WeightType>,
    /// What computes.
    pub device: Device,
}

impl Request {
    /// Checks the flags of `nextflow gen` or `nextflow edit`, and the files and folders that they
    /// name.
    pub fn new(typed: &PromptArgs, args: &DrawArgs) -> Result<Self> {
        Self::of(args, || prompts(typed))
    }

    /// The same without prompts: every job of a file brings its own.
    pub fn of_jobs(args: &DrawArgs) -> Result<Self> {
        Self::of(args, || Ok(Vec::new()))
    }

    fn of(args: &DrawArgs, prompts: impl FnOnce() -> Result<Vec<String>>) -> Result<Self> {
        check_sampler(&args.sampling)?;
        args.refiner.check()?;
        let size: Size = args.sampling.size.parse()?;
        if args.sampling.count == 0 {
            return Err(Error::usage("--count 0 draws nothing").hint("--count 1"));
        }
        let seeds = if args.sampling.seed.is_empty() { vec![any_seed()] } else { args.sampling.seed.clone() };
        if let Some(seed) = seeds.iter().find(|seed| seed.checked_add(args.sampling.count - 1).is_none()) {
            let message = format!("seeds from {seed} on do not leave room for --count {}", args.sampling.count);
            return Err(Error::usage(message).hint(format!("--seed {}", u64::MAX - (args.sampling.count - 1))));
        }
        let mut order = seeds.clone();
        order.sort_unstable();
        if let Some(pair) = order.windows(2).find(|pair| pair[1] - pair[0] < args.sampling.count) {
            return Err(Error::usage(format!("seed {} would be drawn twice", pair[1])).hint(format!(
                "name each once, so far apart: --seed {},{}",
                pair[0],
                pair[0].saturating_add(args.sampling.count)
            )));
        }
        let prompts = prompts()?;
        let destination =
            destination(&args.output, &args.report, prompts.len() * seeds.len() > 1 || args.sampling.count > 1)?;
        let device = args.load.device.get()?;
        destination.check()?;
        let source = args.load.model.source()?;
        let config = GeneratorConfig::read(&source)?;
        source.check_type(TRANSFORMER, args.load.quant)?;
        let counter = config.prompt_counter(&source)?;
        let tokens = longest(&prompts, &counter)?;
        let model = args.load.quant.map_or(config.name().into(), |weights| format!("{} ({weights})", config.name()));
        let (mut sampling, weights) = (sampling(&args.sampling, config.sampling().clone()), args.load.quant);
        let offline = args.load.model.is_offline();
        let refiner = args.refiner.get(offline, args.report.dry_run)?;
        refiner.as_ref().map_or(Ok(()), |refiner| refiner.check_size(size))?;
        sampling.refine = if refiner.is_some() { 0 } else { refine(&args.sampling, &config, size)? };
        if let Some(flag) = without_effect(args.sampling.top_k, args.sampling.top_p, &sampling) {
            return Err(no_effect(flag));
        }
        let count = args.sampling.count;
        let negative = None;
        Ok(Self {
            prompts,
            negative,
            counter,
            tokens,
            seeds,
            count,
            size,
            sampling,
            refiner,
            destination,
            source,
            config,
            model,
            weights,
            device,
        })
    }

    /// Images in all.
    pub fn images(&self) -> u64 {
        self.count.saturating_mul((self.prompts.len() * self.seeds.len()) as u64)
    }

    /// The images of the grids `scales` one by one, prompt after prompt.
    pub fn jobs<'a>(&'a self, scales: &'a [(usize, usize)]) -> impl Iterator<Item = Job> + 'a {
        let seeds = move || self.seeds.iter().flat_map(|seed| (0..self.count).map(move |i| seed + i));
        self.prompts.iter().flat_map(move |prompt| {
            seeds().map(move |seed| Job {
                prompt: prompt.clone(),
                negative: self.negative.clone(),
                scales: scales.into(),
                sampling: self.sampling.clone(),
                seed,
            })
        })
    }
}

/// Tokens around a prompt or an instruction in a model's chat template, for forecasts.
pub(super) const TEMPLATE_TOKENS: usize = 48;

/// A seed from the operating system's entropy (through the keys of std's hasher); 32 bits are
/// easily typed again.
pub fn any_seed() -> u64 {
    RandomState::new().hash_one(0) >> 32
}

/// Steps of the refiner for an image of a size. Where the flags leave it to the model, an exact
/// size that only the picture without refinement has turns it off.
///
/// Errors: usage, for steps of a refiner that the model does not have.
pub(super) fn refine(args: &SamplingArgs, config: &GeneratorConfig, size: Size) -> Result<usize> {
    if args.no_refine {
        return Ok(0);
    }
    let Some(usual) = config.refiner_steps() else {
        return if args.refine.is_some() { Err(refinement::none(config.name())) } else { Ok(0) };
    };
    if let Some(steps) = args.refine {
        return Ok(steps.unwrap_or(usual));
    }
    let refined = config.sampling();
    let plain = Sampling { refine: 0, ..refined.clone() };
    let only_plain = matches!(size, Size::Pixels { .. })
        && config.grids(size, refined).is_err()
        && config.grids(size, &plain).is_ok();
    Ok(if only_plain { 0 } else { refined.refine })
}

/// Refuses a number of steps that no refinement has.
pub(super) fn check_refine(steps: Option<usize>) -> Result<()> {
    const MAX: usize = MAX_REFINE_STEPS;
    match steps.filter(|steps| !(1..=MAX).contains(steps)) {
        None => Ok(()),
        Some(steps) => Err(Error::usage(format!("--refine={steps} is not a number of steps from 1 to {MAX}"))
            .hint("--refine, or leave it out")),
    }
}

/// Refuses sampler values that mean nothing, whatever the model.
pub(crate) fn check_sampler(args: &SamplingArgs) -> Result<()> {
    args.refine.map_or(Ok(()), check_refine)?;
    let Some((flag, value, rule)) = sampling(args, Sampling::default()).fault() else { return Ok(()) };
    let example = match flag {
        "cfg" => "3",
        "temperature" => "1",
        "top-k" => "100",
        _ => "0.95",
    };
    Err(Error::usage(format!("--{flag} {value} is not {rule}")).hint(format!("--{flag} {example}")))
}

/// Tokens of the longest prompt.
fn longest(prompts: &[String], counter: &PromptCounter) -> Result<usize> {
    let mut longest = 0;
    for (i, prompt) in prompts.iter().enumerate() {
        let located = |e: Error| match prompts.len() {
            1 => e,
            of => Error { message: format!("prompt {} of {of}: {}", i + 1, e.message), ..e },
        };
        longest = longest.max(counter.count(prompt).map_err(located)?);
    }
    Ok(longest)
}

/// Which of the given filters changes nothing, because the likeliest code is taken anyway.
pub(crate) fn without_effect(top_k: Option<usize>, top_p: Option<f64>, sampling: &Sampling) -> Option<&'static str> {
    match sampling.temperature == 0.0 {
        true if top_k.is_some() => Some("top-k"),
        // 1 is off.
        true if top_p.is_some_and(|p| p < 1.0) => Some("top-p"),
        _ => None,
    }
}

/// The error of a filter where the likeliest is taken anyway.
pub(super) fn no_effect(flag: &str) -> Error {
    Error::usage(format!("--{flag} has no effect with --temperature 0, which takes the likeliest"))
        .hint(format!("leave out --{flag}, or --temperature 1"))
}

/// Checks a negative prompt; returns it with its number of tokens.
///
/// Errors: usage, for a bad or too long prompt, and if none of the `scales` scales is guided.
pub(crate) fn negative(
    text: Option<&[u8]>,
    counter: &PromptCounter,
    sampling: &Sampling,
    scales: usize,
) -> Result<Option<(String, usize)>> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    if sampling.guided_scales(scales) == 0 {
        return Err(Error::usage("a negative prompt without guidance leads away from nothing")
            .hint("leave out one of them, or set cfg to 3"));
    }
    let located = |e: Error| Error { message: format!("negative: {}", e.message), ..e };
    let text = text::check_prompt(text).map_err(located)?;
    let tokens = counter.count(&text).map_err(located)?;
    Ok(Some((text, tokens)))
}

/// The model's own sampling with the given settings in its place.
pub(crate) fn sampling(args: &SamplingArgs, defaults: Sampling) -> Sampling {
    let each = |given: &Option<PerScale>, usual: Vec<f64>| given.as_ref().map_or(usual, |given| given.each().to_vec());
    Sampling {
        cfg: args.cfg.as_ref().map_or(defaults.cfg, PerScale::first),
        cfg_scales: each(&args.cfg, defaults.cfg_scales),
        temperature: args.temperature.as_ref().map_or(defaults.temperature, PerScale::first),
        temperature_scales: each(&args.temperature, defaults.temperature_scales),
        top_k: args.top_k.or(defaults.top_k),
        top_p: args.top_p.unwrap_or(defaults.top_p),
        later_passes: defaults.later_passes,
        refine: defaults.refine,
        cfg_until: args.cfg_until.or(defaults.cfg_until),
        // Only `gen` leaves scales out.
        draft: 0,
        guidance: defaults.guidance,
        cfg_layers: defaults.cfg_layers,
        image_cfg: defaults.image_cfg,
    }
}

/// Bytes read of a prompt file or standard input.
const MAX_INPUT: u64 = 16 << 20;

fn prompts(args: &PromptArgs) -> Result<Vec<String>> {
    if let Some(path) = &args.prompt_file {
        return lines(&read(path)?, path);
    }
    match args.prompt.as_deref().or(args.positional.as_deref()) {
        Some(prompt) if prompt == "-" => {
            let bytes = read(Path::new("-"))?;
            Ok(vec![text::check_prompt(trim_newline(&bytes))?])
        }
        Some(prompt) => Ok(vec![text::check_prompt(prompt.as_encoded_bytes())?]),
        None => Err(Error::usage("there is no prompt").hint("-p \"a red apple\", or --prompt-file FILE")),
    }
}

/// One prompt a line; empty lines are passed over.
fn lines(bytes: &[u8], path: &Path) -> Result<Vec<String>> {
    let mut prompts = Vec::new();
    for (i, line) in bytes.split(|b| *b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if !line.is_empty() {
            let located = |e: Error| {
                let message = format!("line {} of {}: {}", i + 1, shown(path), e.message);
                let encoding = || "iconv -f WINDOWS-1252 -t UTF-8 FILE, or with the encoding that it has".into();
                let hint = if std::str::from_utf8(line).is_err() { Some(encoding()) } else { e.hint };
                Error { message, hint, ..e }
            };
            prompts.push(text::check_prompt(line).map_err(located)?);
        }
    }
    if prompts.is_empty() {
        return Err(Error::usage(format!("{} holds no prompt", shown(path))).hint("write one prompt a line into it"));
    }
    Ok(prompts)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    input::read(path, MAX_INPUT, "--prompt-file FILE, of up to 16 MB, or - for standard input").map(input::utf8)
}

fn trim_newline(bytes: &[u8]) -> &[u8] {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    bytes.strip_suffix(b"\r").unwrap_or(bytes)
}

fn destination(args: &OutputArgs, report: &ReportArgs, several: bool) -> Result<Destination> {
    let Some(path) = &args.output else {
        return Ok(Destination::Folder { path: args.out_dir.clone().unwrap_or_default(), force: args.force });
    };
    if several {
        return Err(Error::usage("-o names one file, but several images are to be drawn").hint("--out-dir FOLDER"));
    }
    if !output::is_stdout(path) {
        return Ok(Destination::File { path: PathBuf::from(path), force: args.force });
    }
    if report.json || args.force {
        return Err(for_files(if report.json { "--json" } else { "--force" }));
    }
    no_terminal()?;
    Ok(Destination::Stdout)
}

/// The error of a flag that means something for files only.
pub(crate) fn for_files(flag: &str) -> Error {
    Error::usage(format!("{flag} has no meaning with -o -")).hint(format!("drop {flag}, or use -o FILE"))
}

/// Refuses to send a PNG to a terminal.
pub fn no_terminal() -> Result<()> {
    match io::stdout().is_terminal() {
        true => {
            Err(Error::usage("a terminal cannot show the bytes of a PNG").hint("-o image.png, or -o - > image.png"))
        }
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampler_values_are_checked() {
        let with = |set: &dyn Fn(&mut SamplingArgs)| {
            let mut args = SamplingArgs::default();
            set(&mut args);
            check_sampler(&args).map(|()| args)
        };
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0] {
            assert_eq!(with(&|a| a.cfg = Some(PerScale::of(bad, &[]))).unwrap_err().exit_code(), 2);
            assert_eq!(with(&|a| a.temperature = Some(PerScale::of(bad, &[1.0, bad]))).unwrap_err().exit_code(), 2);
            assert_eq!(with(&|a| a.top_p = Some(bad)).unwrap_err().exit_code(), 2);
        }
        assert!(with(&|a| a.top_k = Some(0)).is_err());
        assert!(with(&|a| a.top_p = Some(0.0)).is_err());
        assert!(with(&|a| a.top_p = Some(1.01)).is_err());
        let defaults = Sampling { cfg: 3.0, top_k: Some(5), top_p: 0.9, ..Sampling::default() };
        assert_eq!(sampling(&with(&|_| ()).unwrap(), defaults.clone()), defaults);
        let greedy =
            with(&|a| (a.temperature, a.cfg) = (Some(PerScale::of(0.0, &[])), Some(PerScale::of(0.0, &[])))).unwrap();
        assert_eq!(sampling(&greedy, defaults.clone()), Sampling { cfg: 0.0, temperature: 0.0, ..defaults });
    }

    #[test]
    fn prompt_files_hold_one_prompt_a_line() {
        let path = Path::new("p.txt");
        assert_eq!(lines(b"a cat\r\n\r\n  \na dog", path).unwrap(), ["a cat", "a dog"]);
        assert_eq!(lines(b"\n\n", path).unwrap_err().exit_code(), 2);
        let error = lines(b"a cat\n\xff\xfe\n", path).unwrap_err();
        assert!(error.message.starts_with("line 2 of p.txt: "), "{}", error.message);
    }
}

//! One checked request: everything that can be refused is refused here, before weights load.

use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::Device;

use crate::checkpoint::{Source, WeightType};
use crate::cli::GenArgs;
use crate::error::{Error, Result};
use crate::generate::{Job, ModelConfig, Sampling, TRANSFORMER, schedule};
use crate::output::Destination;
use crate::{device, text};

/// What to draw, with what, and where to.
pub struct Request {
    /// Every one of them is drawn with every seed.
    pub prompts: Vec<String>,
    /// The first seed.
    pub seed: u64,
    /// Images per prompt; their seeds count up.
    pub count: u64,
    /// Grids (height, width) coarse to fine.
    pub scales: Vec<(usize, usize)>,
    /// How codes are drawn.
    pub sampling: Sampling,
    /// Where images go.
    pub destination: Destination,
    /// Where weights come from.
    pub source: Source,
    /// The model's config.
    pub config: ModelConfig,
    /// The name of the model, and its weights' type if one was asked for.
    pub model: String,
    /// The weights' type, if one was asked for.
    pub weights: Option<WeightType>,
    /// What computes.
    pub device: Device,
}

impl Request {
    /// Checks the flags of `nextflow gen` and the files and folders that they name.
    pub fn new(args: &GenArgs) -> Result<Self> {
        check_sampler(args)?;
        let size: Size = args.size.parse()?;
        if args.count == 0 {
            return Err(Error::usage("--count 0 draws nothing").hint("--count 1"));
        }
        let seed = args.seed.unwrap_or_else(any_seed);
        if seed.checked_add(args.count - 1).is_none() {
            let message = format!("seeds from {seed} on do not leave room for --count {}", args.count);
            return Err(Error::usage(message).hint(format!("--seed {}", u64::MAX - (args.count - 1))));
        }
        let prompts = prompts(args)?;
        let destination = destination(args, prompts.len() as u64 > 1 || args.count > 1)?;
        let device = device::parse(&args.device)?;
        destination.check()?;
        let source = args.model.source()?;
        let config = ModelConfig::read(&source)?;
        let scales = size.grids(&config)?;
        if args.quant.is_some() && source.is_gguf(TRANSFORMER) {
            let message = format!("the weights of {source} have their type already");
            return Err(Error::usage(message).hint("leave out --quant"));
        }
        let model = args.quant.map_or(config.name.clone(), |weights| format!("{} ({weights})", config.name));
        let (sampling, weights) = (sampling(args, config.sampling.clone()), args.quant);
        let count = args.count;
        Ok(Self { prompts, seed, count, scales, sampling, destination, source, config, model, weights, device })
    }

    /// Images in all.
    pub fn images(&self) -> u64 {
        self.count.saturating_mul(self.prompts.len() as u64)
    }

    /// The images one by one, prompt after prompt.
    pub fn jobs(&self) -> impl Iterator<Item = Job> + '_ {
        let seeds = move || (0..self.count).map(|i| self.seed + i);
        self.prompts.iter().flat_map(move |prompt| {
            seeds().map(move |seed| Job {
                prompt: prompt.clone(),
                scales: self.scales.clone(),
                sampling: self.sampling.clone(),
                seed,
            })
        })
    }
}

/// A seed from the operating system's entropy (through the keys of std's hasher); 32 bits are easily typed again.
pub fn any_seed() -> u64 {
    RandomState::new().hash_one(0) >> 32
}

/// Refuses sampler values that mean nothing, whatever the model.
fn check_sampler(args: &GenArgs) -> Result<()> {
    let refuse = |flag: &str, value: f64, rule: &str, example: &str| {
        Err(Error::usage(format!("--{flag} {value} is not {rule}")).hint(format!("--{flag} {example}")))
    };
    for (flag, value, example) in [("cfg", args.cfg, "3"), ("temperature", args.temperature, "1")] {
        if let Some(x) = value.filter(|x| !(x.is_finite() && *x >= 0.0)) {
            return refuse(flag, x, "a finite number of 0 or more", example);
        }
    }
    if args.top_k == Some(0) {
        return refuse("top-k", 0.0, "1 or more", "100");
    }
    match args.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
        Some(p) => refuse("top-p", p, "above 0 and at most 1", "0.95"),
        None => Ok(()),
    }
}

/// The model's own sampling with the given settings in its place.
fn sampling(args: &GenArgs, defaults: Sampling) -> Sampling {
    Sampling {
        cfg: args.cfg.unwrap_or(defaults.cfg),
        temperature: args.temperature.unwrap_or(defaults.temperature),
        top_k: args.top_k.or(defaults.top_k),
        top_p: args.top_p.unwrap_or(defaults.top_p),
        refine: defaults.refine,
    }
}

/// Bytes read of a prompt file or standard input.
const MAX_INPUT: u64 = 16 << 20;

fn prompts(args: &GenArgs) -> Result<Vec<String>> {
    if let Some(path) = &args.prompt_file {
        return lines(&read(path)?, path);
    }
    match args.prompt.as_deref().or(args.words.as_deref()) {
        Some(prompt) if prompt == "-" => {
            let bytes = read(Path::new("-"))?;
            Ok(vec![text::check_prompt(trim_newline(&bytes))?])
        }
        Some(prompt) => Ok(vec![text::check_prompt(prompt.as_encoded_bytes())?]),
        None => Err(Error::usage("there is no prompt").hint("nextflow gen -p \"a red apple\"")),
    }
}

/// One prompt a line; empty lines are passed over.
fn lines(bytes: &[u8], path: &Path) -> Result<Vec<String>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut prompts = Vec::new();
    for (i, line) in bytes.split(|b| *b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if !line.is_empty() {
            let located =
                |e: Error| Error { message: format!("line {} of {}: {}", i + 1, shown(path), e.message), ..e };
            prompts.push(text::check_prompt(line).map_err(located)?);
        }
    }
    if prompts.is_empty() {
        return Err(Error::usage(format!("{} holds no prompt", shown(path))).hint("write one prompt a line into it"));
    }
    Ok(prompts)
}

/// The content of a file, or of standard input for `-`.
fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let result = match path == OsStr::new("-") {
        true => io::stdin().lock().take(MAX_INPUT + 1).read_to_end(&mut bytes),
        false => File::open(path).and_then(|file| file.take(MAX_INPUT + 1).read_to_end(&mut bytes)),
    };
    let failed = |e| {
        Error::usage(format!("cannot read {}: {e}", shown(path))).hint("--prompt-file FILE, or - for standard input")
    };
    result.map_err(failed)?;
    if bytes.len() as u64 > MAX_INPUT {
        let message = format!("{} is longer than {} MB", shown(path), MAX_INPUT >> 20);
        return Err(Error::usage(message).hint("split it into several files"));
    }
    Ok(bytes)
}

fn shown(path: &Path) -> String {
    if path == OsStr::new("-") { "standard input".into() } else { path.display().to_string() }
}

fn trim_newline(bytes: &[u8]) -> &[u8] {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    bytes.strip_suffix(b"\r").unwrap_or(bytes)
}

fn destination(args: &GenArgs, several: bool) -> Result<Destination> {
    let Some(path) = &args.output else {
        return Ok(Destination::Folder(args.out_dir.clone().unwrap_or_default()));
    };
    if several {
        return Err(Error::usage("-o names one file, but several images are to be drawn").hint("--out-dir FOLDER"));
    }
    if path != OsStr::new("-") {
        return Ok(Destination::File { path: PathBuf::from(path), force: args.force });
    }
    if args.json || args.force {
        let flag = if args.json { "--json" } else { "--force" };
        return Err(
            Error::usage(format!("{flag} has no meaning with -o -")).hint(format!("drop {flag}, or use -o FILE"))
        );
    }
    if io::stdout().is_terminal() {
        return Err(Error::usage("a terminal cannot show the bytes of a PNG").hint("-o - > image.png"));
    }
    Ok(Destination::Stdout)
}

/// What `--size` asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// What fits the task; a square for `gen`.
    Auto,
    /// Height over width, at the model's full size.
    Ratio(f64),
    /// Exactly so many pixels.
    Pixels {
        /// Columns.
        width: u64,
        /// Rows.
        height: u64,
    },
}

/// Pixels per cell of a grid, along each side.
const STRIDE: u64 = 16;

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown =
            || Error::usage(format!("--size {text} is not a size")).hint("--size 128x128, --size 16:9 or --size auto");
        if text == "auto" {
            return Ok(Self::Auto);
        }
        if let Some((width, height)) = text.split_once(['x', 'X']) {
            let digits = |s: &str| Some(s).filter(|s| s.bytes().all(|b| b.is_ascii_digit()))?.parse().ok();
            let (Some(width), Some(height)) = (digits(width), digits(height)) else { return Err(unknown()) };
            return Ok(Self::Pixels { width, height });
        }
        let (width, height) = text.split_once(':').ok_or_else(unknown)?;
        let number = |s: &str| s.parse::<f64>().ok().filter(|x| x.is_finite() && *x > 0.0);
        let (Some(width), Some(height)) = (number(width), number(height)) else { return Err(unknown()) };
        // The rounding of 1:4 and 4:1 is not to be held against them.
        match height / width {
            ratio if (0.249..=4.001).contains(&ratio) => Ok(Self::Ratio(ratio)),
            ratio => Err(Error::usage(format!("--size {text} is narrower than 1:4 or wider than 4:1"))
                .hint(if ratio > 1.0 { "--size 1:4" } else { "--size 4:1" })),
        }
    }
}

impl Size {
    /// The grids (height, width) of an image of this size, coarse to fine.
    ///
    /// Errors: usage, for a size that the model cannot draw.
    pub fn grids(self, config: &ModelConfig) -> Result<Vec<(usize, usize)>> {
        match &config.grids[..] {
            [] => self.scales(config.scales),
            grids => self.only(grids),
        }
    }

    /// The grids of a model of at most `max` scales of the paper's table.
    fn scales(self, max: usize) -> Result<Vec<(usize, usize)>> {
        let max = max.clamp(1, 18);
        let (width, height) = match self {
            Self::Auto => return Ok(schedule::nearest(1.0).scales[..max].to_vec()),
            Self::Ratio(ratio) => return Ok(schedule::nearest(ratio).scales[..max].to_vec()),
            Self::Pixels { width, height } => (width, height),
        };
        // The paper's 128, 256, 512 and 1024 px levels, as far as the model goes.
        let levels = [8, 12, 16].into_iter().filter(|level| *level < max).chain([max]);
        let drawable = levels.flat_map(|level| schedule::table().iter().map(move |entry| &entry.scales[..level]));
        let pixels =
            |scales: &[(usize, usize)]| scales.last().map_or((0, 0), |(h, w)| (*w as u64 * STRIDE, *h as u64 * STRIDE));
        let log = |a: u64, b: u64| (a.max(1) as f64 / b.max(1) as f64).ln();
        let distance = |scales: &[(usize, usize)]| {
            let (w, h) = pixels(scales);
            let (x, y) = (log(w, width), log(h, height));
            // Several ratios can share a last grid: the one whose coarser grids keep closest to it is the best.
            let bend: f64 = scales.iter().map(|(r, c)| log(*r as u64 * w, *c as u64 * h).abs()).sum();
            // A wrong shape is worse than a wrong size.
            ((x + y).abs() + 2.0 * (x - y).abs(), bend)
        };
        let nearest =
            drawable.min_by(|a, b| distance(a).partial_cmp(&distance(b)).unwrap_or(std::cmp::Ordering::Equal));
        let nearest = nearest.unwrap_or_default();
        match pixels(nearest) {
            found if found == (width, height) => Ok(nearest.to_vec()),
            (w, h) => Err(Error::usage(format!("this model cannot draw {width}x{height} pixels"))
                .hint(format!("--size {w}x{h} is the closest it can"))),
        }
    }

    /// The grids of a model that draws a single size, which must be this one.
    fn only(self, grids: &[(usize, usize)]) -> Result<Vec<(usize, usize)>> {
        let (h, w) = grids.last().copied().unwrap_or_default();
        let (w, h) = (w as u64 * STRIDE, h as u64 * STRIDE);
        let fits = match self {
            Self::Auto => true,
            Self::Ratio(ratio) => ratio * w as f64 == h as f64,
            Self::Pixels { width, height } => (width, height) == (w, h),
        };
        match fits {
            true => Ok(grids.to_vec()),
            false => Err(Error::usage(format!("this model draws {w}x{h} pixels only")).hint(format!("--size {w}x{h}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_of_one_size_draws_no_other() {
        let grids = [(1, 1), (16, 16)];
        for size in ["auto", "1:1", "256x256"] {
            assert_eq!(size.parse::<Size>().unwrap().only(&grids).unwrap(), grids);
        }
        for size in ["4:3", "128x128"] {
            let error = size.parse::<Size>().unwrap().only(&grids).unwrap_err();
            assert_eq!((error.exit_code(), error.hint.as_deref()), (2, Some("--size 256x256")));
        }
    }

    fn drawn(size: &str, max: usize) -> Result<(usize, usize)> {
        let scales = size.parse::<Size>()?.scales(max)?;
        assert_eq!(scales[0], (1, 1));
        let (h, w) = scales[scales.len() - 1];
        Ok((w * 16, h * 16))
    }

    #[test]
    fn sizes_map_to_the_table() {
        assert_eq!(drawn("auto", 8).unwrap(), (128, 128));
        assert_eq!(drawn("1:1", 18).unwrap(), (1024, 1024));
        assert_eq!(drawn("16:9", 8).unwrap(), (160, 96));
        assert_eq!(drawn("9:16", 8).unwrap(), (96, 160));
        assert_eq!(drawn("4:1", 8).unwrap(), (256, 64));
        assert_eq!(drawn("1:4", 8).unwrap(), (64, 256));
        assert_eq!(drawn("160x96", 8).unwrap(), (160, 96));
        assert_eq!(drawn("128x128", 18).unwrap(), (128, 128));
        assert_eq!(drawn("512x512", 16).unwrap(), (512, 512));
        assert_eq!("128x128".parse::<Size>().unwrap().scales(8).unwrap(), schedule::nearest(1.0).scales[..8]);
    }

    #[test]
    fn every_size_of_the_table_can_be_asked_for() {
        for entry in schedule::table() {
            let (h, w) = entry.scales[7];
            assert_eq!(drawn(&format!("{}x{}", w * 16, h * 16), 8).unwrap(), (w * 16, h * 16));
        }
    }

    #[test]
    fn impossible_sizes_name_the_closest() {
        for (size, closest) in [
            ("1024x1024", "128x128"),
            ("127x127", "128x128"),
            ("0x0", ""),
            ("0x128", ""),
            ("1000000000x1000000000", ""),
            ("161x95", "160x96"),
        ] {
            let error = drawn(size, 8).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.message.contains(size));
            let hint = error.hint.unwrap();
            assert!(hint.contains(closest), "{size}: {hint}");
            let named = hint.split_whitespace().nth(1).unwrap();
            assert!(drawn(named, 8).is_ok(), "{named}");
        }
        for size in [
            "",
            "0",
            "127",
            "1000000000",
            "-1x5",
            "+128x128",
            "12.5x3",
            "x",
            ":",
            "0:1",
            "NaN:1",
            "inf:1",
            "1:5",
            "9:1",
            "99999999999999999999x1",
        ] {
            let error = drawn(size, 8).unwrap_err();
            assert_eq!((error.exit_code(), error.hint.is_some()), (2, true), "{size}");
        }
    }

    #[test]
    fn sampler_values_are_checked() {
        let with = |set: &dyn Fn(&mut GenArgs)| {
            let mut args = GenArgs::default();
            set(&mut args);
            check_sampler(&args).map(|()| args)
        };
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0] {
            assert_eq!(with(&|a| a.cfg = Some(bad)).unwrap_err().exit_code(), 2);
            assert_eq!(with(&|a| a.temperature = Some(bad)).unwrap_err().exit_code(), 2);
            assert_eq!(with(&|a| a.top_p = Some(bad)).unwrap_err().exit_code(), 2);
        }
        assert!(with(&|a| a.top_k = Some(0)).is_err());
        assert!(with(&|a| a.top_p = Some(0.0)).is_err());
        assert!(with(&|a| a.top_p = Some(1.01)).is_err());
        let defaults = Sampling { cfg: 3.0, temperature: 1.0, top_k: Some(5), top_p: 0.9, refine: vec![] };
        assert_eq!(sampling(&with(&|_| ()).unwrap(), defaults.clone()), defaults);
        let greedy = with(&|a| (a.temperature, a.cfg) = (Some(0.0), Some(0.0))).unwrap();
        assert_eq!(sampling(&greedy, defaults.clone()), Sampling { cfg: 0.0, temperature: 0.0, ..defaults });
    }

    #[test]
    fn prompt_files_hold_one_prompt_a_line() {
        let path = Path::new("p.txt");
        assert_eq!(lines(b"\xef\xbb\xbfa cat\r\n\r\n  \na dog", path).unwrap(), ["a cat", "a dog"]);
        assert_eq!(lines(b"\n\n", path).unwrap_err().exit_code(), 2);
        let error = lines(b"a cat\n\xff\xfe\n", path).unwrap_err();
        assert!(error.message.starts_with("line 2 of p.txt: "), "{}", error.message);
    }
}

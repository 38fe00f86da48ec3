//! `nextflow eval`: score a model.

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use clap::{Args, ValueEnum};
use image::ImageFormat;

use super::{LoadArgs, ModelArgs, SamplingArgs, request};
use crate::chat::{ChatConfig, ChatModel};
use crate::checkpoint::{NANO, Source, TRANSFORMER};
use crate::dataset::{Dataset, with_article};
use crate::error::{Error, Result};
use crate::eval::{self, Comparison, Examiner, OBLONG, Report, Subject, sheet};
use crate::generate::{GeneratorConfig, Job, Model, ModelConfig, Sampling, Size};
use crate::io::{input, output};
use crate::scenes::{KINDS, Split};
use crate::terminal::{self, Console, Level, Stop};

/// The picture library that `nextflow train data` writes.
const LIBRARY: &str = "data/library.safetensors";

/// The suites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Compositions of shapes, drawn
    Compositions,
    /// Compositions of 16:9, 9:16 and 4:1, drawn
    Oblong,
    /// Edits, questions, several turns, reasoning
    Dialogues,
    /// Everyday things, drawn; needs the picture library
    Recognition,
    /// Pictures through the image tokenizer; needs the picture library
    Reconstruction,
}

/// Flags of `nextflow eval`.
#[derive(Args, Debug)]
pub struct EvalArgs {
    /// Picture library for recognition and reconstruction [default: data/library.safetensors if it
    /// exists]
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Pictures of 256 pixels, for texture [default: data/library-256.safetensors if it exists]
    #[arg(long, value_name = "FILE")]
    pub originals: Option<PathBuf>,
    /// Draw 48 everyday things and write a numbered sheet of them to DIR, and the key to DIR/key:
    /// for somebody who names them without having seen the key
    #[arg(long, value_name = "DIR", conflicts_with_all = ["suite", "json", "limit", "compare", "wordings"])]
    pub sheet: Option<PathBuf>,
    /// Instead of --model, run two models on the same cases and print both, their differences, and
    /// which of these exceed chance; each is a folder, a hub id, or embedded, the built-in model
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with = "wordings")]
    pub compare: Vec<String>,
    /// Refine drawn images in STEPS steps [default: as the model does]
    #[arg(long, value_name = "STEPS", num_args = 0..=1, require_equals = true, conflicts_with = "no_refine")]
    pub refine: Option<Option<usize>>,
    /// Do not refine drawn images
    #[arg(long)]
    pub no_refine: bool,
    /// Suite to run; repeat for several [default: all that the model and the picture library allow]
    #[arg(long, value_name = "SUITE", value_enum)]
    pub suite: Vec<Suite>,
    /// Held-out compositions and dialogues, or those that nano was trained on
    #[arg(long, value_enum, default_value_t = Split::HeldOut)]
    pub split: Split,
    /// Cases per category of compositions, aspect ratio, and kind of dialogue
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub per_category: usize,
    /// Recognition: draw only N concepts, evenly spread [default: all]
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Random seed
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Print a row for every held-out wording of edits and questions, too
    #[arg(long)]
    pub wordings: bool,
    /// Write every dialogue to FILE, one a line in JSON: what was asked and expected, what the model
    /// said, and whether it was right
    #[arg(long, value_name = "FILE", conflicts_with_all = ["compare", "sheet"])]
    pub cases: Option<PathBuf>,
    /// Print JSON instead of a table, with every case
    #[arg(long)]
    pub json: bool,
    /// The model.
    #[command(flatten)]
    pub load: LoadArgs,
}

impl EvalArgs {
    /// The model, with its refiner where it refines, and how it draws.
    fn model(&self, source: &Source, device: &Device) -> Result<(Model, Sampling)> {
        let model = Model::load(source, device, self.load.quant)?;
        let flags = SamplingArgs { refine: self.refine, no_refine: self.no_refine, ..SamplingArgs::default() };
        request::check_sampler(&flags)?;
        let config = GeneratorConfig::NextFlow(Box::new(model.config().clone()));
        let refine = request::refine(&flags, &config, Size::Auto)?;
        let sampling = Sampling { refine, ..model.config().sampling.clone() };
        match refine {
            0 => Ok((model, sampling)),
            _ => Ok((model.with_refiner(source, device, self.load.quant)?, sampling)),
        }
    }

    /// Whether a suite is to run.
    fn asks_for(&self, suite: Suite) -> bool {
        self.suite.is_empty() || self.suite.contains(&suite)
    }

    /// The models to evaluate, and what they are called.
    fn sources(&self) -> Result<Vec<(String, Source)>> {
        let source = |model: ModelArgs, name: Option<&String>| {
            let source = model.source()?;
            source.check_type(TRANSFORMER, self.load.quant)?;
            Ok((name.cloned().unwrap_or_else(|| source.to_string()), source))
        };
        let named = |name: &String| {
            let mut args = self.load.model.clone();
            args.model = Some(if name == "embedded" && !Path::new(name).exists() { NANO } else { name }.to_string());
            source(args, Some(name))
        };
        match &self.compare[..] {
            [] => Ok(vec![source(self.load.model.clone(), None)?]),
            two => two.iter().map(named).collect(),
        }
    }

    /// The pictures that textures are compared with.
    fn originals(&self) -> Result<Option<Dataset>> {
        match &self.originals {
            Some(path) => Dataset::load_any(path).map(Some),
            None if Path::new(ORIGINALS).exists() => Dataset::load_any(ORIGINALS.as_ref()).map(Some),
            None => Ok(None),
        }
    }
}

/// Draws the things of the sheet and writes it, and the key apart.
fn sheet(args: &EvalArgs, folder: &Path) -> Result<()> {
    let (source, device) = (args.load.model.source()?, args.load.device.get()?);
    let key = folder.join("key");
    if folder.exists() {
        return Err(Error::usage(format!("{} already exists", input::shown(folder))).hint("--sheet NEW-FOLDER"));
    }
    let mut console = Console::new(Level::Normal, sheet::things().count() as u64);
    let stop = terminal::interrupts()?;
    let (model, sampling) = console.load("the model", || args.model(&source, &device))?;
    let scales = Size::Auto.grids(model.config())?;
    let mut images = Vec::new();
    for thing in sheet::things() {
        let (prompt, scales, sampling) = (with_article(thing), scales.clone(), sampling.clone());
        let job = Job { prompt, negative: None, scales, sampling, seed: args.seed };
        console.start(1);
        images.push(model.draw(&job, &mut |event| {
            console.event(&event);
            stop.check()
        })?);
    }
    console.clear();
    let mut png = Cursor::new(Vec::new());
    let written = sheet::sheet(&images).write_to(&mut png, ImageFormat::Png);
    written.map_err(|e| candle_core::Error::Msg(e.to_string()))?;
    let names: Vec<String> = sheet::things().zip(1..).map(|(thing, n)| format!("{n} {thing}\n")).collect();
    std::fs::create_dir_all(&key)?;
    output::write(&key.join("key.txt"), names.concat().as_bytes())?;
    output::write(&folder.join("sheet.png"), &png.into_inner())?;
    terminal::emit_path(&folder.join("sheet.png")).map(drop)
}

/// Those pictures, as `nextflow train data --side 256` writes them.
const ORIGINALS: &str = "data/library-256.safetensors";

/// How to get the picture library.
const LIBRARY_HINT: &str =
    "sh src/train/fetch-data.sh data && cargo run --release --features train -- train data, or --data FILE";

/// Runs `nextflow eval`.
pub(super) fn run(args: &EvalArgs) -> Result<()> {
    for (flag, value) in [("per-category", Some(args.per_category)), ("limit", args.limit)] {
        if value == Some(0) {
            return Err(Error::usage(format!("--{flag} 0 measures nothing")).hint(format!("--{flag} 10")));
        }
    }
    if let Some(folder) = &args.sheet {
        return sheet(args, folder);
    }
    let device = args.load.device.get()?;
    let sources = args.sources()?;
    let library = library(args, &sources)?;
    let originals = args.originals()?;
    let libraries = Libraries { pictures: library.as_ref(), originals: originals.as_ref() };
    let stop = terminal::interrupts()?;
    let reports = sources.iter().map(|(_, source)| evaluate(args, source, &device, &libraries, &stop));
    let reports = reports.collect::<Result<Vec<_>>>()?;
    let _ = match (<[Report; 2]>::try_from(reports), args.json) {
        (Ok(two), json) => {
            let [(a, _), (b, _)] = &sources[..] else { return Ok(()) };
            let comparison = Comparison::new([a.clone(), b.clone()], two);
            if json { terminal::emit_json(&comparison)? } else { terminal::emit(comparison.table().as_bytes())? }
        }
        (Err(one), true) => terminal::emit_json(&one[0])?,
        (Err(one), false) => terminal::emit(one[0].table(args.wordings).as_bytes())?,
    };
    Ok(())
}

/// The picture libraries that there are.
struct Libraries<'a> {
    pictures: Option<&'a Dataset>,
    originals: Option<&'a Dataset>,
}

/// Runs the suites on one model.
fn evaluate(args: &EvalArgs, source: &Source, device: &Device, libraries: &Libraries, stop: &Stop) -> Result<Report> {
    let asked = |suite: Suite| args.asks_for(suite);
    let library = libraries.pictures;
    let drawn = library.filter(|_| asked(Suite::Recognition));
    let concepts = drawn.map_or(0, |l| eval::recognisable(l, args.limit));
    let composed = if asked(Suite::Compositions) { KINDS.len() * args.per_category } else { 0 };
    let oblong = if asked(Suite::Oblong) { OBLONG.len() * args.per_category } else { 0 };
    let mut console = Console::new(Level::Normal, (composed + oblong + concepts) as u64);
    let (model, sampling) = console.load("the model", || args.model(source, device))?;
    let scales = &Size::Auto.grids(model.config())?[..];
    let tokenizer = model.config().load_tokenizer(source, device, args.load.quant)?;
    let subject = Subject { tokenizer: &tokenizer, scales, device };
    // Draws on grids.
    let draw = |console: &mut Console, scales: &[(usize, usize)], prompt: &str, seed: u64| {
        let (prompt, sampling) = (prompt.to_string(), sampling.clone());
        let job = Job { prompt, negative: None, scales: scales.to_vec(), sampling, seed };
        console.start(1);
        model.draw(&job, &mut |event| {
            console.event(&event);
            stop.check()
        })
    };

    let started = Instant::now();
    let mut report = Report::new(&model.config().name, args.seed, args.split, args.per_category);
    let done = |console: &mut Console, what: &str| {
        console.finish(&format!("{what} · {:.1} s", started.elapsed().as_secs_f64()));
    };
    if asked(Suite::Compositions) {
        let draw = &mut |p: &str, s: u64| draw(&mut console, scales, p, s).map(|image| subject.reduced(image));
        let redraw = &|image: &_| subject.reconstruct(image);
        report.compositions = eval::compositions(draw, redraw, args.split, args.per_category, args.seed)?;
        done(&mut console, "compositions");
    }
    if asked(Suite::Oblong) {
        for ratio in OBLONG {
            let grids = &ratio.parse::<Size>()?.grids(model.config())?[..];
            let subject = Subject { scales: grids, ..subject };
            let draw = &mut |p: &str, s: u64| draw(&mut console, grids, p, s).map(|image| subject.reduced(image));
            let redraw = &|image: &_| subject.reconstruct(image);
            report.oblong.push(eval::oblong(ratio, draw, redraw, args.split, args.per_category, args.seed)?);
        }
        done(&mut console, "oblong");
    }
    if asked(Suite::Dialogues) && model.config().conversation.draws {
        let model = ChatModel::load(source, ChatConfig::read(source)?, device, args.load.quant)?;
        let examiner = Examiner { model: &model, per_kind: args.per_category, seed: args.seed, split: args.split };
        let mut cases = Vec::new();
        let watch = &mut |case| {
            cases.push(case);
            stop.check()
        };
        report.dialogues = Some(examiner.run(watch)?);
        if let Some(library) = library {
            report.thing_edits = eval::thing_edits(&examiner, library, watch)?;
        }
        if let Some(path) = &args.cases {
            let lines = cases.iter().map(|case| Ok(serde_json::to_string(case)? + "\n"));
            let lines: Vec<String> = lines.collect::<serde_json::Result<_>>().map_err(candle_core::Error::wrap)?;
            output::write(path, lines.concat().as_bytes())?;
        }
        done(&mut console, "dialogues");
    }
    if let Some(library) = library {
        if asked(Suite::Recognition) {
            let draw = &mut |p: &str, s: u64| draw(&mut console, scales, p, s);
            report.recognition =
                Some(eval::recognition(&subject, library, libraries.originals, draw, args.limit, args.seed)?);
            done(&mut console, "recognition");
        }
        if asked(Suite::Reconstruction) {
            report.reconstruction = Some(eval::reconstruction(&subject, library)?);
            done(&mut console, "reconstruction");
        }
    } else if asked(Suite::Recognition) || asked(Suite::Reconstruction) {
        console.finish(&format!("recognition and reconstruction need the picture library: {LIBRARY_HINT}"));
    }
    Ok(report)
}

/// The picture library, if there is one.
///
/// Errors: usage, for suites that the library or a model does not allow.
fn library(args: &EvalArgs, sources: &[(String, Source)]) -> Result<Option<Dataset>> {
    let library = match &args.data {
        Some(path) => Some(Dataset::load(path)?),
        None if Path::new(LIBRARY).exists() => Some(Dataset::load(LIBRARY.as_ref())?),
        None => None,
    };
    let of_pictures = [Suite::Recognition, Suite::Reconstruction];
    if library.is_none() && args.suite.iter().any(|suite| of_pictures.contains(suite)) {
        return Err(Error::usage("recognition and reconstruction need the picture library").hint(LIBRARY_HINT));
    }
    for (_, source) in sources.iter().filter(|_| args.suite.contains(&Suite::Dialogues)) {
        if !ModelConfig::read(source)?.conversation.draws {
            return Err(Error::usage(format!("{source} does not answer with images")).hint("--suite compositions"));
        }
    }
    Ok(library)
}

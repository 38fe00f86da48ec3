//! `nextflow eval`: score a model.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::LoadArgs;
use crate::chat::{ChatConfig, ChatModel};
use crate::checkpoint::{Source, TRANSFORMER};
use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::eval::{self, Examiner, Report, Subject};
use crate::generate::{Job, Model, ModelConfig, Size};
use crate::scenes::{KINDS, Split};
use crate::terminal::{self, Console, Level};

/// The picture library that `nextflow train data` writes.
const LIBRARY: &str = "data/library.safetensors";

/// The suites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Compositions of shapes, drawn
    Compositions,
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
    /// Suite to run; repeat for several [default: all that the model and the picture library allow]
    #[arg(long, value_name = "SUITE", value_enum)]
    pub suite: Vec<Suite>,
    /// Held-out compositions and dialogues, or those that nano was trained on
    #[arg(long, value_enum, default_value_t = Split::HeldOut)]
    pub split: Split,
    /// Cases per category of compositions and per kind of dialogue
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub per_category: usize,
    /// Recognition: draw only N concepts, evenly spread [default: all]
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Random seed
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// The model.
    #[command(flatten)]
    pub load: LoadArgs,
}

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
    let asked = |suite: Suite| args.suite.is_empty() || args.suite.contains(&suite);
    let device = args.load.device.get()?;
    let source = args.load.model.source()?;
    source.check_type(TRANSFORMER, args.load.quant)?;
    let library = library(args, &source)?;
    let drawn = library.as_ref().filter(|_| asked(Suite::Recognition));
    let concepts = drawn.map_or(0, |l| eval::recognisable(l, args.limit));
    let composed = if asked(Suite::Compositions) { KINDS.len() * args.per_category } else { 0 };
    let mut console = Console::new(Level::Normal, (composed + concepts) as u64);
    let stop = terminal::interrupts()?;
    let model = console.load("the model", || Model::load(&source, &device, args.load.quant))?;
    let scales = &Size::Auto.grids(model.config())?[..];
    let tokenizer = model.config().load_tokenizer(&source, &device, args.load.quant)?;
    let subject = Subject { tokenizer: &tokenizer, scales, device: &device };
    let draw = |console: &mut Console, prompt: &str, seed: u64| {
        let (prompt, sampling) = (prompt.to_string(), model.config().sampling.clone());
        let job = Job { prompt, negative: None, scales: scales.to_vec(), sampling, seed };
        console.start(1);
        model.draw(&job, &mut |event| {
            console.event(&event);
            stop.check()
        })
    };

    let started = Instant::now();
    let mut report = Report {
        model: model.config().name.clone(),
        seed: args.seed,
        split: args.split,
        per_category: args.per_category,
        compositions: Vec::new(),
        dialogues: None,
        thing_edits: Vec::new(),
        recognition: None,
        reconstruction: None,
    };
    let done = |console: &mut Console, what: &str| {
        console.finish(&format!("{what} · {:.1} s", started.elapsed().as_secs_f64()));
    };
    if asked(Suite::Compositions) {
        let (draw, redraw) = (&mut |p: &str, s: u64| draw(&mut console, p, s), &|image: &_| subject.reconstruct(image));
        report.compositions = eval::compositions(draw, redraw, args.split, args.per_category, args.seed)?;
        done(&mut console, "compositions");
    }
    if asked(Suite::Dialogues) && model.config().conversation.draws {
        let model = ChatModel::load(&source, ChatConfig::read(&source)?, &device, args.load.quant)?;
        let examiner = Examiner { model: &model, per_kind: args.per_category, seed: args.seed, split: args.split };
        let watch = &mut || stop.check();
        report.dialogues = Some(examiner.run(watch)?);
        if let Some(library) = &library {
            report.thing_edits = eval::thing_edits(&examiner, library, watch)?;
        }
        done(&mut console, "dialogues");
    }
    if let Some(library) = &library {
        if asked(Suite::Recognition) {
            let draw = &mut |p: &str, s: u64| draw(&mut console, p, s);
            report.recognition = Some(eval::recognition(&subject, library, draw, args.limit, args.seed)?);
            done(&mut console, "recognition");
        }
        if asked(Suite::Reconstruction) {
            report.reconstruction = Some(eval::reconstruction(&subject, library)?);
            done(&mut console, "reconstruction");
        }
    } else if asked(Suite::Recognition) || asked(Suite::Reconstruction) {
        console.finish(&format!("recognition and reconstruction need the picture library: {LIBRARY_HINT}"));
    }
    let _ = match args.json {
        true => terminal::emit_json(&report)?,
        false => terminal::emit(report.table().as_bytes())?,
    };
    Ok(())
}

/// The picture library, if there is one.
///
/// Errors: usage, for suites that the library or the model does not allow.
fn library(args: &EvalArgs, source: &Source) -> Result<Option<Dataset>> {
    let library = match &args.data {
        Some(path) => Some(Dataset::load(path)?),
        None if Path::new(LIBRARY).exists() => Some(Dataset::load(LIBRARY.as_ref())?),
        None => None,
    };
    let of_pictures = [Suite::Recognition, Suite::Reconstruction];
    if library.is_none() && args.suite.iter().any(|suite| of_pictures.contains(suite)) {
        return Err(Error::usage("recognition and reconstruction need the picture library").hint(LIBRARY_HINT));
    }
    if args.suite.contains(&Suite::Dialogues) && !ModelConfig::read(source)?.conversation.draws {
        return Err(Error::usage(format!("{source} does not answer with images")).hint("--suite compositions"));
    }
    Ok(library)
}

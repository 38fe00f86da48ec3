//! `nextflow train`: the steps from packages to a checkpoint, in order.

mod rl;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::{Args, Subcommand};
use rl::RlArgs;

use crate::checkpoint::{Source, TRANSFORMER, WeightType, Weights};
use crate::dataset::{Dataset, SIDE};
use crate::error::{Error, Result};
use crate::generate::{Model, ModelConfig, Sampling};
use crate::io::{input, output};
use crate::text::Text;
use crate::tokenizer::ImageTokenizer;
use crate::train::pool::{Pool, PoolSizes};
use crate::train::refine_pool::{RefinePool, RefinePoolSizes};
use crate::train::run::Run;
use crate::train::samples::Samples;
use crate::train::tokenizer::Stage;
use crate::train::transformer::Lesson;
use crate::train::{self, Hyperparameters};
use crate::{device, terminal};

/// Train nano, step by step.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Folder of the run: recipe, weights and the state to resume from
    #[arg(long, default_value = "runs/nano", global = true)]
    run: PathBuf,
    /// The picture library
    #[arg(long, default_value = "data/library.safetensors", global = true)]
    data: PathBuf,
    /// What trains: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", global = true)]
    device: String,
    #[command(subcommand)]
    step: Step,
}

#[derive(Debug, Subcommand)]
enum Step {
    /// Build the picture library: from the packages that src/train/fetch-data.sh fetched, or from
    /// images of your own
    Data {
        /// Folder of the unpacked packages
        #[arg(default_value = "data", conflicts_with = "folder")]
        packages: PathBuf,
        /// Folder of PNG, JPEG or WebP images; the lines of x.txt are the captions of x.png, in any
        /// language
        #[arg(long, value_name = "DIR")]
        folder: Option<PathBuf>,
        /// Pixels of a side; above 128, for the refiner, only pictures that models learn to draw
        #[arg(long, value_name = "N", default_value_t = SIDE, conflicts_with = "folder")]
        side: usize,
    },
    /// Train the text tokenizer on all captions
    Text,
    /// Train the semantic encoder by contrast with captions
    Semantic(Plan),
    /// Train one stage of the image tokenizer
    Tokenizer {
        /// Which parts learn
        #[arg(long, value_enum)]
        stage: Stage,
        #[command(flatten)]
        plan: Plan,
    },
    /// Train the transformer
    Transformer {
        /// Names this part of the training: a later part goes on from the weights of an earlier one
        #[arg(long, default_value = "all")]
        part: String,
        /// Learn the first N scales only, without dialogues [default: all]
        #[arg(long, value_name = "N")]
        scales: Option<usize>,
        /// Everyday things in the pool: the first N [default: all]
        #[arg(long, value_name = "N")]
        things: Option<usize>,
        /// Compositions of shapes in the pool
        #[arg(long, default_value_t = 6000)]
        scenes: usize,
        /// Compositions of several things in the pool
        #[arg(long, default_value_t = 2000)]
        several: usize,
        /// Images of each aspect ratio other than 1:1 in the pool
        #[arg(long, default_value_t = 800)]
        oblong: usize,
        /// Learn from dialogues too: edits, questions, reasoning
        #[arg(long)]
        dialogues: bool,
        /// Learn from dialogues without images alone, which are cheap
        #[arg(long, requires = "dialogues")]
        words_alone: bool,
        #[command(flatten)]
        plan: Plan,
    },
    /// Improve the transformer by what its draws are worth: reinforcement learning (GRPO) over the
    /// first scales
    Rl(RlArgs),
    /// Train the refiner on what a model draws, with a library of twice its pixels
    Refiner {
        /// Model whose codes are refined [default: the embedded one]
        #[arg(long, value_name = "DIR")]
        model: Option<String>,
        /// Everyday things in the pool: the first N [default: all]
        #[arg(long, value_name = "N")]
        things: Option<usize>,
        /// Drawings of each of them by the model
        #[arg(long, default_value_t = 3)]
        draws: usize,
        /// Compositions of shapes in the pool
        #[arg(long, default_value_t = 3000)]
        scenes: usize,
        /// Compositions of several things in the pool
        #[arg(long, default_value_t = 1000)]
        several: usize,
        #[command(flatten)]
        plan: Plan,
    },
    /// Average the transformer with earlier weights of the same run, which still know what has been
    /// forgotten since
    Average {
        /// The earlier model.safetensors
        with: PathBuf,
        /// How much of the mean is the earlier one
        #[arg(long, value_name = "X", default_value_t = 0.5)]
        share: f64,
    },
    /// Write the checkpoint folder
    Export {
        /// Where to
        #[arg(default_value = "assets/nano")]
        out: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Plan {
    /// Steps in all
    #[arg(long)]
    steps: usize,
    /// Samples a step
    #[arg(long)]
    batch: NonZeroUsize,
    /// Peak learning rate
    #[arg(long)]
    lr: f64,
    /// Steps of warm-up
    #[arg(long, default_value_t = 100)]
    warmup: usize,
    /// Weight decay of matrices
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f64,
}

impl Step {
    /// Names the part of the training, whose draws are its own.
    fn name(&self) -> String {
        match self {
            Step::Data { .. } => "data".into(),
            Step::Text => "text".into(),
            Step::Semantic(_) => "semantic".into(),
            Step::Tokenizer { stage, .. } => stage.name(),
            Step::Transformer { part, .. } => part.clone(),
            Step::Rl(args) => args.part().into(),
            Step::Refiner { .. } => "refiner".into(),
            Step::Average { .. } => "average".into(),
            Step::Export { .. } => "export".into(),
        }
    }
}

/// Samples of a step with dialogues, at least: a quarter of them are of one kind.
const LEAST_WITH_DIALOGUES: usize = 4;

impl Plan {
    fn hyperparameters(&self) -> Hyperparameters {
        let Self { steps, lr, warmup, weight_decay, .. } = *self;
        Hyperparameters { lr, warmup, steps, clip: 1.0, weight_decay, beta2: 0.98 }
    }
}

/// Sampling of the exported checkpoint.
fn sampling() -> Sampling {
    Sampling { cfg: 1.5, temperature: 0.5, top_k: Some(50), top_p: 0.9, ..Sampling::default() }
}

/// Runs one step.
pub fn run(args: &TrainArgs) -> Result<()> {
    if let Step::Data { packages, folder, side } = &args.step {
        return data(&args.data, packages, folder.as_deref(), *side);
    }
    if let Step::Export { out } = &args.step {
        train::export::export(&Run::open(&args.run, Device::Cpu)?, out, sampling())?;
        return terminal::emit_path(out).map(drop);
    }
    if let Step::Average { with, share } = &args.step {
        if !(0.0..=1.0).contains(share) {
            return Err(Error::usage(format!("--share {share} is not from 0 to 1")).hint("--share 0.5"));
        }
        return train::average::average(&Run::open(&args.run, Device::Cpu)?.file(TRANSFORMER), with, *share);
    }
    let device = if matches!(args.step, Step::Text) { Device::Cpu } else { trainer(&args.device)? };
    let run = Run::open(&args.run, device)?;
    let model = run.file(TRANSFORMER);
    if matches!(args.step, Step::Text) && model.exists() {
        return Err(Error::usage(format!(
            "{} was trained with tokenizer.json, which this would replace",
            model.display()
        ))
        .hint("nextflow train text --run FOLDER, with a folder that has no model yet"));
    }
    if let Step::Refiner { model, things, draws, scenes, several, plan } = &args.step {
        let things = things.unwrap_or(usize::MAX);
        let sizes = RefinePoolSizes { things, draws: *draws, scenes: *scenes, several: *several };
        return refiner(args, &run, model.as_deref(), sizes, plan);
    }
    let library = Dataset::load(&args.data)?;
    let dataset = Samples::new(&library, run.seed(&args.step.name()))?;
    let text = || Text::from_bytes(&std::fs::read(run.file("tokenizer.json"))?);
    match &args.step {
        Step::Data { .. } | Step::Refiner { .. } | Step::Average { .. } | Step::Export { .. } => Ok(()),
        Step::Text => {
            let concepts = (0..library.concepts.len()).flat_map(|c| library.captions(c));
            let scenes = (0..4000).flat_map(|i| dataset.scene(i, SIDE, SIDE).captions);
            let several = (0..4000).flat_map(|i| dataset.several(dataset.everyday(), i, SIDE).captions);
            let captions = concepts.chain(scenes).chain(several);
            let text = crate::text::train_bpe(captions, run.recipe.backbone.vocab_size)?;
            output::write(&run.file("tokenizer.json"), text.to_file()?.as_bytes())
        }
        Step::Semantic(plan) => {
            train::semantic::train(&run, &dataset, &text()?, plan.batch.get(), &plan.hyperparameters())
        }
        Step::Tokenizer { stage, plan } => {
            train::tokenizer::train(&run, &dataset, *stage, plan.batch.get(), &plan.hyperparameters())
        }
        Step::Transformer { part, scales, things, scenes, several, oblong, dialogues, words_alone, plan } => {
            let (all, batch) = (run.recipe.scales, plan.batch.get());
            let scales = scales.unwrap_or(all);
            if !(1..=all).contains(&scales) || *dialogues && scales < all {
                let message = format!("--scales {scales}: images have {all} scales, and dialogues whole images");
                return Err(Error::usage(message).hint(format!("--scales {all}")));
            }
            if *dialogues && batch < LEAST_WITH_DIALOGUES {
                let message = format!("--batch {batch} is too few for some dialogues of every kind");
                return Err(Error::usage(message).hint(format!("--batch {LEAST_WITH_DIALOGUES}")));
            }
            if *dialogues && !dataset.has_things() {
                let message = "dialogues are about things with names, and the picture library has none";
                return Err(Error::usage(message).hint("leave out --dialogues"));
            }
            let (tokenizer, text) = (tokenizer(&run)?, text()?);
            let things = things.unwrap_or(usize::MAX);
            let sizes = match words_alone {
                true => PoolSizes::default(),
                false => PoolSizes { things, backgrounds: 2, scenes: *scenes, several: *several, oblong: *oblong },
            };
            let pool = Pool::build(&dataset, &tokenizer, &text, sizes, run.recipe.scales)?;
            if pool.is_empty() && !words_alone {
                return Err(Error::usage("there is nothing to learn from").hint("--scenes 3000"));
            }
            let quantizer = tokenizer.quantizer().to_device(&Device::Cpu)?;
            let lesson = Lesson {
                run: &run,
                part,
                tokenizer: &tokenizer,
                quantizer: &quantizer,
                pool: &pool,
                scales,
                dialogues: dialogues.then_some((&dataset, &text)),
                words_alone: *words_alone,
            };
            train::transformer::train(&lesson, batch, &plan.hyperparameters())
        }
        Step::Rl(args) => args.run(&run, &dataset, text()?),
    }
}

/// Builds the picture library at `path`, from unpacked packages or from a folder of images.
fn data(path: &Path, packages: &Path, folder: Option<&Path>, side: usize) -> Result<()> {
    let library = match folder {
        Some(_) if path.exists() => {
            let message = format!("{} already exists", input::shown(path));
            return Err(Error::usage(message).hint("nextflow train data --folder DIR --data data/mine.safetensors"));
        }
        Some(folder) => Dataset::from_folder(folder)?,
        None => train::prepare::prepare(packages, side)?,
    };
    // What cannot be trained on is not written.
    Samples::new(&library, 0)?;
    library.save(path)?;
    let held_out = library.concepts.iter().filter(|c| c.held_out).count();
    let (path, pictures, concepts) = (path.display(), library.pictures.len(), library.concepts.len());
    eprintln!("{path}: {pictures} pictures of {concepts} concepts, {held_out} of which are held out");
    Ok(())
}

/// Trains the refiner.
fn refiner(args: &TrainArgs, run: &Run, model: Option<&str>, sizes: RefinePoolSizes, plan: &Plan) -> Result<()> {
    let library = Dataset::load_any(&args.data)?;
    let side = SIDE * run.recipe.refiner.upscale;
    if library.side() != side {
        let message =
            format!("{} has pictures of {} pixels, the refiner draws {side}", args.data.display(), library.side());
        return Err(Error::usage(message)
            .hint(format!("nextflow train data --side {side} --data data/library-{side}.safetensors")));
    }
    let dataset = Samples::new(&library, run.seed("refiner"))?;
    let source = Source::parse(model)?;
    let model = Model::load(&source, &run.device, None)?;
    let config = model.config();
    let refined = ModelConfig { refiner: Some(run.recipe.refiner.clone()), ..config.clone() };
    let unlike = |what: String| {
        Error::usage(what).hint("correct `refiner` in the recipe.json of --run, or name another --model")
    };
    refined.check().map_err(unlike)?;
    let tokenizer = config.load_tokenizer(&source, &run.device, Some(WeightType::F32))?;
    let text = source.text_of(config.backbone.vocab_size)?;
    let pool = RefinePool::build(&dataset, (&model, &tokenizer, &text), &run.recipe.self_correction, sizes, side)?;
    if pool.is_empty() {
        return Err(Error::usage("there is nothing to learn from").hint("--scenes 3000"));
    }
    train::refiner::train(run, &tokenizer, &pool, plan.batch.get(), &plan.hyperparameters())
}

/// A CPU or an NVIDIA GPU, reported in a line: other devices have no kernels with a backward pass.
fn trainer(name: &str) -> Result<Device> {
    let device = match device::parse(name)? {
        Device::Metal(_) if name == "auto" => Device::Cpu,
        Device::Metal(_) => return Err(Error::usage("--device metal does not train").hint("--device cpu")),
        device => device,
    };
    let named = if device.is_cpu() { "the CPU" } else { "an NVIDIA GPU" };
    eprintln!("training on {named}");
    Ok(device)
}

/// The run's tokenizer as its second stage left it: the third changes nothing that the transformer
/// sees.
fn tokenizer(run: &Run) -> Result<ImageTokenizer> {
    let weights = Weights::from_safetensors(&[run.file("image_tokenizer.safetensors")], DType::F32, &run.device)?;
    Ok(ImageTokenizer::load(&weights, &run.recipe.tokenizer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_that_a_model_has_learnt_stay() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(TRANSFORMER), "").unwrap();
        let data = folder.path().join("no-library");
        let args = TrainArgs { run: folder.path().into(), data, device: "cpu".into(), step: Step::Text };
        let error = run(&args).unwrap_err();
        assert!(error.message.contains(TRANSFORMER) && error.hint.is_some(), "{}", error.message);
        assert_eq!(error.exit_code(), 2);
    }
}

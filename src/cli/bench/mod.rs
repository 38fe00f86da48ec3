//! `nextflow bench`: speed and memory of a model on this machine, with random weights.

mod image;
mod infinity;
mod machine;
mod onecat;
mod phases;
mod refiner;
mod talk;
mod z_image;

use clap::{Args, ValueEnum};

use super::DeviceArgs;
use crate::backbone::presets;
use crate::chat::ChatConfig;
#[cfg(feature = "nano")]
use crate::checkpoint::Source;
use crate::checkpoint::WeightType;
use crate::error::{Error, Result};
#[cfg(feature = "nano")]
use crate::generate::{ModelConfig, refinement};
use crate::onecat::OneCatConfig;
use crate::refiner::RefinerConfig;
use crate::vision::VisionConfig;

/// Shapes to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// The built-in model's
    #[cfg(feature = "nano")]
    Nano,
    /// TokenFlow-t2i, 256 px
    #[value(name = "tokenflow-t2i-7b")]
    TokenflowT2i7b,
    /// NextFlow on Qwen2.5-VL-7B with TokenFlow's tokenizer
    #[value(name = "nextflow-7b")]
    Nextflow7b,
    /// Infinity-125M, 256 px
    #[value(name = "infinity-125m")]
    Infinity125m,
    /// Infinity-2B, 1024 px
    #[value(name = "infinity-2b")]
    Infinity2b,
    /// Infinity-8B, 1024 px
    #[value(name = "infinity-8b")]
    Infinity8b,
    /// OneCAT-3B, 1024 px: by --task an image, an edit or an answer
    #[value(name = "onecat-3b")]
    Onecat3b,
    /// Qwen2.5-0.5B, text alone
    #[value(name = "qwen2.5-0.5b")]
    Qwen05b,
    /// Qwen2.5-VL-3B
    #[value(name = "qwen2.5-vl-3b")]
    QwenVl3b,
    /// Qwen2.5-VL-7B
    #[value(name = "qwen2.5-vl-7b")]
    QwenVl7b,
    /// The built-in model's refiner, to 256 px
    #[cfg(feature = "nano")]
    #[value(name = "nano-refiner")]
    NanoRefiner,
    /// A refiner of the paper's size, for nextflow-7b's tokenizer, to 1024 px
    #[value(name = "refiner-1b")]
    Refiner1b,
    /// Z-Image-Turbo as a refiner, 1024 px
    #[value(name = "z-image-turbo")]
    ZImageTurbo,
}

/// What OneCAT does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Task {
    /// Draw an image
    Gen,
    /// Edit an image of 512x512 pixels
    Edit,
    /// Answer about an image
    Chat,
}

/// Flags of `nextflow bench`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  nextflow bench --synthetic nextflow-7b --quant q8_0 --size 256x256")]
pub struct BenchArgs {
    /// Model whose shapes get random weights
    #[arg(long, value_name = "PRESET", value_enum)]
    pub synthetic: Shape,
    /// OneCAT only: what to measure [default: gen]
    #[arg(long, value_name = "TASK", value_enum)]
    pub task: Option<Task>,
    /// Type of the transformer's weights: f32, bf16, f16, q8_0, q4_0 or q4_K [default: f32 on a
    /// CPU, bf16 on a GPU]
    #[arg(long, value_name = "TYPE", value_enum, hide_possible_values = true)]
    pub quant: Option<WeightType>,
    /// Image size: WIDTHxHEIGHT in pixels, WIDTH:HEIGHT as a ratio, or auto (largest square; of an
    /// image that is read, 448x448 for Qwen2.5-VL and 512x512 for OneCAT)
    #[arg(long, default_value = "auto")]
    pub size: String,
    /// Length of the prompt, in tokens [default: 16, 512 for Qwen2.5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub prompt: Option<u32>,
    /// Images to draw one after the other; of several, the first is a warm-up and the median of the
    /// others is reported
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub images: u32,
    /// Images per pass
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub batch: u32,
    /// Guide the first N scales only [default: all]
    #[arg(long, value_name = "N")]
    pub cfg_until: Option<usize>,
    /// Skip the last N scales
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub draft: usize,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub words: u32,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs `nextflow bench`.
pub(super) fn run(args: &BenchArgs) -> Result<()> {
    let qwen =
        |transformer, width: Option<usize>| ChatConfig::synthetic(transformer, width.map(VisionConfig::qwen2_5_vl));
    if args.task.is_some() && args.synthetic != Shape::Onecat3b {
        return Err(Error::usage("--task is for onecat-3b: other shapes have one task")
            .hint("leave it out, or nextflow bench --synthetic onecat-3b"));
    }
    match args.synthetic {
        Shape::Qwen05b => talk::run(args, "qwen2.5-0.5b", &qwen(presets::QWEN2_5_0_5B, None)),
        Shape::QwenVl3b => talk::run(args, "qwen2.5-vl-3b", &qwen(presets::QWEN2_5_VL_3B, Some(2048))),
        Shape::QwenVl7b => talk::run(args, "qwen2.5-vl-7b", &qwen(presets::QWEN2_5_VL_7B, Some(3584))),
        Shape::Onecat3b => match args.task.unwrap_or(Task::Gen) {
            Task::Gen => onecat::run(args, false),
            Task::Edit => onecat::run(args, true),
            Task::Chat => talk::run(args, "onecat-3b", &ChatConfig::onecat(OneCatConfig::onecat_3b())),
        },
        #[cfg(feature = "nano")]
        Shape::NanoRefiner => match ModelConfig::read(&Source::Embedded)?.refiner {
            Some(config) => refiner::run(args, "nano-refiner", &config, 256),
            None => Err(refinement::none("nano")),
        },
        Shape::Refiner1b => refiner::run(args, "refiner-1b", &RefinerConfig::one_b(), 1024),
        Shape::ZImageTurbo => z_image::run(args),
        Shape::Infinity125m => infinity::run(args, "125m"),
        Shape::Infinity2b => infinity::run(args, "2b"),
        Shape::Infinity8b => infinity::run(args, "8b"),
        _ => image::run(args),
    }
}

/// Bytes, readable.
fn gb(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b => format!("{:.1} MB", b / 1e6),
    }
}

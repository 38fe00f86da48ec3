//! Flags that several commands share, in the groups that `--help` prints.

use std::ffi::OsString;
use std::path::PathBuf;

use candle_core::Device;
use clap::Args;
#[cfg(feature = "hub")]
use clap::builder::FalseyValueParser;
use clap::builder::Resettable;

use super::per_scale::PerScale;
use crate::checkpoint::WeightType;
use crate::device;
use crate::error::{Error, Result};
use crate::generate::Sampling;
use crate::terminal::{self, Level, Preview};
use crate::z_image::HUB;

/// The prompts.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Prompt", group = clap::ArgGroup::new("text").args(["prompt", "positional", "prompt_file"]))]
pub struct PromptArgs {
    /// The prompt, or how to change the image; `-` reads it from standard input
    #[arg(value_name = "PROMPT", help_heading = Resettable::Reset)]
    pub positional: Option<OsString>,
    /// The same as PROMPT
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<OsString>,
    /// Read one prompt per line; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
}

/// Everything that `gen` and `edit` share beside the prompts.
#[derive(Args, Clone, Debug, Default)]
pub struct DrawArgs {
    /// How images are sampled.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Another model that refines.
    #[command(flatten)]
    pub refiner: RefinerArgs,
    /// Where images go.
    #[command(flatten)]
    pub output: OutputArgs,
    /// What is printed.
    #[command(flatten)]
    pub report: ReportArgs,
    /// The model.
    #[command(flatten)]
    pub load: LoadArgs,
}

/// How images are sampled.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Random seed, or several: 3,7,11 [default: random; printed, and stored in the PNG]
    #[arg(long, value_name = "SEED", allow_negative_numbers = true, value_delimiter = ',', value_parser = seed)]
    pub seed: Vec<u64>,
    /// Images per prompt and seed, with seeds SEED, SEED+1, ...
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    pub count: u64,
    /// WIDTHxHEIGHT in pixels, WIDTH:HEIGHT as a ratio, or auto: square, or the ratio of the edited
    /// image
    #[arg(long, default_value = "auto")]
    pub size: String,
    /// Guidance: how closely to follow the prompt. 0 is off (as in VAR); for Infinity and OneCAT 1
    /// is off, and a list sets every scale: 4,4,3,... [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub cfg: Option<PerScale>,
    /// Guide the first N scales only; the others then take half the time [default: all]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub cfg_until: Option<usize>,
    /// Sampling temperature, or a list for every scale; 0 takes the most likely code [default: the
    /// model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub temperature: Option<PerScale>,
    /// Sample from the K most likely codes [default: the model's]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Sample from the most likely codes whose probabilities sum to P; 1 is off [default: the
    /// model's]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Refine the image by diffusion in STEPS steps, to twice its size [default: as the model does;
    /// edit: off]
    #[arg(long, value_name = "STEPS", num_args = 0..=1, require_equals = true, conflicts_with = "no_refine")]
    pub refine: Option<Option<usize>>,
    /// Do not refine the image
    #[arg(long)]
    pub no_refine: bool,
}

/// A seed, as typed.
fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("a seed is a whole number from 0 to {}", u64::MAX))
}

impl SamplingArgs {
    /// Checks these flags, and the `sampling` that they result in, against an image of `scales`
    /// scales.
    ///
    /// Errors: usage, for more scales than there are, and for scales to guide without guidance.
    pub fn check_scales(&self, sampling: &Sampling, scales: usize) -> Result<()> {
        match self.cfg_until {
            Some(n) if n > scales => {
                let message = format!("--cfg-until {n}, but the image has {scales} scales");
                Err(Error::usage(message).hint(format!("--cfg-until {scales}")))
            }
            Some(n) if !sampling.is_guided() => {
                Err(Error::usage(format!("--cfg-until {n} without guidance guides nothing"))
                    .hint("--cfg 3, or leave it out"))
            }
            _ => Ok(()),
        }
    }
}

/// Where images go.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Write the image to FILE; `-` writes the PNG to standard output
    #[arg(short, long, value_name = "FILE", conflicts_with = "out_dir")]
    pub output: Option<PathBuf>,
    /// Write images into FOLDER, under unused names unless --force is given [default: the current
    /// folder]
    #[arg(long, value_name = "FOLDER")]
    pub out_dir: Option<PathBuf>,
    /// Overwrite existing files
    #[arg(long)]
    pub force: bool,
    /// Show the image in the terminal while it is drawn, scale by scale
    #[arg(long, conflicts_with_all = ["json", "dry_run"])]
    pub preview: bool,
}

impl OutputArgs {
    /// The terminal's preview, with `--preview`.
    ///
    /// Errors: usage, for a terminal that cannot show images.
    pub fn preview(&self, verbose: bool) -> Result<Option<Preview>> {
        if !self.preview {
            return Ok(None);
        }
        match terminal::cannot_show() {
            Some(why) => Err(Error::usage(format!("--preview cannot show images: {why}")).hint(match why {
                "NO_COLOR is set" => "NO_COLOR= nextflow gen ..., or leave out --preview",
                "TERM is dumb" => "set TERM as your terminal does (TERM=xterm-256color), or leave out --preview",
                _ => "leave out --preview",
            })),
            None => Ok(Some(Preview::new(!verbose))),
        }
    }
}

/// What is printed.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Output")]
pub struct ReportArgs {
    /// Print one line of JSON per result
    #[arg(long)]
    pub json: bool,
    /// Check everything, print the plan and its memory, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Print results and errors only
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print every step with its time, and the causes of an error
    #[arg(short, long)]
    pub verbose: bool,
}

impl ReportArgs {
    /// How much is printed.
    pub fn level(&self) -> Level {
        Level::new(self.quiet, self.verbose)
    }
}

/// The model, and how it is loaded.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct LoadArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Type of the transformer's weights: f32, bf16, f16, q8_0 (8.5 bits), q4_0 or q4_K (4.5 bits)
    /// [default: int8 and GGUF as stored, else f32 on a CPU and bf16 on a GPU]
    #[arg(long, value_name = "TYPE", value_enum, hide_possible_values = true)]
    pub quant: Option<WeightType>,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// The model.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Model folder, or OWNER/NAME on the Hugging Face hub; a colon picks one of several models
    /// there: FoundationVision/Infinity:2b [default: the built-in model]
    #[arg(long, value_name = "FOLDER|ID", env = "NEXTFLOW_MODEL", hide_env_values = true)]
    pub model: Option<String>,
    /// Download nothing: use the cache only
    #[cfg(feature = "hub")]
    #[arg(long, env = "HF_HUB_OFFLINE", hide_env_values = true, value_parser = FalseyValueParser::new())]
    pub offline: bool,
}

/// The device.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "auto", env = "NEXTFLOW_DEVICE", hide_env_values = true)]
    device: String,
}

impl DeviceArgs {
    /// Opens the device. Errors: as [`device::parse`].
    pub fn get(&self) -> Result<Device> {
        device::parse(&self.device)
    }
}

/// The usual strength: three passes of eight.
pub(super) const REFINE_STRENGTH: f64 = 0.3;

/// Another model that refines.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub struct RefinerArgs {
    /// Draw the detail of the finished image anew with another model, in 512 pixels or more: the
    /// folder of a Z-Image, or Tongyi-MAI/Z-Image-Turbo of the hub
    #[arg(long, value_name = "FOLDER|ID", conflicts_with_all = ["refine", "no_refine"])]
    pub refiner: Option<String>,
    /// With --refiner: how much is drawn anew, above 0 and at most 1, which keeps nothing
    /// [default: 0.3]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub refine_strength: Option<f64>,
    /// The refiner is named by a file and not by the user: nothing is downloaded for it.
    #[arg(skip)]
    pub stored: bool,
}

impl RefinerArgs {
    /// Errors: usage, for a strength that is none, or one without a refiner.
    pub fn check(&self) -> Result<()> {
        let Some(strength) = self.refine_strength else { return Ok(()) };
        if self.refiner.is_none() {
            return Err(Error::usage("--refine-strength is for another model that refines")
                .hint(format!("--refiner {HUB} --refine-strength {REFINE_STRENGTH}")));
        }
        match strength > 0.0 && strength <= 1.0 {
            true => Ok(()),
            false => Err(Error::usage(format!("--refine-strength {strength} is not above 0 and at most 1"))
                .hint(format!("--refine-strength {REFINE_STRENGTH}"))),
        }
    }
}

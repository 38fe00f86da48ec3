//! `nextflow train rl`.

use std::num::NonZeroUsize;

use clap::Args;

use crate::error::{Error, Result};
use crate::text::Text;
use crate::train::rl::{Mixture, Objective, Prefix, Settings};
use crate::train::run::Run;
use crate::train::samples::Samples;
use crate::train::{self, Hyperparameters};

#[derive(Debug, Args)]
pub(super) struct RlArgs {
    /// Names this part of the training: a later part goes on from the weights of an earlier one
    #[arg(long, default_value = "rl")]
    part: String,
    /// Compositions to draw in a step
    #[arg(long, value_name = "N", default_value_t = 2)]
    compositions: usize,
    /// Everyday things to draw in a step
    #[arg(long, value_name = "N", default_value_t = 2)]
    things: usize,
    /// Edits in a step
    #[arg(long, value_name = "N", default_value_t = 2)]
    edits: usize,
    /// Questions to answer in a step
    #[arg(long, value_name = "N", default_value_t = 2)]
    questions: usize,
    /// G: draws for each of them
    #[arg(long, value_name = "N", default_value = "8")]
    group: NonZeroUsize,
    /// m: scales to train, from the first; the finer ones are drawn and not trained
    #[arg(long, value_name = "N", default_value = "6")]
    scales: NonZeroUsize,
    /// Epsilon: where ratios of probabilities are clipped, from 1
    #[arg(long, value_name = "X", default_value_t = 0.2)]
    clip: f64,
    /// Beta: weight of the distance from the model at the start
    #[arg(long, value_name = "X", default_value_t = 0.02)]
    kl: f64,
    /// Codes of an h x w grid weigh 1 / (h w)^ALPHA
    #[arg(long, default_value_t = 0.7)]
    alpha: f64,
    /// Updates of the weights by the same draws
    #[arg(long, value_name = "N", default_value = "1")]
    updates: NonZeroUsize,
    /// Updates in all
    #[arg(long)]
    steps: usize,
    /// Peak learning rate
    #[arg(long)]
    lr: f64,
    /// Steps of warm-up
    #[arg(long, default_value_t = 20)]
    warmup: usize,
    /// Weight decay of matrices
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f64,
}

impl RlArgs {
    /// The name of this part of the training.
    pub(super) fn part(&self) -> &str {
        &self.part
    }

    /// Trains the transformer of a run.
    pub(super) fn run(&self, run: &Run, dataset: &Samples, text: Text) -> Result<()> {
        let settings = self.settings(run.recipe.scales)?;
        let tokenizer = train::export::image_tokenizer(run)?;
        train::rl::train(run, dataset, text, tokenizer, &settings, &self.hyperparameters())
    }

    /// Errors: usage, for numbers that are out of range, or nothing to do.
    fn settings(&self, scales: usize) -> Result<Settings<'_>> {
        let Self { compositions, things, edits, questions, clip, kl, alpha, .. } = *self;
        let faults = [
            ("--clip", clip, 0.0..=1.0),
            ("--kl", kl, 0.0..=1e3),
            ("--alpha", alpha, 0.0..=2.0),
            ("--scales", self.scales.get() as f64, 1.0..=scales as f64),
        ];
        if let Some((flag, value, range)) = faults.into_iter().find(|(_, value, range)| !range.contains(value)) {
            let message = format!("{flag} {value} is not from {} to {}", range.start(), range.end());
            return Err(Error::usage(message).hint("nextflow train rl --help"));
        }
        if self.group.get() < 2 {
            return Err(Error::usage("--group 1 has no other draws to compare with").hint("--group 8"));
        }
        let mixture = Mixture { compositions, things, edits, questions };
        if mixture.count() == 0 {
            return Err(Error::usage("a step has nothing to draw and nothing to answer").hint("--compositions 2"));
        }
        let prefix = Prefix { scales: self.scales.get(), alpha };
        let objective = Objective { clip, kl };
        Ok(Settings {
            part: &self.part,
            mixture,
            group: self.group.get(),
            prefix,
            objective,
            updates: self.updates.get(),
        })
    }

    fn hyperparameters(&self) -> Hyperparameters {
        let Self { steps, lr, warmup, weight_decay, .. } = *self;
        Hyperparameters { lr, warmup, steps, clip: 1.0, weight_decay, beta2: 0.95 }
    }
}

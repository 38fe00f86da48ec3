//! Reinforcement learning over the first scales (GRPO with prefix tuning): a step draws groups of
//! answers to the same requests, and makes those more likely that are worth more than the mean of
//! their group.
//!
//! The objective is the paper's, with the weights k_t = 1 / (h w)^alpha of a scale normalised to
//! sum to 1 over the trained codes of an image; words weigh what they weigh in supervised training.
//! Draws have no guidance, and all finer scales are drawn and not trained.

mod objective;
mod rollout;
mod task;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use candle_core::quantized::GgmlDType;
use candle_core::{Tensor, Var};

pub use objective::Objective;
pub use rollout::Prefix;
pub use task::Mixture;

use super::optimizer::{Hyperparameters, Optimizer};
use super::progress::Progress;
use super::run::Run;
use super::samples::Samples;
use super::sequence::Sequence;
use crate::backbone::Backbone;
use crate::checkpoint::{Matrices, TRANSFORMER, Weights};
use crate::error::{Error, Result};
use crate::generate::{ModelConfig, Sampling};
use crate::rng::{Rng, Stream};
use crate::text::Text;
use crate::tokenizer::ImageTokenizer;
use objective::{LogProbs, advantages};
use rollout::{Policy, Rollout, frozen};
use task::{Gallery, KINDS, Task};

/// What is learnt, and how.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// Names this part of the training and its state.
    pub part: &'a str,
    /// Tasks of a step.
    pub mixture: Mixture,
    /// G: draws for every task.
    pub group: usize,
    /// What of an image is learnt.
    pub prefix: Prefix,
    /// The objective's constants.
    pub objective: Objective,
    /// Steps of the optimizer on the same draws.
    pub updates: usize,
}

/// Measurements of a step: rewards by kind of task, and what the last update saw.
struct Measured {
    rewards: [f64; KINDS.len()],
    kl: f64,
    clipped: f64,
    grad: f64,
    /// Share of the groups whose draws differ in worth.
    differ: f64,
}

/// Trains the run's transformer for `plan.steps` steps of the optimizer, from the weights in its
/// folder, which are the reference; writes the weights there.
///
/// Errors: usage, without a transformer to start from.
pub fn train(
    run: &Run,
    dataset: &Samples,
    text: Text,
    tokenizer: ImageTokenizer,
    settings: &Settings,
    plan: &Hyperparameters,
) -> Result<()> {
    let file = run.file(TRANSFORMER);
    if !file.exists() {
        return Err(Error::usage(format!("{} does not exist: there is nothing to improve", file.display()))
            .hint("nextflow train transformer --help"));
    }
    let mixed = Matrices::Blocks(GgmlDType::BF16);
    let build = |w: &Weights| Backbone::load(&w.with_matrices(mixed), &run.recipe.backbone);
    let (backbone, vars) = run.load(&[&file], build)?;
    let mut optimizer = Optimizer::new(&vars, |_| true)?;
    let part = settings.part;
    let state = run.file(&format!("transformer-{part}.state"));
    let mut reference = copied(&vars)?;
    if state.exists() {
        let state = optimizer.restore(&state)?;
        for (key, tensor) in &mut reference {
            *tensor = state.tensor(&format!("reference.{key}"), tensor.shape())?.to_device(&run.device)?;
        }
        if optimizer.step < plan.steps {
            run.check_last_part(TRANSFORMER, part)?;
        }
    }
    let gallery = Gallery::new(dataset, &tokenizer)?;
    let config = model_config(run, &tokenizer);
    let of_reference = frozen(reference.clone(), &run.recipe.backbone, tokenizer.quantizer())?;
    let mut policy = Policy::new(config, text, tokenizer, shared(&vars), settings.prefix)?;
    let draws = settings.mixture.count() * settings.group;
    let mut progress = Progress::new(part, plan.steps, optimizer.step, draws / settings.updates);
    while optimizer.step < plan.steps {
        policy = policy.with(shared(&vars))?;
        let before = optimizer.step;
        let step = Step { run, dataset, settings, plan, gallery: &gallery };
        let measured = step.take(&policy, (&backbone, &of_reference), &mut optimizer)?;
        let rewards = KINDS.iter().zip(measured.rewards).map(|(kind, reward)| (*kind, reward));
        let others =
            [("kl", measured.kl), ("clipped", measured.clipped), ("differ", measured.differ), ("grad", measured.grad)];
        let measured: Vec<(&str, f64)> = rewards.chain(others).collect();
        (before..optimizer.step).for_each(|_| progress.step(&measured));
        progress.checkpoint(|| {
            run.save(TRANSFORMER, part, &vars)?;
            let reference = reference.iter().map(|(key, tensor)| (format!("reference.{key}"), tensor.clone()));
            optimizer.save(&state, reference.collect())
        })?;
    }
    Ok(())
}

/// The config of the run's model.
fn model_config(run: &Run, tokenizer: &ImageTokenizer) -> ModelConfig {
    run.recipe.model(tokenizer.config().clone(), Sampling::default())
}

/// Copies of weights.
fn copied(vars: &BTreeMap<String, Var>) -> Result<BTreeMap<String, Tensor>> {
    let copies = vars.iter().map(|(key, var)| Ok((key.clone(), var.as_tensor().copy()?.detach())));
    Ok(copies.collect::<candle_core::Result<_>>()?)
}

/// The weights as they are, which a step of the optimizer changes.
fn shared(vars: &BTreeMap<String, Var>) -> BTreeMap<String, Tensor> {
    vars.iter().map(|(key, var)| (key.clone(), var.as_detached_tensor())).collect()
}

/// What all steps have in common.
struct Step<'a> {
    run: &'a Run,
    dataset: &'a Samples<'a>,
    settings: &'a Settings<'a>,
    plan: &'a Hyperparameters,
    gallery: &'a Gallery,
}

impl Step<'_> {
    /// Draws, and learns from the draws.
    fn take(
        &self,
        policy: &Policy,
        (backbone, reference): (&Backbone, &Backbone),
        optimizer: &mut Optimizer,
    ) -> Result<Measured> {
        let Settings { mixture, group, updates, .. } = *self.settings;
        let rng = Rng::new(self.run.seed(self.settings.part), optimizer.step as u64, Stream::Train, 0);
        let tasks = mixture.tasks(self.dataset, &rng);
        let groups = policy.draw(&tasks, group, rng.fork(u64::MAX).bits(0), self.gallery)?;
        let rewards = mean_rewards(&tasks, &groups);
        let (mut sequences, mut gains, mut differ) = (Vec::new(), Vec::new(), 0);
        for group in groups {
            let rewards: Vec<f64> = group.iter().map(|rollout| rollout.reward).collect();
            let advantages = advantages(&rewards);
            // Draws that are worth the same pull towards the reference alone.
            if advantages.iter().all(|&a| a == 0.0) {
                continue;
            }
            differ += 1;
            sequences.extend(group.into_iter().map(|rollout| rollout.sequence));
            gains.extend(advantages);
        }
        let differ = f64::from(differ) / tasks.len().max(1) as f64;
        let mut measured = Measured { rewards, kl: f64::NAN, clipped: f64::NAN, grad: f64::NAN, differ };
        let scales = self.run.recipe.scales;
        let of_reference = LogProbs::of(reference, &sequences, scales)?;
        let old = if updates > 1 { Some(LogProbs::of(backbone, &sequences, scales)?) } else { None };
        for _ in 0..updates {
            self.update((&sequences, &gains), backbone, old.as_ref(), &of_reference, optimizer, &mut measured)?;
        }
        Ok(measured)
    }

    /// One step of the optimizer on the draws; without any that differ, the step is counted alone.
    fn update(
        &self,
        (sequences, gains): (&[Sequence], &[f64]),
        backbone: &Backbone,
        old: Option<&LogProbs>,
        reference: &LogProbs,
        optimizer: &mut Optimizer,
        measured: &mut Measured,
    ) -> Result<()> {
        if sequences.is_empty() || optimizer.step >= self.plan.steps {
            optimizer.step += usize::from(sequences.is_empty());
            return Ok(());
        }
        let scales = self.run.recipe.scales;
        let (loss, of_loss) = self.settings.objective.loss(backbone, (sequences, gains), old, reference, scales)?;
        measured.grad = optimizer.descend(&loss, self.plan)?;
        (measured.kl, measured.clipped) = (of_loss.kl, of_loss.clipped);
        Ok(())
    }
}

/// The mean reward of each kind of task; NaN where there is none.
fn mean_rewards(tasks: &[Task], groups: &[Vec<Rollout>]) -> [f64; KINDS.len()] {
    let mut sums = [(0.0, 0); KINDS.len()];
    for (task, group) in tasks.iter().zip(groups) {
        let (sum, count) = &mut sums[task.kind()];
        *sum += group.iter().map(|rollout| rollout.reward).sum::<f64>();
        *count += group.len();
    }
    sums.map(|(sum, count)| sum / count as f64)
}

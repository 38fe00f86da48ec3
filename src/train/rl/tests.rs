//! Reinforcement learning on a tiny model.

use candle_core::DType;

use super::*;
use crate::dataset::Dataset;
use crate::train::tests::{library, run, text};

const PART: &str = "rl";

const SETTINGS: Settings = Settings {
    part: PART,
    mixture: Mixture { compositions: 1, things: 1, edits: 1, questions: 1 },
    group: 2,
    prefix: Prefix { scales: 3, alpha: 0.7 },
    objective: Objective { clip: 0.2, kl: 0.02 },
    updates: 2,
};

fn plan(steps: usize) -> Hyperparameters {
    Hyperparameters { lr: 0.01, warmup: 100, steps, clip: 1.0, weight_decay: 0.05, beta2: 0.95 }
}

/// A run with random weights.
fn started(folder: &tempfile::TempDir) -> Result<Run> {
    let run = run(folder)?;
    let (_, weights) = run.load(&[], |w| Backbone::load(w, &run.recipe.backbone))?;
    run.save(TRANSFORMER, "full", &weights)?;
    Ok(run)
}

fn tokenizer(run: &Run) -> Result<ImageTokenizer> {
    Ok(run.load(&[], |w| ImageTokenizer::load(w, &run.recipe.tokenizer))?.0)
}

fn policy(run: &Run) -> Result<(Policy, Backbone)> {
    let tensors = crate::checkpoint::load(&run.file(TRANSFORMER))?;
    let tokenizer = tokenizer(run)?;
    let backbone = frozen(tensors.clone(), &run.recipe.backbone, tokenizer.quantizer())?;
    let config = model_config(run, &tokenizer);
    Ok((Policy::new(config, text()?, tokenizer, tensors, SETTINGS.prefix)?, backbone))
}

fn drawn(library: &Dataset, run: &Run, mixture: Mixture, group: usize) -> Result<(Backbone, Vec<Vec<Rollout>>)> {
    let dataset = Samples::new(library, run.seed(PART))?;
    let (policy, backbone) = policy(run)?;
    let gallery = Gallery::new(&dataset, policy.tokenizer()?)?;
    let tasks = mixture.tasks(&dataset, &Rng::new(3, 0, Stream::Train, 0));
    let rollouts = policy.draw(&tasks, group, 5, &gallery)?;
    Ok((backbone, rollouts))
}

/// The draws of a group differ, are the same with the same seed, and are what a sequence learns:
/// its words, and its codes up to the last trained scale.
#[test]
fn draws_become_sequences_of_the_trained_scales() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (run, library) = (started(&folder)?, library());
    let (_, rollouts) = drawn(&library, &run, SETTINGS.mixture, 3)?;
    let (_, again) = drawn(&library, &run, SETTINGS.mixture, 3)?;
    assert_eq!(rollouts.iter().map(Vec::len).collect::<Vec<_>>(), [3; 4]);
    let ids = |rollout: &Rollout| -> Vec<u32> {
        let sequence = &rollout.sequence;
        sequence.text_targets.iter().chain(&sequence.code_targets).map(|target| target.id).collect()
    };
    for (kind, (group, again)) in rollouts.iter().zip(&again).enumerate() {
        for (rollout, again) in group.iter().zip(again) {
            assert_eq!(ids(rollout), ids(again));
            // 1 + 4 + 9 codes. Random weights may answer a question with an image, too.
            let codes = rollout.sequence.code_targets.len();
            assert!(codes == 14 || codes == 0 && KINDS[kind] == "questions", "{} {codes}", KINDS[kind]);
            assert_eq!(rollout.sequence.text_targets.is_empty(), kind < 2);
            assert!(rollout.reward.is_finite());
        }
        assert!(ids(&group[0]) != ids(&group[1]), "{kind}");
    }
    Ok(())
}

/// The gradient of the objective at the first step is that of the advantage-weighted
/// log-likelihood, and a step along it makes what was worth more more likely.
#[test]
fn what_is_worth_more_becomes_more_likely() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (run, library) = (started(&folder)?, library());
    let mixture = Mixture { compositions: 2, things: 0, edits: 1, questions: 1 };
    let (reference, rollouts) = drawn(&library, &run, mixture, 4)?;
    let sequences: Vec<Sequence> = rollouts.into_iter().flatten().map(|rollout| rollout.sequence).collect();
    let gains: Vec<f64> = (0..sequences.len()).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let scales = run.recipe.scales;
    let (backbone, vars) = run.load(&[&run.file(TRANSFORMER)], |w| Backbone::load(w, &run.recipe.backbone))?;
    let of_reference = LogProbs::of(&reference, &sequences, scales)?;
    let mut optimizer = Optimizer::new(&vars, |_| true)?;
    let loss = || SETTINGS.objective.loss(&backbone, (&sequences, &gains), Some(&of_reference), &of_reference, scales);
    let (before, measured) = loss()?;
    assert!(measured.kl.abs() < 1e-6 && measured.clipped == 0.0, "{measured:?}");
    for _ in 0..8 {
        optimizer.descend(&loss()?.0, &plan(10))?;
    }
    let (after, measured) = loss()?;
    let [before, after] = [before, after].map(|loss| loss.to_dtype(DType::F64).and_then(|l| l.to_scalar::<f64>()));
    assert!(after? < before? - 0.01 && measured.kl > 0.0, "{measured:?}");
    Ok(())
}

#[test]
fn training_resumes_exactly_and_keeps_its_reference() -> Result<()> {
    let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
    let library = library();
    let weights = |run: &Run| crate::checkpoint::load(&run.file(TRANSFORMER));
    let learn = |run: &Run, steps: usize| {
        let dataset = Samples::new(&library, run.seed(PART))?;
        train(run, &dataset, text()?, tokenizer(run)?, &SETTINGS, &plan(steps))
    };
    let [whole, resumed] = [started(&folders[0])?, started(&folders[1])?];
    let start = weights(&whole)?;
    learn(&whole, 4)?;
    learn(&resumed, 2)?;
    learn(&resumed, 4)?;
    let (want, got) = (weights(&whole)?, weights(&resumed)?);
    let apart = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f32>();
    let mut moved = 0;
    for (key, want) in &want {
        assert!(apart(want, &got[key])? < 1e-4, "{key}");
        moved += usize::from(apart(want, &start[key])? > 1e-5);
    }
    assert!(moved > 5, "{moved}");
    let state = crate::checkpoint::load(&resumed.file("transformer-rl.state"))?;
    for (key, start) in &start {
        assert!(apart(start, &state[&format!("reference.{key}")])? == 0.0, "{key}");
    }
    Ok(())
}

#[test]
fn there_must_be_a_model_to_improve() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (run, library) = (run(&folder)?, library());
    let dataset = Samples::new(&library, 1)?;
    let error = train(&run, &dataset, text()?, tokenizer(&run)?, &SETTINGS, &plan(1)).unwrap_err();
    assert!(error.exit_code() == 2 && error.hint.is_some(), "{}", error.message);
    Ok(())
}

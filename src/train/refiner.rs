//! The refiner learns to restore pictures from codes and captions: flow matching, with an
//! exponential moving average of its weights, which is what is kept.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor, Var};
use rayon::prelude::*;

use super::optimizer::{Hyperparameters, Optimizer};
use super::progress::Progress;
use super::refine_pool::{Coded, Item, RefinePool};
use super::run::Run;
use crate::checkpoint::REFINER;
use crate::dataset::{Canvas, SIDE};
use crate::error;
use crate::pixels;
use crate::refiner::{Captions, Condition, Refiner, Time, fold};
use crate::rng::{Rng, Stream};
use crate::tokenizer::ImageTokenizer;

/// Share of the samples whose caption is empty.
const CAPTION_DROP: f64 = 0.1;
/// What is left of the average after one step more; less in the first ones.
const EMA: f64 = 0.999;
/// Normals that noise is cut from: drawing them anew costs more than it brings.
const NORMALS: usize = 1 << 22;

/// A sample of a step.
struct Sample<'a> {
    target: Canvas,
    item: &'a Item,
    coded: &'a Coded,
    rng: Rng,
}

/// Trains for `plan.steps` steps of `batch` images and writes the weights into the run's folder.
pub fn train(
    run: &Run,
    tokenizer: &ImageTokenizer,
    pool: &RefinePool,
    batch: usize,
    plan: &Hyperparameters,
) -> error::Result<()> {
    let config = &run.recipe.refiner;
    let (refiner, vars) = run.load(&[&run.file(REFINER)], |w| Refiner::load(w, config))?;
    let mut optimizer = Optimizer::new(&vars, |_| true)?;
    let mut average = Average::new(&vars)?;
    let state = run.file("refiner.state");
    if state.exists() {
        let state = optimizer.restore(&state)?;
        for (key, mean) in &mut average.0 {
            *mean = state.tensor(&format!("average.{key}"), mean.shape())?.to_device(&run.device)?;
        }
    }
    let normals: Vec<f32> = (0..NORMALS)
        .into_par_iter()
        .map(|i| Rng::new(run.seed("refiner"), 0, Stream::Refine, 0).normal(i as u64) as f32)
        .collect();
    let mut progress = Progress::new("refiner", plan.steps, optimizer.step, batch);
    progress.say(&format!("{} parameters, {} pictures in the pool", optimizer.count(), pool.len()));
    let samples = |step: usize| -> Vec<Sample> {
        let sample = |i: usize| {
            let rng = Rng::new(run.seed("refiner"), i as u64, Stream::Train, step as u64);
            let (item, coded) = pool.pick(&rng);
            Sample { target: pool.target(item), item, coded, rng }
        };
        (0..batch).into_par_iter().map(sample).collect()
    };
    while optimizer.step < plan.steps {
        let (loss, error) = loss(&refiner, tokenizer, &samples(optimizer.step), &normals, &run.device)?;
        let norm = optimizer.descend(&loss, plan)?;
        average.update(&vars, optimizer.step)?;
        progress.step(&[("loss", f64::from(loss.to_scalar::<f32>()?)), ("error", error), ("grad", norm)]);
        progress.checkpoint(|| {
            let means = average.0.iter().map(|(key, mean)| (format!("average.{key}"), mean.clone()));
            optimizer.save(&state, means.collect())?;
            crate::checkpoint::save(&run.file(REFINER), average.0.clone(), None)
        })?;
    }
    Ok(())
}

/// The loss of samples, and the plain mean squared error of the pictures.
fn loss(
    refiner: &Refiner,
    tokenizer: &ImageTokenizer,
    samples: &[Sample],
    normals: &[f32],
    device: &Device,
) -> error::Result<(Tensor, f64)> {
    let config = refiner.config();
    let side = SIDE * config.upscale;
    let rows: Vec<&[u8]> = samples.iter().map(|s| s.coded.picture.as_slice()).collect();
    let picture = pixels::to_tensor(&rows, SIDE, SIDE, device)?;
    let (b, grid) = (samples.len(), SIDE / config.code_cell);
    let features: Vec<f32> = samples.iter().flat_map(|s| s.coded.features.iter().copied()).collect();
    let f = Tensor::from_vec(features, (b, grid, grid, config.code_dim), device)?;
    let semantic = tokenizer.decode_semantic(&f)?.detach();
    let condition = Condition::new(&picture, &f, &semantic, config)?;
    let captions: Vec<&[u32]> = samples
        .iter()
        .map(|s| if s.rng.uniform(10) < CAPTION_DROP { &[][..] } else { s.item.caption(&s.rng) })
        .collect();
    let captions = Captions::new(&captions, &config.caption, device)?;

    let rows: Vec<&[u8]> = samples.iter().map(|s| s.target.rgb.as_slice()).collect();
    let x = fold(&pixels::to_tensor(&rows, side, side, device)?, config.patch)?;
    let (time, values) = (Time::default(), 3 * side * side);
    let t: Vec<f32> = samples.iter().map(|s| time.sample(s.rng.normal(11))).collect();
    let noise = samples.iter().flat_map(|s| {
        let first = s.rng.below(24, NORMALS);
        normals[first..].iter().chain(normals).take(values).copied()
    });
    let noise = Tensor::from_iter(noise, &Device::Cpu)?.reshape(x.shape())?.to_device(device)?;
    let scalar = |f: &dyn Fn(f32) -> f32| Tensor::from_vec(t.iter().map(|&t| f(t)).collect(), (b, 1, 1), device);
    let start = (condition.base() + (noise * config.noise)?)?;
    let z = (x.broadcast_mul(&scalar(&|t| t)?)? + start.broadcast_mul(&scalar(&|t| 1.0 - t)?)?)?;
    let error = (refiner.predict(&z, &t, &condition, &captions)? - x)?.sqr()?.flatten_from(1)?.mean(1)?;
    let weighted = (&error * scalar(&|t| time.weight(t))?.flatten_all()?)?.mean_all()?;
    Ok((weighted, f64::from(error.mean_all()?.to_scalar::<f32>()?)))
}

/// The exponential moving average of all weights.
struct Average(BTreeMap<String, Tensor>);

impl Average {
    fn new(vars: &BTreeMap<String, Var>) -> Result<Self> {
        Ok(Self(
            vars.iter().map(|(key, var)| Ok((key.clone(), var.as_tensor().copy()?.detach()))).collect::<Result<_>>()?,
        ))
    }

    /// Moves towards the weights after so many steps.
    fn update(&mut self, vars: &BTreeMap<String, Var>, steps: usize) -> Result<()> {
        let kept = EMA.min((1.0 + steps as f64) / (10.0 + steps as f64));
        self.0.par_iter_mut().try_for_each(|(key, mean)| {
            *mean = ((&*mean * kept)? + (vars[key].as_tensor().detach() * (1.0 - kept))?)?.detach();
            Ok(())
        })
    }
}

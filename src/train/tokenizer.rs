//! The tokenizer's three stages (paper): the pixel branch alone; both branches and the dual
//! codebook jointly, the semantic encoder fixed; the pixel decoder alone, at twice its capacity,
//! for fixed codes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Result, Tensor, Var};
use clap::ValueEnum;
use rayon::prelude::*;

use super::codebook::{Assignments, Codebook};
use super::optimizer::{Hyperparameters, Optimizer};
use super::progress::Progress;
use super::run::Run;
use super::samples::Samples;
use crate::dataset::SIDE;
use crate::error::{self, Error};
use crate::generate::schedule;
use crate::pixels;
use crate::rng::{Rng, Stream};
use crate::tokenizer::{ImageTokenizer, Quantizer, TokenizerConfig};

/// Which parts learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Stage {
    /// Pixel encoder, decoder and the pixel half of the codebook.
    Pixel,
    /// Everything but the semantic encoder.
    Joint,
    /// The pixel decoder at the capacity of `decoder_final`, with the codes fixed.
    Decoder,
}

/// The weights of the image tokenizer in the run's folder.
const FILE: &str = "image_tokenizer.safetensors";

impl Stage {
    /// Names the stage and its state.
    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// The state to resume from.
    pub fn state(self, run: &Run) -> PathBuf {
        run.file(&format!("tokenizer-{}.state", self.name()))
    }

    /// The draws of a step for one purpose: of the image of an index in the batch, or of the
    /// codebook.
    fn rng(self, run: &Run, purpose: Purpose, index: usize, step: u64) -> Rng {
        Rng::new(run.seed(&self.name()), index as u64, Stream::Train, (purpose as u64) << 48 | step)
    }

    /// The keys that learn by gradient; the codebook learns by moving averages.
    fn learns(self, key: &str) -> bool {
        let among = |prefixes: &[&str]| prefixes.iter().any(|p| key.starts_with(p));
        let pixel = among(&["encoder.", "quant_conv.", "post_quant_conv.", "decoder."]);
        match self {
            Stage::Pixel => pixel,
            Stage::Joint => pixel || among(&["encode_task_layer.", "decoder_vqkd.", "decode_task_layer."]),
            Stage::Decoder => among(&["post_quant_conv.", "decoder."]),
        }
    }
}

/// What a stage draws for. The dataset, which has the same seed, numbers its purposes far below.
#[derive(Clone, Copy)]
enum Purpose {
    /// The scales that are left out of an image.
    ScaleDrop = 1,
    /// Initial codebook.
    Spread,
    /// Where dead entries of the codebook go.
    Revive,
}

/// Share of the images of a batch of which a random prefix of the scales is decoded (the paper's
/// 50%).
const SCALE_DROP: f64 = 0.5;
/// Weight of the pull of the encoder towards its codes (VQ-VAE's beta).
const COMMITMENT: f64 = 0.25;
/// Weight of the reconstruction of the semantic features: the share of their energy that is missed.
/// More than this, and the codes serve meaning at the cost of the picture.
const SEMANTIC: f64 = 0.05;
/// Weight of the absolute error beside the squared one.
const ABSOLUTE: f64 = 0.1;

/// First steps of the first stage without codes: the codebook starts on features that already mean
/// something.
const CONTINUOUS: usize = 300;

/// Trains one stage for `plan.steps` steps of `batch` images and writes the weights into the run's
/// folder.
pub fn train(run: &Run, dataset: &Samples, stage: Stage, batch: usize, plan: &Hyperparameters) -> error::Result<()> {
    let config = if stage == Stage::Decoder { run.recipe.tokenizer_final() } else { run.recipe.tokenizer.clone() };
    let files = [run.file(FILE), run.file("semantic.safetensors")];
    let (tokenizer, vars) = run.load(&[&files[0], &files[1]], |w| ImageTokenizer::load(w, &config))?;
    let mut optimizer = Optimizer::new(&vars, |key| stage.learns(key))?;
    let mut codebook = Codebook::new(&stage_codebook(&config, stage), tokenizer.quantizer().table().to_vec());
    let state = stage.state(run);
    if state.exists() {
        codebook.restore(&optimizer.restore(&state)?)?;
    }
    let mut later = Stage::value_variants().iter().filter(|other| **other > stage).map(|later| later.state(run));
    if optimizer.step < plan.steps
        && let Some(later) = later.rfind(|state| state.exists())
    {
        let message = format!("{} continues from weights that this stage would change", later.display());
        return Err(Error::usage(message).hint(format!("rm {}", later.display())));
    }
    let mut progress = Progress::new(&format!("tokenizer {}", stage.name()), plan.steps, optimizer.step, batch);
    progress.say(&format!("{} parameters, {} codes", optimizer.count(), config.codebook.size));
    while optimizer.step < plan.steps {
        let step = optimizer.step;
        let images: Vec<Vec<u8>> =
            (0..batch).into_par_iter().map(|i| dataset.picture((step * batch + i) as u64)).collect();
        let rows: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        let images = pixels::to_tensor(&rows, SIDE, SIDE, &run.device)?;
        let continuous = stage == Stage::Pixel && step < CONTINUOUS;
        if stage == Stage::Pixel && step == CONTINUOUS {
            settle(run, &tokenizer, &mut codebook, dataset, batch)?;
        }
        let losses = losses(run, &tokenizer, &mut codebook, &images, stage, step, continuous)?;
        let total = losses.total()?;
        let norm = optimizer.descend(&total, plan)?;
        progress.step(&[
            ("loss", f64::from(total.to_scalar::<f32>()?)),
            ("psnr", losses.psnr),
            ("full", losses.psnr_full),
            ("lost", losses.lost),
            ("sem", f64::from(losses.semantic.to_scalar::<f32>()?)),
            ("grad", norm),
            ("codes", codebook.in_use() as f64),
        ]);
        progress.checkpoint(|| {
            set_codebook(&vars, &codebook, &config)?;
            run.save(FILE, &stage.name(), &vars)?;
            optimizer.save(&state, codebook.state()?)
        })?;
    }
    Ok(())
}

/// Spreads the codebook over the features as they are, by k-means on some batches.
fn settle(
    run: &Run,
    tokenizer: &ImageTokenizer,
    codebook: &mut Codebook,
    dataset: &Samples,
    batch: usize,
) -> Result<()> {
    for round in 0..40u64 {
        let images: Vec<Vec<u8>> =
            (0..batch as u64).into_par_iter().map(|i| dataset.picture(1 << 40 | (round * batch as u64 + i))).collect();
        let rows: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        let images = pixels::to_tensor(&rows, SIDE, SIDE, tokenizer.quantizer().device())?;
        let (f, _) = features(tokenizer, &images, Stage::Pixel)?;
        let (_, h, w, dim) = f.dims4()?;
        let f = f.flatten_all()?.to_vec1::<f32>()?;
        if round == 0 {
            codebook.spread(&f, &Stage::Pixel.rng(run, Purpose::Spread, 0, 0));
        }
        let quantizer = codebook.quantizer()?;
        let assigned: Vec<Assignments> = f
            .par_chunks_exact(h * w * dim)
            .map(|f| {
                let mut assignments = Assignments::default();
                quantizer.encode(f, square_scales(h), None, |_, z, code| assignments.push(code, z));
                assignments
            })
            .collect();
        codebook.learn(assigned.iter(), &Stage::Pixel.rng(run, Purpose::Revive, 0, 1 << 40 | round));
    }
    Ok(())
}

/// In the first stage the semantic half is empty and weighs nothing.
fn stage_codebook(config: &TokenizerConfig, stage: Stage) -> crate::tokenizer::CodebookConfig {
    let mut codebook = config.codebook.clone();
    if stage == Stage::Pixel {
        codebook.w_sem = 0.0;
    }
    codebook
}

/// Puts the codebook, which learns by itself, where the other weights are.
fn set_codebook(vars: &BTreeMap<String, Var>, book: &Codebook, config: &TokenizerConfig) -> Result<()> {
    let (size, split, dim) = (config.codebook.size, config.codebook.semantic_dim, config.codebook.dim());
    let table = Tensor::from_slice(book.table(), (size, dim), &Device::Cpu)?;
    for (key, half) in [
        ("quantize.embedding_vqkd.weight", table.narrow(1, 0, split)?),
        ("quantize.embedding_vqgan.weight", table.narrow(1, split, dim - split)?),
    ] {
        vars[key].set(&half.contiguous()?.to_device(vars[key].device())?)?;
    }
    Ok(())
}

/// The features to quantise, (B, h, w, D), and the semantic encoder's tokens.
fn features(tokenizer: &ImageTokenizer, images: &Tensor, stage: Stage) -> Result<(Tensor, Option<Tensor>)> {
    let pixel = tokenizer.pixel_half(images)?;
    let (b, h, w, _) = pixel.dims4()?;
    let (semantic, tokens) = if stage == Stage::Pixel {
        let dim = tokenizer.config().codebook.semantic_dim;
        (Tensor::zeros((b, h, w, dim), DType::F32, images.device())?, None)
    } else {
        let tokens = tokenizer.semantic().forward(images)?.detach();
        (tokenizer.semantic_half(&tokens, (h, w))?, Some(tokens))
    };
    Ok((Tensor::cat(&[semantic, pixel], 3)?, tokens))
}

struct Losses {
    reconstruction: Tensor,
    commitment: Tensor,
    semantic: Tensor,
    /// Share of the features' energy that the codes miss.
    lost: f64,
    /// Of the whole batch, in dB.
    psnr: f64,
    /// Of the images that kept all their scales, in dB.
    psnr_full: f64,
}

impl Losses {
    fn total(&self) -> Result<Tensor> {
        &self.reconstruction + ((&self.commitment * COMMITMENT)? + (&self.semantic * SEMANTIC)?)?
    }
}

fn losses(
    run: &Run,
    tokenizer: &ImageTokenizer,
    codebook: &mut Codebook,
    images: &Tensor,
    stage: Stage,
    step: usize,
    continuous: bool,
) -> Result<Losses> {
    let (f, tokens) = features(tokenizer, images, stage)?;
    let f = if stage == Stage::Decoder { f.detach() } else { f };
    let (_, h, w, dim) = f.dims4()?;
    let scales = square_scales(h);
    let raw = f.flatten_all()?.to_vec1::<f32>()?;
    let quantizer = codebook.quantizer()?;
    let quantised: Vec<(Vec<f32>, bool, Assignments)> = raw
        .par_chunks_exact(h * w * dim)
        .enumerate()
        .map(|(i, f)| quantise(&quantizer, f, scales, (h, w), &stage.rng(run, Purpose::ScaleDrop, i, step as u64)))
        .collect();
    if stage != Stage::Decoder && !continuous {
        let rng = stage.rng(run, Purpose::Revive, 0, step as u64);
        codebook.learn(quantised.iter().map(|(_, _, a)| a), &rng);
    }
    let f_hat =
        Tensor::from_vec(quantised.iter().flat_map(|(f, _, _)| f.iter().copied()).collect(), f.shape(), f.device())?;
    // Straight through: the decoder sees the codes, the encoder gets the decoder's gradient.
    let through = if continuous { f.clone() } else { (&f + (&f_hat - &f)?.detach())? };
    let energy = f.sqr()?.mean_all()?.to_scalar::<f32>()?;
    let lost = (&f - &f_hat)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
    let image = tokenizer.decode_features(&through)?;
    let error = (image - images)?;
    let squares = error.sqr()?.mean(vec![1, 2, 3])?;
    let each = squares.to_vec1::<f32>()?;
    let full: Vec<f32> = each.iter().zip(&quantised).filter(|(_, q)| q.1).map(|(e, _)| *e).collect();
    let zero = Tensor::zeros((), DType::F32, f.device())?;
    Ok(Losses {
        reconstruction: (squares.mean_all()? + (error.abs()?.mean_all()? * ABSOLUTE)?)?,
        lost: f64::from(lost / energy),
        commitment: if stage == Stage::Decoder || continuous {
            zero.clone()
        } else {
            (&f - f_hat)?.sqr()?.mean_all()?
        },
        semantic: match tokens {
            Some(tokens) if stage == Stage::Joint => {
                let energy = tokens.sqr()?.mean_all()?;
                (tokenizer.decode_semantic(&through)? - tokens)?.sqr()?.mean_all()?.div(&energy)?
            }
            _ => zero,
        },
        psnr: psnr(&each),
        psnr_full: psnr(&full),
    })
}

/// The scales of a square image whose last grid has `side` rows.
pub(super) fn square_scales(side: usize) -> &'static [(usize, usize)] {
    let scales = &schedule::nearest(1.0).scales;
    let count = scales.iter().position(|s| s.0 == side).map_or(scales.len(), |i| i + 1);
    &scales[..count]
}

/// F of all scales or, for half of the images, of a random prefix; whether it is whole; the codes'
/// residuals.
fn quantise(
    quantizer: &Quantizer,
    f: &[f32],
    scales: &[(usize, usize)],
    grid: (usize, usize),
    rng: &Rng,
) -> (Vec<f32>, bool, Assignments) {
    let mut assignments = Assignments::default();
    let encoded = quantizer.encode(f, scales, None, |_, z, code| assignments.push(code, z));
    if rng.uniform(0) < SCALE_DROP {
        let keep = 1 + rng.below(1, scales.len() - 1);
        (quantizer.accumulate(&encoded.codes[..keep], scales, grid), false, assignments)
    } else {
        (encoded.f_hat, true, assignments)
    }
}

/// Mean PSNR in dB of images whose mean squared errors are measured on [-1, 1].
fn psnr(errors: &[f32]) -> f64 {
    errors.iter().map(|&e| 10.0 * (4.0 / f64::from(e)).log10()).sum::<f64>() / errors.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::CodebookConfig;
    use crate::train::tests;

    #[test]
    fn half_of_the_images_lose_their_last_scales() -> Result<()> {
        let normals = |seed, count| {
            let rng = Rng::new(seed, 0, Stream::Train, 0);
            (0..count).map(|i| rng.normal(i) as f32).collect::<Vec<f32>>()
        };
        let book = CodebookConfig { size: 16, semantic_dim: 2, pixel_dim: 2, w_sem: 1.0, w_pix: 1.0, l2_norm: false };
        let quantizer = Quantizer::from_table(&book, normals(1, 16 * 4), &Device::Cpu)?;
        let (scales, f) = (square_scales(8), normals(2, 64 * 4));
        let all = quantizer.encode(&f, scales, None, |_, _, _| {}).f_hat;
        let mut whole = 0;
        for i in 0..400 {
            let (f_hat, is_whole, _) = quantise(&quantizer, &f, scales, (8, 8), &Rng::new(3, i, Stream::Train, 0));
            assert_eq!(f_hat == all, is_whole);
            whole += usize::from(is_whole);
        }
        assert!((160..=240).contains(&whole), "{whole} of 400");
        Ok(())
    }

    #[test]
    fn stages_seeds_and_purposes_have_draws_of_their_own() -> error::Result<()> {
        let folder = tempfile::tempdir()?;
        let mut run = tests::run(&folder)?;
        let bits = |run: &Run, stage: Stage, purpose| stage.rng(run, purpose, 3, 5).bits(0);
        let first = bits(&run, Stage::Pixel, Purpose::ScaleDrop);
        assert_eq!(first, bits(&run, Stage::Pixel, Purpose::ScaleDrop));
        assert_ne!(first, bits(&run, Stage::Joint, Purpose::ScaleDrop));
        assert_ne!(first, bits(&run, Stage::Pixel, Purpose::Revive));
        run.recipe.seed += 1;
        assert_ne!(first, bits(&run, Stage::Pixel, Purpose::ScaleDrop));
        Ok(())
    }
}

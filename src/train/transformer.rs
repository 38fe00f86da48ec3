//! Training of the transformer: cross-entropy over the codes of every scale and over text, with the
//! paper's scale reweighting and self-correction. First on captions, then on dialogues, with
//! targets in the model's turns only.

use std::collections::BTreeMap;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::dialogue::{Length, Turns, dialogue};
use super::optimizer::{Hyperparameters, Optimizer};
use super::pool::{Pool, Shelf};
use super::progress::Progress;
use super::run::Run;
use super::samples::Samples;
use super::sequence::{Batch, Picture, Sequence};
use crate::backbone::Backbone;
use crate::chat::template::{ImageMarks, Part, Piece, Role, Template};
use crate::checkpoint::{Matrices, TRANSFORMER, Weights};
use crate::dataset::Canvas;
use crate::error::Result;
use crate::generate::schedule;
use crate::pixels;
use crate::rng::{Rng, Stream};
use crate::text::Text;
use crate::tokenizer::{ImageTokenizer, Quantizer};

/// Share of the samples that are drawn from an empty prompt, for guidance.
const CAPTION_DROP: f64 = 0.1;

/// Inputs of a part of the training.
pub struct Lesson<'a> {
    /// The run.
    pub run: &'a Run,
    /// Names this part of the training and its state: a later part goes on from the weights of an
    /// earlier one.
    pub part: &'a str,
    /// The images' tokenizer, whose weights are fixed.
    pub tokenizer: &'a ImageTokenizer,
    /// Its quantiser, on the CPU: sequences are made there.
    pub quantizer: &'a Quantizer,
    /// Encoded images with captions.
    pub pool: &'a Pool,
    /// Number of scales to train, from the first.
    pub scales: usize,
    /// Where dialogues come from, if they are part of it.
    pub dialogues: Option<(&'a Samples<'a>, &'a Text)>,
    /// Only dialogues without images.
    pub words_alone: bool,
}

/// Trains for `plan.steps` steps of `batch` images and writes the weights into the run's folder.
///
/// Errors: usage, for a part with steps left from which another one has gone on.
pub fn train(lesson: &Lesson, batch: usize, plan: &Hyperparameters) -> Result<()> {
    let (run, part) = (lesson.run, lesson.part);
    let mixed = Matrices::Blocks(GgmlDType::BF16);
    let build = |w: &Weights| Backbone::load(&w.with_matrices(mixed), &run.recipe.backbone);
    let (backbone, vars) = run.load(&[&run.file(TRANSFORMER)], build)?;
    let mut optimizer = Optimizer::new(&vars, |_| true)?;
    let state = run.file(&format!("transformer-{part}.state"));
    if state.exists() {
        optimizer.restore(&state)?;
        if optimizer.step < plan.steps {
            run.check_last_part(TRANSFORMER, part)?;
        }
    }
    let mut progress = Progress::new(&format!("transformer {part}"), plan.steps, optimizer.step, batch);
    progress.say(&format!("{} parameters, {} images in the pool", optimizer.count(), lesson.pool.len()));
    let square = &schedule::nearest(1.0).prefix(run.recipe.scales)[..lesson.scales];
    let names: Vec<String> = square.iter().map(|(h, w)| format!("{h}x{w}")).collect();
    let groups = |step: usize| if step < plan.steps { lesson.groups(batch, step) } else { Ok(Vec::new()) };
    let mut next = groups(optimizer.step)?;
    while optimizer.step < plan.steps {
        // Processors make the next sequences while a GPU learns from these.
        let (these, step) = (next, optimizer.step + 1);
        let learn = || learn(&backbone, &mut optimizer, &these, run.recipe.scales, plan);
        let (learnt, more) = rayon::join(learn, || groups(step));
        let (mut told, scales) = learnt?;
        told.extend(names.iter().map(String::as_str).zip(scales));
        progress.step(&told);
        progress.checkpoint(|| {
            run.save(TRANSFORMER, part, &vars)?;
            optimizer.save(&state, BTreeMap::new())
        })?;
        next = more?;
    }
    Ok(())
}

/// Sequences whose mean loss is one term of a step's.
struct Group {
    /// What the log calls the loss of its words.
    name: &'static str,
    /// Of the term.
    weight: f64,
    sequences: Vec<Sequence>,
}

/// Measurements of a step for the log, by name.
type Told = Vec<(&'static str, f64)>;

/// One step down the loss of all groups of sequences. What was measured, and the mean loss of each
/// scale of the first group.
fn learn(
    backbone: &Backbone,
    optimizer: &mut Optimizer,
    groups: &[Group],
    scales: usize,
    plan: &Hyperparameters,
) -> Result<(Told, Vec<f64>)> {
    let mut loss = Tensor::zeros((), DType::F32, backbone.device())?;
    let mut parts = Vec::new();
    for Group { name, weight, sequences } in groups {
        let (part, losses) = Batch(sequences).loss(backbone, scales)?;
        loss = (loss + (part * *weight)?)?;
        parts.push((*name, losses));
    }
    let norm = optimizer.descend(&loss, plan)?;
    let (mut told, mut means) = (vec![("loss", f64::from(loss.to_scalar::<f32>()?)), ("grad", norm)], Vec::new());
    for (i, (name, losses)) in parts.into_iter().enumerate() {
        let of_part = losses.means()?;
        // Captions alone have no text targets, and words alone no codes.
        if groups.len() > 1 || !of_part.words.is_nan() {
            told.push((name, of_part.words));
        }
        if i == 0 && of_part.scales.iter().any(|loss| !loss.is_nan()) {
            means = of_part.scales;
        }
    }
    Ok((told, means))
}

impl Lesson<'_> {
    /// The sequences of a step: those with images, unless there are [none](Self::words_alone), then
    /// those of dialogues that end where images would begin. Most edits that go wrong are wrong in
    /// words already, and words cost little: hence so many, and their weights.
    fn groups(&self, size: usize, step: usize) -> Result<Vec<Group>> {
        let mut groups = Vec::new();
        if !self.words_alone {
            groups.push(Group { name: "interleaved", weight: 1.0, sequences: self.sequences(size, step)? });
        }
        if let Some((dataset, text)) = self.dialogues {
            let parts = if self.words_alone {
                vec![("words", Length::Words, size)]
            } else {
                vec![("words", Length::Words, size.div_ceil(2)), ("look", Length::Look, size.div_ceil(4))]
            };
            for (name, length, size) in parts {
                let sequences = self.dialogues(dataset, text, size, step, length)?;
                groups.push(Group { name, weight: 2.0, sequences });
            }
        }
        Ok(groups)
    }

    /// The sequences with images. With dialogues one step in three has long ones, half as many, and
    /// the others some short ones: what a model draws most often it draws for a caption.
    fn sequences(&self, size: usize, step: usize) -> Result<Vec<Sequence>> {
        let Some((dataset, text)) = self.dialogues else {
            return self.captioned(self.pool.shelf(step), size, step);
        };
        let shelf = self.pool.shelf(step - step / 3);
        match step % 3 {
            2 => self.dialogues(dataset, text, size / 2, step, Length::Long),
            _ if !self.pool.is_square(shelf) => self.captioned(shelf, size, step),
            _ => {
                let dialogues = size / 4;
                let mut sequences = self.captioned(shelf, size - dialogues, step)?;
                sequences.extend(self.dialogues(dataset, text, dialogues, step, Length::Short)?);
                Ok(sequences)
            }
        }
    }

    /// The draws of one sequence, for one purpose.
    fn rng(&self, index: u64, purpose: u64) -> Rng {
        Rng::new(self.run.seed(self.part), index, Stream::Train, purpose)
    }

    /// Captions and the images after them.
    fn captioned(&self, shelf: &Shelf, size: usize, step: usize) -> Result<Vec<Sequence>> {
        // Dialogues have many.
        let shapes = if self.dialogues.is_some() { 0.2 } else { 0.48 };
        let draws = |i: usize, purpose: u64| self.rng(i as u64, purpose << 32 | step as u64);
        let sequences = (0..size).into_par_iter().map(|i| {
            let (rng, noise) = (draws(i, 1), draws(i, 2));
            let item = shelf.sample(&rng, shapes);
            let mut sequence = Sequence::default();
            if rng.uniform(100) >= CAPTION_DROP {
                sequence.push_text(item.caption(&rng));
            }
            self.push_image(&mut sequence, &item.features, shelf.grids, Learn::Corrections(&noise), false)?;
            Ok(sequence)
        });
        sequences.collect()
    }

    fn dialogues(
        &self,
        dataset: &Samples,
        text: &Text,
        size: usize,
        step: usize,
        length: Length,
    ) -> Result<Vec<Sequence>> {
        let first = (step * size) as u64;
        let dialogues: Vec<Turns> =
            (0..size as u64).into_par_iter().map(|i| dialogue(dataset, first + i, length)).collect();
        let template = Template::of(text, ImageMarks::NONE)?;
        let short = length.ends_at_images();
        let mut features = self.features(&dialogues, short)?.into_iter();
        let dialogues: Vec<_> = dialogues
            .into_iter()
            .enumerate()
            .map(|(i, turns)| {
                let turns: Vec<(Role, Vec<Part<Vec<f32>>>)> = turns
                    .into_iter()
                    .map(|(role, parts)| {
                        let left_out = short && role == Role::Assistant;
                        let part = |part| match part {
                            Part::Text(text) => Part::Text(text),
                            Part::Drawn(text, ids) => Part::Drawn(text, ids),
                            Part::Image(_) if left_out => Part::Image(Vec::new()),
                            Part::Image(_) => Part::Image(features.next().unwrap_or_default()),
                        };
                        (role, parts.into_iter().map(part).collect())
                    })
                    .collect();
                (first + i as u64, turns)
            })
            .collect();
        dialogues.par_iter().map(|(index, turns)| self.dialogue(text, &template, *index, turns, short)).collect()
    }

    /// What is quantised, of all images in the order of the dialogues, or of those that the user
    /// shows: (h * w, D) each.
    fn features(&self, dialogues: &[Turns], shown: bool) -> Result<Vec<Vec<f32>>> {
        let turns = dialogues.iter().flatten().filter(|(role, _)| !shown || *role == Role::User);
        let parts = turns.flat_map(|(_, parts)| parts);
        let canvases: Vec<&Canvas> = parts.filter_map(Part::image).collect();
        let Some(first) = canvases.first() else { return Ok(Vec::new()) };
        let rows: Vec<&[u8]> = canvases.iter().map(|c| c.rgb.as_slice()).collect();
        let f = self.tokenizer.features(&pixels::to_tensor(&rows, first.height, first.width, &self.run.device)?)?;
        let image = f.elem_count() / canvases.len();
        Ok(f.flatten_all()?.to_vec1::<f32>()?.chunks_exact(image).map(<[f32]>::to_vec).collect())
    }

    fn dialogue(
        &self,
        text: &Text,
        template: &Template,
        index: u64,
        turns: &[(Role, Vec<Part<Vec<f32>>>)],
        short: bool,
    ) -> Result<Sequence> {
        let rng = self.rng(index, 3 << 32);
        let config = &self.run.recipe.backbone;
        let drawn = turns.last().is_some_and(|(_, parts)| parts.iter().any(|p| p.image().is_some()));
        // Without words, for guidance.
        let silent = drawn && !short && rng.uniform(0) < CAPTION_DROP;
        let turns: Vec<(Role, Vec<Part<Vec<f32>>>)> = turns
            .iter()
            .map(|(role, parts)| {
                let heard = |part: &&Part<_>| !silent || part.image().is_some();
                (*role, parts.iter().filter(heard).cloned().collect())
            })
            .collect();
        // Half of the images to draw are encoded without errors to correct: then what is kept has
        // the very codes of its source, which shows where to look for them.
        let exact = rng.uniform(1) < 0.5;
        let grids = schedule::nearest(1.0).prefix(self.run.recipe.scales);
        let mut sequence = Sequence::default();
        let pieces = template.render(text, "", turns.iter().map(|(role, parts)| (*role, &parts[..])), &[])?;
        for (i, (piece, said)) in pieces.into_iter().enumerate() {
            match piece {
                Piece::Tokens(ids) => {
                    for id in ids {
                        if said {
                            sequence.expect_text(id);
                        }
                        sequence.push_text(&[id]);
                    }
                }
                Piece::Image(features) => {
                    let noise = self.rng(index, 4 << 32 | i as u64);
                    if said {
                        sequence.expect_text(config.boi());
                    }
                    if said && short {
                        break;
                    }
                    let manner = match (said, exact) {
                        (false, _) => Learn::Nothing,
                        (true, true) => Learn::Codes,
                        (true, false) => Learn::Corrections(&noise),
                    };
                    self.push_image(&mut sequence, features, grids, manner, true)?;
                }
            }
        }
        Ok(sequence)
    }

    /// Appends an image of these features.
    fn push_image(
        &self,
        sequence: &mut Sequence,
        features: &[f32],
        grids: &[(usize, usize)],
        learn: Learn,
        context: bool,
    ) -> Result<()> {
        let (recipe, quantizer) = (&self.run.recipe, self.quantizer);
        let correction = match learn {
            Learn::Corrections(noise) => Some((&recipe.self_correction, noise)),
            Learn::Nothing | Learn::Codes => None,
        };
        let encoded = quantizer.encode(features, grids, correction, |_, _, _| {});
        let alpha = if matches!(learn, Learn::Nothing) { None } else { Some(recipe.scale_reweight) };
        let grids = &grids[..self.scales.min(grids.len())];
        Ok(sequence.push_image(&recipe.backbone, quantizer, &Picture { grids, encoded: &encoded, context, alpha })?)
    }
}

/// Targets of an image.
#[derive(Clone, Copy)]
enum Learn<'a> {
    /// Nothing: the user shows it.
    Nothing,
    /// Its codes.
    Codes,
    /// Its codes, where the inputs are others that are drawn among the nearest (self-correction).
    Corrections(&'a Rng),
}

#[cfg(test)]
mod tests;

//! Draws of the model that is trained: what it says and draws for a task, with the sequence to
//! learn from.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use candle_core::Tensor;

use super::task::{Gallery, Outcome, Task};
use crate::backbone::{Backbone, BackboneConfig};
use crate::chat::template::{ImageMarks, Piece, Template};
use crate::chat::{ChatModel, FinishReason, Part, Picture, ReplyOptions, Role, Session, TextSampling};
use crate::checkpoint::Weights;
use crate::error::{Error, Kind, Result};
use crate::generate::next_input::NextInput;
use crate::generate::prompt::MAX_THOUGHT;
use crate::generate::{Batch, ImageCodes, ModelConfig, Sampling, draw_after};
use crate::scenes::Scene;
use crate::text::Text;
use crate::tokenizer::{Encoded, ImageTokenizer, Quantizer};
use crate::train::sequence::{self, Sequence};

/// Images that are drawn in one pass.
const AT_ONCE: usize = 32;

/// One draw.
pub struct Rollout {
    /// The request, and the answer as targets: all of its words, and the codes of the trained
    /// scales.
    pub sequence: Sequence,
    /// What it is worth.
    pub reward: f64,
}

/// How draws become sequences.
#[derive(Clone, Copy, Debug)]
pub struct Prefix {
    /// m: scales to train, from the first; the finer ones are drawn and not trained.
    pub scales: usize,
    /// Codes of an h x w grid weigh 1 / (h w)^alpha.
    pub alpha: f64,
}

/// The model as it is in a step.
pub struct Policy {
    chat: ChatModel,
    template: Template,
    quantizer: Quantizer,
    /// Grids of a square image, coarse to fine.
    grids: Vec<(usize, usize)>,
    prefix: Prefix,
}

impl Policy {
    /// A model of these tensors.
    ///
    /// Errors: tensors that do not fit the config, and [`Kind::Model`] for a text tokenizer without
    /// the tokens of conversations.
    pub fn new(
        config: ModelConfig,
        text: Text,
        tokenizer: ImageTokenizer,
        tensors: BTreeMap<String, Tensor>,
        prefix: Prefix,
    ) -> Result<Self> {
        let backbone = frozen(tensors, &config.backbone, tokenizer.quantizer())?;
        let (template, quantizer) = (Template::of(&text, ImageMarks::NONE)?, tokenizer.quantizer().clone());
        let chat = ChatModel::nextflow(config, text, backbone, tokenizer)?;
        let grids = chat.usual_scales()?;
        Ok(Self { chat, template, quantizer, grids, prefix })
    }

    /// The same with other weights.
    pub fn with(self, tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let backbone = frozen(tensors, &self.chat.config().backbone, &self.quantizer)?;
        Ok(Self { chat: self.chat.with_backbone(backbone), ..self })
    }

    /// The image tokenizer.
    pub fn tokenizer(&self) -> Result<&ImageTokenizer> {
        self.chat.tokenizer().ok_or_else(|| self.chat.draws_nothing())
    }

    /// `group` draws for each of the tasks, without guidance and at temperature 1, each with a seed
    /// of its own from `seed` on.
    pub fn draw(&self, tasks: &[Task], group: usize, seed: u64, gallery: &Gallery) -> Result<Vec<Vec<Rollout>>> {
        let mut pictures = self.draw_captions(tasks, group, seed)?.into_iter();
        let seed = |task: usize, i: usize| seed.wrapping_add((task * group + i) as u64);
        let rollouts = tasks.iter().enumerate().map(|(n, task)| match task.is_dialogue() {
            true => self.converse(task, (0..group).map(|i| seed(n, i)), gallery),
            false => {
                let drawn = pictures.by_ref().take(group);
                drawn.map(|codes| self.captioned(task, &codes, gallery)).collect()
            }
        });
        rollouts.collect()
    }

    /// The codes of the draws for all captions, one task after another.
    fn draw_captions(&self, tasks: &[Task], group: usize, seed: u64) -> Result<Vec<ImageCodes>> {
        let (config, sampling) = (&self.chat.config().backbone, Sampling::default());
        let model = self.chat.config().drawing.as_ref().ok_or_else(|| self.chat.draws_nothing())?;
        let mut jobs = Vec::new();
        for (n, task) in tasks.iter().enumerate().filter(|(_, task)| !task.is_dialogue()) {
            let prefix = model.prompt.prefix(&self.chat.text().encode(task.request().0)?, &[config.boi()]);
            jobs.extend((0..group).map(|i| (prefix.clone(), seed.wrapping_add((n * group + i) as u64))));
        }
        let mut codes = Vec::new();
        for jobs in jobs.chunks(AT_ONCE) {
            let (prefixes, seeds): (Vec<_>, Vec<u64>) = jobs.iter().cloned().unzip();
            let input = NextInput::of_table(&self.quantizer, config.input_mode, &self.grids);
            let batch = Batch { scales: &self.grids, sampling: &sampling, seeds: &seeds };
            let unconditional = model.prompt.prefix(&[], &[config.boi()]);
            let reader = self.chat.reader().backbone()?;
            codes.extend(draw_after(reader, input, &prefixes, &unconditional, batch, &mut |_| {
                ControlFlow::Continue(())
            })?);
        }
        Ok(codes)
    }

    /// The draw of a caption.
    fn captioned(&self, task: &Task, codes: &ImageCodes, gallery: &Gallery) -> Result<Rollout> {
        let mut sequence = Sequence::default();
        sequence.push_text(&self.chat.text().encode(task.request().0)?);
        self.push_drawn(&mut sequence, codes)?;
        let image = self.chat.pixels(codes, &self.grids)?;
        let reward = task.reward(&Outcome { words: "", image: Some(&image) }, gallery, self.tokenizer()?)?;
        Ok(Rollout { sequence, reward })
    }

    /// Answers to one message, each with its seed.
    fn converse(&self, task: &Task, seeds: impl Iterator<Item = u64>, gallery: &Gallery) -> Result<Vec<Rollout>> {
        let (text, scene) = task.request();
        let picture = scene.map(|scene| self.look(scene)).transpose()?;
        let mut session = Session::new(&self.chat)?;
        let mut rollouts = Vec::new();
        for seed in seeds {
            // Text and images at temperature 1, without guidance.
            let sampling = TextSampling { temperature: 1.0, ..TextSampling::GREEDY };
            let image = Some(Sampling::default());
            let options = ReplyOptions { sampling, max_tokens: MAX_THOUGHT, image, seed, guide_from_sources: true };
            let pictures = picture.iter().cloned().collect();
            let reply = match task.draws() {
                true => session.draw(pictures, text, &options, None, &mut |_| ControlFlow::Continue(()))?,
                false => session.say(pictures, text, &options, &mut |_| ControlFlow::Continue(()))?,
            };
            let drawn = session.last_image().map(|drawn| self.chat.decode(drawn)).transpose()?;
            let outcome = Outcome { words: &reply.text, image: drawn.as_ref() };
            let reward = task.reward(&outcome, gallery, self.tokenizer()?)?;
            let ended = reply.ending == FinishReason::Stop && !task.draws();
            rollouts.push(Rollout { sequence: self.answered(&session, ended)?, reward });
            // The next answer finds the question in the cache.
            session.undo();
        }
        Ok(rollouts)
    }

    /// Encodes a composition.
    fn look(&self, scene: &Scene) -> Result<Picture> {
        let side = crate::dataset::SIDE;
        let image = image::RgbImage::from_raw(side as u32, side as u32, scene.render(side, side))
            .ok_or_else(|| Error::new(Kind::Failure, "a rendered scene has the wrong size"))?;
        self.chat.encode("scene", &image, &self.grids)
    }

    /// The conversation so far as a sequence that ends with the model's answer: its words and,
    /// where it `ended` them, the token for that are targets, and the codes of its image.
    fn answered(&self, session: &Session, ended: bool) -> Result<Sequence> {
        let config = &self.chat.config().backbone;
        let (answer, before) = session
            .turns()
            .split_last()
            .filter(|(last, _)| last.role == Role::Assistant)
            .ok_or_else(|| Error::new(Kind::Failure, "the model has not answered"))?;
        let mut sequence = Sequence::default();
        let turns = before.iter().map(|turn| (turn.role, &turn.parts[..]));
        for (piece, _) in self.template.render(self.chat.text(), session.system(), turns, &[])? {
            match piece {
                Piece::Tokens(ids) => sequence.push_text(&ids),
                Piece::Image(picture) => {
                    let codes = picture.codes().ok_or_else(ChatModel::sees_nothing)?;
                    let grid = self.grids.last().copied().unwrap_or_default();
                    let f_hat = self.quantizer.accumulate(&codes.codes, &codes.scales, grid);
                    let encoded = Encoded { targets: Vec::new(), codes: codes.codes.clone(), f_hat };
                    let shown = sequence::Picture { grids: &self.grids, encoded: &encoded, context: true, alpha: None };
                    sequence.push_image(config, &self.quantizer, &shown)?;
                }
            }
        }
        let learn = |sequence: &mut Sequence, ids: &[u32]| {
            for &id in ids {
                sequence.expect_text(id);
                sequence.push_text(&[id]);
            }
        };
        for part in &answer.parts {
            match part {
                Part::Drawn(_, ids) => learn(&mut sequence, ids),
                Part::Image(picture) => {
                    let codes = picture.codes().ok_or_else(ChatModel::sees_nothing)?;
                    self.push_drawn(&mut sequence, &codes.codes)?;
                    // What an answer says after its image is not learnt from.
                    return Ok(sequence);
                }
                Part::Text(_) => {}
            }
        }
        if ended {
            learn(&mut sequence, &[self.template.end]);
        }
        Ok(sequence)
    }

    /// Appends the trained scales of a drawn image, with its codes as targets.
    fn push_drawn(&self, sequence: &mut Sequence, codes: &ImageCodes) -> Result<()> {
        let scales = self.prefix.scales.min(self.grids.len());
        let codes = codes[..scales.min(codes.len())].to_vec();
        let encoded = Encoded { targets: codes.clone(), codes, f_hat: Vec::new() };
        let grids = &self.grids[..scales];
        let picture = sequence::Picture { grids, encoded: &encoded, context: false, alpha: Some(self.prefix.alpha) };
        Ok(sequence.push_image(&self.chat.config().backbone, &self.quantizer, &picture)?)
    }
}

/// A transformer that does not learn.
pub fn frozen(
    tensors: BTreeMap<String, Tensor>,
    config: &BackboneConfig,
    quantizer: &Quantizer,
) -> candle_core::Result<Backbone> {
    Backbone::load(&Weights::from_tensors(tensors, quantizer.device()), config)
}

//! Dialogues that no model was trained on: edits, questions, several turns and reasoning, each with
//! the score of a trivial answer.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::ops::ControlFlow;

use image::RgbImage;
use serde::Serialize;

use super::case::{Case, Watch, done};
use super::{Share, metrics};
use crate::chat::{ChatModel, Picture, ReplyOptions, Session};
use crate::error::{Error, Kind as Failure, Result};
use crate::generate::prompt::{EDIT, FINAL, MAX_THOUGHT, THINK};
use crate::rng::{Rng, Stream};
use crate::scenes::detector::{Detection, detect};
use crate::scenes::judge::{as_edited, judge, on_its_background};
use crate::scenes::{EDIT_KINDS, Edit, EditKind, QUESTION_KINDS, Question, QuestionKind, Riddle, Scene, Split};

/// Edits of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Edits {
    /// Which kind.
    pub kind: EditKind,
    /// Right results in wordings of the split.
    pub score: Share,
    /// The same by wording, in the order of the alphabet.
    pub wordings: Vec<Worded>,
    /// The same of the same edits in trained wordings.
    pub trained_words: Share,
    /// The same for a copy of the source.
    pub copying: Share,
    /// The same for the true result after encoding and decoding.
    pub ceiling: Share,
    /// PSNR in dB of all right results in either wording, against the source's own reconstruction
    /// where nothing may change; none if all may.
    pub unchanged: Option<f64>,
}

/// Questions of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Questions {
    /// Which kind.
    pub kind: QuestionKind,
    /// Exact answers to wordings of the split.
    pub score: Share,
    /// The same by wording, in the order of the alphabet.
    pub wordings: Vec<Worded>,
    /// The same of questions about the same scenes in trained wordings.
    pub trained_words: Share,
    /// The same for the answer that is right most often, given always.
    pub common: Share,
}

/// Cases in one held-out wording.
#[derive(Clone, Debug, Serialize)]
pub struct Worded {
    /// The wording, with its gaps.
    pub wording: &'static str,
    /// Right ones.
    pub score: Share,
}

/// Cases by wording.
#[derive(Default)]
struct ByWording(BTreeMap<&'static str, Share>);

impl ByWording {
    fn push(&mut self, wording: &'static str, right: bool) {
        self.0.entry(wording).or_default().push(right);
    }

    /// What was found, of held-out wordings.
    fn found(self, split: Split) -> Vec<Worded> {
        let held_out = self.0.into_iter().filter(|_| split == Split::HeldOut);
        held_out.map(|(wording, score)| Worded { wording, score }).collect()
    }
}

/// Drawing, then an edit of the drawn image.
#[derive(Clone, Debug, Serialize)]
pub struct Turns {
    /// Dialogues.
    pub count: usize,
    /// The first image is right.
    pub drawn: Share,
    /// The second is as well.
    pub edited: Share,
    /// The same for a second image that copies the first.
    pub copying: Share,
}

/// Riddles about shapes, by pairs of clues that are not trained, answered by an image; and riddles
/// about things.
#[derive(Clone, Debug, Serialize)]
pub struct Reasoning {
    /// Riddles.
    pub count: usize,
    /// The final prompt, after whatever reasoning, is exactly right.
    pub prompt: Share,
    /// The image is right.
    pub image: Share,
    /// The same for an answer that always draws the most common target image.
    pub common: Share,
    /// Of as many riddles about things, by a clue that is not trained: the final prompt is exactly
    /// right.
    pub things: Share,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Dialogues {
    /// By kind.
    pub edits: Vec<Edits>,
    /// By kind.
    pub questions: Vec<Questions>,
    /// Draw, then edit.
    pub turns: Turns,
    /// Think, then draw.
    pub reasoning: Reasoning,
}

/// A model under examination.
pub struct Examiner<'a> {
    /// The model.
    pub model: &'a ChatModel,
    /// Cases of each kind.
    pub per_kind: usize,
    /// Decides all randomness.
    pub seed: u64,
    /// Where the cases are from.
    pub split: Split,
}

impl Examiner<'_> {
    /// Every suite.
    pub fn run(&self, watch: Watch) -> Result<Dialogues> {
        let edits = (0..).zip(EDIT_KINDS).map(|(step, kind)| self.edits(kind, 200 + step, watch));
        let edits = edits.collect::<Result<_>>()?;
        let questions = (0..).zip(QUESTION_KINDS).map(|(step, kind)| self.questions(kind, 300 + step, watch));
        let questions = questions.collect::<Result<_>>()?;
        Ok(Dialogues { edits, questions, turns: self.turns(watch)?, reasoning: self.reasoning(watch)? })
    }

    pub(super) fn rng(&self, case: usize, step: u64) -> Rng {
        Rng::new(self.seed, case as u64, Stream::Train, step)
    }

    /// Where the wordings of edits and questions are from: the split, and then those that were
    /// trained.
    fn wordings(&self) -> &'static [Split] {
        match self.split {
            Split::HeldOut => &[Split::HeldOut, Split::Train],
            Split::Train => &[Split::Train],
        }
    }

    fn options(&self, case: usize) -> Result<ReplyOptions> {
        let config = self.model.config();
        let image = config.drawing.as_ref().map(|drawing| drawing.sampling.clone());
        let image = Some(image.ok_or_else(|| self.model.draws_nothing())?);
        let seed = self.seed.wrapping_add(case as u64);
        Ok(ReplyOptions { sampling: config.sampling, max_tokens: MAX_THOUGHT, image, seed, guide_from_sources: true })
    }

    fn scene(&self, scene: &Scene) -> Result<Picture> {
        self.model.encode("scene", &render(scene)?, &self.model.usual_scales()?)
    }

    /// The model's edit of an image, and what it says before it draws.
    pub(super) fn edit(&self, image: &RgbImage, text: &str, case: usize) -> Result<(RgbImage, String)> {
        self.edit_picture(self.model.encode("source", image, &self.model.usual_scales()?)?, text, case)
    }

    fn edit_picture(&self, source: Picture, text: &str, case: usize) -> Result<(RgbImage, String)> {
        let mut session = Session::new(self.model)?;
        let options = self.options(case)?;
        let request = format!("{EDIT}{text}");
        let reply = session.draw(vec![source], &request, &options, None, &mut |_| ControlFlow::Continue(()))?;
        Ok((self.last_image(&session)?, reply.text))
    }

    fn edits(&self, kind: EditKind, step: u64, watch: Watch) -> Result<Edits> {
        let (mut right, mut wordings) = ([Share::default(), Share::default()], ByWording::default());
        let (mut copying, mut ceiling, mut unchanged) = (Share::default(), Share::default(), Vec::new());
        for case in 0..self.per_kind {
            let rng = self.rng(case, step);
            let edit = Edit::of_kind(&rng, kind, self.split);
            let source = self.scene(&edit.source)?;
            let copy = self.model.decode(&source)?;
            let succeeded = |image: &RgbImage| as_edited(&edit, &detect(image));
            for (right, &words) in right.iter_mut().zip(self.wordings()) {
                let said = edit.instruction(&rng.fork(1), words);
                let (image, reply) = self.edit_picture(source.clone(), &said.text, case)?;
                let succeeded = succeeded(&image);
                right.push(succeeded);
                if words == self.split {
                    wordings.push(said.wording, succeeded);
                }
                unchanged.extend(outside(&copy, &image, &edit.changed()).filter(|_| succeeded));
                done(watch, Case::edit("edit", &edit, (said.text, words), reply, succeeded))?;
            }
            copying.push(succeeded(&copy));
            ceiling.push(succeeded(&self.model.decode(&self.scene(&edit.target)?)?));
        }
        // Mean of squared errors: one perfectly preserved image does not make up for others.
        let mean = |values: &[f64]| {
            let errors: f64 = values.iter().map(|psnr| 10f64.powf(-psnr / 10.0)).sum();
            -10.0 * (errors / values.len() as f64).log10()
        };
        Ok(Edits {
            kind,
            trained_words: right[self.wordings().len() - 1].clone(),
            score: right.into_iter().next().unwrap_or_default(),
            wordings: wordings.found(self.split),
            copying,
            ceiling,
            unchanged: (!unchanged.is_empty()).then(|| mean(&unchanged)),
        })
    }

    fn questions(&self, kind: QuestionKind, step: u64, watch: Watch) -> Result<Questions> {
        let (mut right, mut wordings) = ([Share::default(), Share::default()], ByWording::default());
        let mut answers = Vec::new();
        for case in 0..self.per_kind {
            for (right, &words) in right.iter_mut().zip(self.wordings()) {
                let question = Question::of_kind(&self.rng(case, step), kind, self.split, words);
                let mut session = Session::new(self.model)?;
                let (pictures, options) = (vec![self.scene(&question.scene)?], self.options(case)?);
                let reply = session.say(pictures, &question.text, &options, &mut |_| ControlFlow::Continue(()))?;
                let answered = reply.text.trim() == question.answer;
                right.push(answered);
                if words == self.split {
                    wordings.push(question.wording, answered);
                    answers.push(question.answer.clone());
                }
                done(watch, Case::question(question, words, reply.text, answered))?;
            }
        }
        Ok(Questions {
            kind,
            trained_words: right[self.wordings().len() - 1].clone(),
            score: right.into_iter().next().unwrap_or_default(),
            wordings: wordings.found(self.split),
            common: commonest(&answers),
        })
    }

    fn turns(&self, watch: Watch) -> Result<Turns> {
        let (mut drawn, mut edited, mut copying) = (Share::default(), Share::default(), Share::default());
        for case in 0..self.per_kind {
            let rng = self.rng(case, 400);
            // Targets that the judge cannot distinguish from their source are no cases.
            let edits = (0..).map(|i| Edit::of_kind(&rng.fork(2 + i), EDIT_KINDS[case % EDIT_KINDS.len()], self.split));
            let told = |edit: &Edit| Ok::<_, Error>(!as_asked(edit, &detect(&render(&edit.source)?)));
            let Some(edit) = edits.take(100).find(|edit| told(edit).unwrap_or(true)) else { continue };
            let mut session = Session::new(self.model)?;
            let options = self.options(case)?;
            let mut draw = |text: &str| {
                let reply = session.draw(vec![], text, &options, None, &mut |_| ControlFlow::Continue(()))?;
                Ok::<_, Error>((detect(&self.last_image(&session)?), reply.text))
            };
            let (first, _) = draw(&edit.source.prompt())?;
            let request = edit.instruction(&rng.fork(1), self.split).text;
            let (second, reply) = draw(&request)?;
            let sound = judge(&edit.source, &first);
            drawn.push(sound);
            // Drawn objects need not be exactly where the scene has them.
            let right = sound && as_asked(&edit, &second);
            edited.push(right);
            copying.push(sound && as_asked(&edit, &first));
            done(watch, Case::edit("draw then edit", &edit, (request, self.split), reply, right))?;
        }
        Ok(Turns { count: drawn.count(), drawn, edited, copying })
    }

    fn reasoning(&self, watch: Watch) -> Result<Reasoning> {
        let all = || (0..).map(|i| Riddle::sample(&self.rng(i, 500), self.split));
        let riddles: Vec<Riddle> = all().filter(|riddle| riddle.scene.is_some()).take(self.per_kind).collect();
        let things = all().filter(|riddle| riddle.scene.is_none()).take(self.per_kind);
        let (mut prompt, mut image, mut named) = (Share::default(), Share::default(), Share::default());
        let think = |case: usize, riddle: &Riddle| {
            let mut session = Session::new(self.model)?;
            let text = format!("{THINK}{}", riddle.clue);
            let reply = session.say(vec![], &text, &self.options(case)?, &mut |_| ControlFlow::Continue(()))?;
            let thought = reply.text.rsplit_once(FINAL).map(|(_, prompt)| prompt.trim());
            let right = thought == Some(&riddle.prompt);
            Ok::<_, Error>((session, right, reply.text))
        };
        for (case, riddle) in things.enumerate() {
            let (_, right, reply) = think(case, &riddle)?;
            named.push(right);
            done(watch, Case::riddle(&riddle, reply, right))?;
        }
        for (case, riddle) in riddles.iter().enumerate() {
            let (session, right, reply) = think(case, riddle)?;
            prompt.push(right);
            let drawn = session.last_image().zip(riddle.scene.as_ref());
            let shown =
                drawn.map(|(picture, scene)| Ok::<_, Error>(judge(scene, &detect(&self.model.decode(picture)?))));
            let right = shown.transpose()?.unwrap_or(false);
            image.push(right);
            done(watch, Case::riddle(riddle, reply, right))?;
        }
        let asked: Vec<&String> = riddles.iter().map(|riddle| &riddle.prompt).collect();
        Ok(Reasoning { count: riddles.len(), prompt, image, common: commonest(&asked), things: named })
    }

    fn last_image(&self, session: &Session) -> Result<RgbImage> {
        let drawn = session.last_image();
        self.model.decode(drawn.ok_or_else(|| Error::new(Failure::Failure, "the model drew nothing"))?)
    }
}

/// Cases whose answer is the one that most of them have.
fn commonest<T: Eq + Hash>(answers: &[T]) -> Share {
    let mut counts: HashMap<&T, usize> = HashMap::new();
    answers.iter().for_each(|answer| *counts.entry(answer).or_default() += 1);
    let most = counts.values().copied().max();
    let first = answers.iter().find(|answer| counts.get(answer).copied() == most);
    answers.iter().map(|answer| Some(answer) == first).collect()
}

fn render(scene: &Scene) -> Result<RgbImage> {
    let wrong = || Error::new(Failure::Failure, "a rendered scene has the wrong size");
    RgbImage::from_raw(128, 128, scene.render(128, 128)).ok_or_else(wrong)
}

/// Whether an image shows the target of an edit: objects drawn before need not be where their scene
/// has them.
fn as_asked(edit: &Edit, found: &Detection) -> bool {
    judge(&edit.target, found) && on_its_background(&edit.target, found)
}

/// PSNR in dB of two images outside boxes (left, top, right, bottom); none if they leave nothing.
fn outside(a: &RgbImage, b: &RgbImage, boxes: &[[f64; 4]]) -> Option<f64> {
    let free = |x: u32, y: u32| {
        let (x, y) = (f64::from(x) + 0.5, f64::from(y) + 0.5);
        !boxes.iter().any(|[l, t, r, b]| (*l..*r).contains(&x) && (*t..*b).contains(&y))
    };
    let kept = |image: &RgbImage| -> Vec<u8> {
        image.enumerate_pixels().filter(|(x, y, _)| free(*x, *y)).flat_map(|(_, _, p)| p.0).collect()
    };
    let (a, b) = (kept(a), kept(b));
    let pixels = (a.len() / 3) as u32;
    let strip = |data| RgbImage::from_raw(pixels, 1, data);
    if pixels == 0 { None } else { Some(metrics::psnr(&strip(a)?, &strip(b)?).min(60.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_truth_passes_and_a_copy_does_not() {
        for (step, kind) in (0..).zip(EDIT_KINDS) {
            let (mut right, mut copied, cases) = (0, 0, 30);
            for i in 0..cases {
                let edit = Edit::of_kind(&Rng::new(3, i, Stream::Train, step), kind, Split::HeldOut);
                let (source, target) = (render(&edit.source).unwrap(), render(&edit.target).unwrap());
                right += u64::from(as_edited(&edit, &detect(&target)));
                copied += u64::from(as_edited(&edit, &detect(&source)));
                if let Some(psnr) = outside(&source, &target, &edit.changed()) {
                    assert_eq!(psnr, 60.0, "{kind:?} {}", edit.canonical());
                }
            }
            assert!(right * 50 >= cases * 49 && copied == 0, "{kind:?}: {right} and {copied} of {cases}");
        }
    }

    #[test]
    fn what_lies_outside_counts_alone() {
        let plain = |v| RgbImage::from_pixel(128, 128, image::Rgb([v; 3]));
        let mut half = plain(10);
        (0..64).for_each(|x| (0..128).for_each(|y| half.put_pixel(x, y, image::Rgb([200; 3]))));
        assert_eq!(outside(&plain(10), &half, &[[0.0, 0.0, 64.0, 128.0]]), Some(60.0));
        assert!(outside(&plain(10), &half, &[]).unwrap() < 10.0);
        assert_eq!(outside(&plain(10), &half, &[[0.0, 0.0, 128.0, 128.0]]), None);
    }
}

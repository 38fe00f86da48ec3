//! Many wordings of one text, some of which are held out for evaluation.

use super::caption::{chinese, english};
use super::describe::side;
use super::grammar::{clause, is_instruction, sentence, variety};
use super::{COLOURS, Object, ObjectSize, Place, Scene, Split};
use crate::rng::Rng;

/// Wordings of a text, as patterns of the [grammar](super::grammar).
pub(super) struct Wordings {
    /// Trained English ones; the first sentence of the first is the canonical one.
    pub english: &'static [&'static str],
    /// Trained Chinese ones.
    pub chinese: &'static [&'static str],
    /// For evaluation: known words in sentences that are not trained, and a few unknown words.
    pub held_out: &'static [&'static str],
    /// The same in Chinese.
    pub held_out_chinese: &'static [&'static str],
}

impl Wordings {
    /// The patterns of a language and a split.
    fn patterns(&self, chinese: bool, split: Split) -> &'static [&'static str] {
        match (split, chinese) {
            (Split::Train, false) => self.english,
            (Split::Train, true) => self.chinese,
            (Split::HeldOut, false) => self.held_out,
            (Split::HeldOut, true) => self.held_out_chinese,
        }
    }
}

/// A text, and the pattern that it is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// The text.
    pub text: String,
    /// The pattern, which names a held-out wording.
    pub wording: &'static str,
}

/// A choice of wording.
#[derive(Clone, Copy)]
pub(super) struct Voice {
    /// The random choice; none for the canonical wording.
    rng: Option<Rng>,
    split: Split,
    /// The language: Chinese, or English.
    pub chinese: bool,
    /// Whether the text is part of a longer instruction.
    pub clause: bool,
}

impl Voice {
    /// The canonical one.
    pub fn canonical() -> Self {
        Self { rng: None, split: Split::Train, chinese: false, clause: false }
    }

    /// Any one of a split: Chinese about once in six.
    pub fn draw(rng: &Rng, split: Split) -> Self {
        Self { rng: Some(*rng), split, chinese: rng.below(1000, 6) == 0, clause: false }
    }

    /// The same in Chinese, or in English.
    pub fn in_language(self, chinese: bool) -> Self {
        Self { chinese, ..self }
    }

    /// One that draws other words in the same language, in trained wordings, for a part of a longer
    /// instruction.
    pub fn part(self, step: u64) -> Self {
        Self { rng: self.rng.map(|rng| rng.fork(step)), split: Split::Train, clause: true, ..self }
    }

    /// One of several words.
    pub fn pick<T: Copy>(&self, counter: u64, words: &[T]) -> T {
        words[self.index(counter, words.len())]
    }

    fn index(&self, counter: u64, n: usize) -> usize {
        self.rng.map_or(0, |rng| rng.below(counter, n))
    }

    /// A wording with its gaps filled in.
    pub fn say(&self, wordings: &Wordings, gaps: &[(&str, String)]) -> Said {
        let patterns = wordings.patterns(self.chinese, self.split).iter().copied();
        let patterns: Vec<&str> = patterns.filter(|pattern| !self.clause || is_instruction(pattern)).collect();
        let wording = self.one_of(&patterns);
        let mut counter = 2000;
        let mut pick = |n| {
            counter += 1;
            self.index(counter, n)
        };
        let text = if self.clause { clause(wording, &mut pick) } else { sentence(wording, self.chinese, &mut pick) };
        let text = gaps.iter().fold(text, |text, (gap, words)| text.replace(gap, words)).replace("  ", " ");
        Said { text: if self.clause { text } else { self.punctuated(text) }, wording }
    }

    /// One pattern: those of more sentences more often, by the root of their number, so that no
    /// single sentence prevails.
    fn one_of(&self, patterns: &[&'static str]) -> &'static str {
        let weights: Vec<f64> = patterns.iter().map(|pattern| (variety(pattern) as f64).sqrt()).collect();
        let mut rest = self.rng.map_or(0.0, |rng| rng.uniform(1001)) * weights.iter().sum::<f64>();
        let drawn = patterns.iter().zip(&weights).find(|(_, weight)| {
            rest -= *weight;
            rest < 0.0
        });
        drawn.map_or(patterns[0], |(pattern, _)| pattern)
    }

    /// As people end sentences: some with no mark where there should be one, and the other way
    /// round.
    fn punctuated(&self, mut text: String) -> String {
        let end = self.index(1004, 24);
        match text.chars().last() {
            Some('?' | '？') if end > 17 => drop(text.pop()),
            Some('?' | '？') => {}
            Some(_) if end > 17 => text.push(if self.chinese { '。' } else { '.' }),
            Some(_) if end == 17 => text.push(if self.chinese { '！' } else { '!' }),
            _ => {}
        }
        text
    }

    /// What an object of a scene is called: by colour and shape, or by less where that is enough; a
    /// single one may be `it`.
    pub fn name(&self, object: &Object, scene: &Scene, it: bool) -> String {
        let colour = &COLOURS[object.colour];
        let only_shape = scene.objects.iter().filter(|o| o.shape == object.shape).count() == 1;
        match (self.pick(1002, &[0, 1, 2]), self.chinese) {
            (2, chinese) if it && scene.objects.len() == 1 => if chinese { "它" } else { "it" }.to_string(),
            (1 | 2, false) if only_shape => format!("the {}", english(object.shape)),
            (1 | 2, true) if only_shape => chinese(object.shape).to_string(),
            (_, false) => format!("the {} {}", colour.name, english(object.shape)),
            (_, true) => format!("{}{}", colour.name_zh, chinese(object.shape)),
        }
    }

    /// What an object is called by somebody who may point at it by anything that sets it apart:
    /// like [`Self::name`], or by its colour, place or size alone.
    pub fn pointed_at(&self, object: &Object, scene: &Scene, it: bool) -> String {
        let other = scene.objects.iter().find(|o| !o.same(object));
        let colour = &COLOURS[object.colour];
        let (noun, noun_zh) = match self.pick(1006, &[0, 1]) {
            0 => ("one", "那个"),
            _ if other.is_some_and(|o| o.shape == object.shape) => ("one", "那个"),
            _ => (english(object.shape), chinese(object.shape)),
        };
        let (name, name_zh) = match (self.pick(1005, &[0, 0, 0, 0, 0, 1, 2, 3]), other) {
            (1, Some(other)) if other.colour != object.colour => {
                let noun = self.pick(1007, &["one", "shape", "object", "thing"]);
                (format!("the {} {noun}", colour.name), format!("{}的那个", colour.name_zh))
            }
            (2, Some(other)) => match side(object.centre, other.centre) {
                Place::Unsaid => return self.name(object, scene, it),
                place => {
                    let at = self.at(place);
                    let adjective =
                        [["", ""], ["left", "left"], ["right", "right"], ["top", "upper"], ["bottom", "lower"]];
                    let adjective = self.pick(1008, &adjective[place as usize]);
                    let by_place = self.pick(1009, &[false, true]);
                    let english = if by_place { format!("the {noun} {at}") } else { format!("the {adjective} {noun}") };
                    (english, format!("{at}的{noun_zh}"))
                }
            },
            (3, Some(other)) if other.size != object.size => {
                let large = object.size == ObjectSize::Large;
                let words =
                    if large { ["large", "big", "bigger", "larger"] } else { ["small", "small", "smaller", "little"] };
                (
                    format!("the {} {noun}", self.pick(1008, &words)),
                    format!("{}的{noun_zh}", if large { "大" } else { "小" }),
                )
            }
            (1, None) => ("the ".to_string() + self.pick(1007, &["shape", "object"]), "图形".to_string()),
            _ => return self.name(object, scene, it),
        };
        if self.chinese { name_zh } else { name }
    }

    /// "on the left".
    pub fn at(&self, place: Place) -> String {
        let words: &[&str] = match (place, self.chinese) {
            (Place::Unsaid, false) => &["in the middle", "in the middle", "in the centre", "in the center"],
            (Place::Left, false) => &["on the left", "on the left", "on the left side"],
            (Place::Right, false) => &["on the right", "on the right", "on the right side"],
            (Place::Above, false) => &["at the top"],
            (Place::Below, false) => &["at the bottom"],
            (place, true) => &[["中间", "左边", "右边", "上面", "下面"][place as usize]],
        };
        self.pick(1003, words).to_string()
    }
}

/// "to the left of".
pub(super) fn relation(place: Place) -> &'static str {
    ["next to", "to the left of", "to the right of", "above", "below"][place as usize]
}

#[cfg(test)]
impl Wordings {
    /// Checks that no held-out pattern is a sentence of a trained one, that there are several of
    /// them, and many trained sentences.
    pub(super) fn check(&self, name: &str) {
        use super::grammar::sentences;
        let plain = |text: String| text.trim_end_matches(['.', '?', '？']).replace("  ", " ");
        for (trained, held) in [(self.english, self.held_out), (self.chinese, self.held_out_chinese)] {
            let all = trained.iter().flat_map(|p| sentences(p)).map(plain).collect::<std::collections::HashSet<_>>();
            assert!(
                held.len() >= 2 && all.len() >= if held == self.held_out { 100 } else { 30 },
                "{name}: {}",
                all.len()
            );
            for text in held.iter().flat_map(|p| sentences(p)).map(plain) {
                assert!(!all.contains(&text), "{name}: {text} is trained");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn a_wording_belongs_to_one_split() {
        let wordings = Wordings {
            english: &["<(a|b) {x}>", "c"],
            chinese: &["甲", "<乙{x}>"],
            held_out: &["d {x}", "e"],
            held_out_chinese: &["丙"],
        };
        let voice = |i, split| Voice::draw(&Rng::new(1, i, Stream::Train, 0), split);
        for i in 0..500 {
            let trained = voice(i, Split::Train).say(&wordings, &[("{x}", "word".into())]);
            let held_out = voice(i, Split::HeldOut).say(&wordings, &[("{x}", "word".into())]);
            assert!(["<(a|b) {x}>", "c", "甲", "<乙{x}>"].contains(&trained.wording), "{trained:?}");
            assert!(["d {x}", "e", "丙"].contains(&held_out.wording), "{held_out:?}");
            assert!(!trained.text.contains(['{', '(', '<', '~', '|']), "{trained:?}");
            let part = voice(i, Split::HeldOut).part(1).say(&wordings, &[("{x}", "word".into())]);
            assert!(["a word", "b word", "乙word"].contains(&part.text.as_str()), "{part:?}");
        }
        assert_eq!(Voice::canonical().say(&wordings, &[("{x}", "word".into())]).text, "a word");
    }
}

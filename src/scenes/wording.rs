//! Several wordings of one text, some of which are held out for evaluation.

use super::caption::{chinese, english};
use super::{COLOURS, Object, Place, Scene, Split};
use crate::rng::{Rng, fnv1a};

/// Templates; `{x}` is filled in. Of each language at least three.
pub(super) struct Wordings {
    /// The canonical one first; it is never held out.
    pub english: &'static [&'static str],
    /// In no particular order.
    pub chinese: &'static [&'static str],
}

/// The wording of the largest hash is for evaluation: a few share no threshold that each list of
/// them would meet.
fn kept(templates: &'static [&'static str]) -> Option<&'static str> {
    templates.iter().copied().max_by_key(|t| fnv1a(t))
}

impl Wordings {
    /// The one that is for evaluation, in a language.
    fn held_out(&self, chinese: bool) -> Option<&'static str> {
        kept(if chinese { self.chinese } else { &self.english[1..] })
    }
}

/// A choice of wording.
#[derive(Clone, Copy)]
pub(super) struct Voice {
    /// The random choice; none for the canonical wording.
    rng: Option<Rng>,
    split: Split,
    /// The language: Chinese, or English.
    pub chinese: bool,
}

impl Voice {
    /// The canonical one.
    pub fn canonical() -> Self {
        Self { rng: None, split: Split::Train, chinese: false }
    }

    /// Any one of a split: Chinese about once in six.
    pub fn draw(rng: &Rng, split: Split) -> Self {
        Self { rng: Some(*rng), split, chinese: rng.below(1000, 6) == 0 }
    }

    /// One that draws other words in the same language.
    pub fn again(self, step: u64) -> Self {
        Self { rng: self.rng.map(|rng| rng.fork(step)), ..self }
    }

    /// One of several words.
    pub fn pick<T: Copy>(&self, counter: u64, words: &[T]) -> T {
        words[self.rng.map_or(0, |rng| rng.below(counter, words.len()))]
    }

    /// A wording with its gaps filled in.
    pub fn say(&self, wordings: &Wordings, gaps: &[(&str, String)]) -> String {
        let templates = if self.chinese { wordings.chinese } else { wordings.english };
        let held_out = wordings.held_out(self.chinese);
        let of_split = templates.iter().copied().filter(|&t| (Some(t) == held_out) == (self.split == Split::HeldOut));
        let template = self.pick(1001, &of_split.collect::<Vec<_>>());
        gaps.iter().fold(template.to_string(), |text, (gap, words)| text.replace(gap, words))
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

    /// "on the left".
    pub fn at(&self, place: Place) -> String {
        let words: &[&str] = match (place, self.chinese) {
            (Place::Unsaid, false) => &["in the middle", "in the centre"],
            (Place::Left, false) => &["on the left", "on the left side"],
            (Place::Right, false) => &["on the right", "on the right side"],
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
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn a_wording_belongs_to_one_split() {
        let wordings = Wordings { english: &["a {x}", "b", "c", "d"], chinese: &["甲", "乙", "丙"] };
        let said = |split| -> std::collections::BTreeSet<String> {
            let rng = |i| Rng::new(1, i, Stream::Train, 0);
            (0..500).map(|i| Voice::draw(&rng(i), split).say(&wordings, &[("{x}", "word".into())])).collect()
        };
        let (train, test) = (said(Split::Train), said(Split::HeldOut));
        assert!(train.is_disjoint(&test) && train.contains("a word"), "{train:?} {test:?}");
        assert_eq!((train.len(), test.len()), (5, 2));
        assert_eq!(Voice::canonical().say(&wordings, &[]), "a {x}");
    }
}

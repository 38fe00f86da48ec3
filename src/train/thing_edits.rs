//! Edits of everyday things that are not held out, shown or told.

use super::samples::Samples;
use crate::dataset::{Canvas, SIDE, Style, with_article};
use crate::generate::prompt::FINAL;
use crate::rng::Rng;
use crate::scenes::{BACKGROUNDS, Topic};

/// What renders a picture of an edit, which is not told.
type Render = Box<dyn Fn(&Samples) -> Canvas + Send + Sync>;

/// An edit of one thing or of one of two.
pub struct ThingEdit {
    /// The source as captions put it: "an apple on the left and a dog on the right".
    pub seen: String,
    /// The instruction.
    pub text: String,
    /// What is done: "the dog on the right is now gone".
    pub step: String,
    /// What the source becomes, as captions put it; what is kept of a single thing is "the same",
    /// so that it need not be known.
    pub result: String,
    /// The source.
    pub before: Render,
    /// The result.
    pub after: Render,
}

/// Styles by the word for each.
const STYLES: [(Style, &str); 3] = [(Style::ThreeD, "3d"), (Style::Flat, "flat"), (Style::Noto, "noto")];
/// Sides, and the left edge there of a thing of half the size.
const SIDES: [(&str, i32); 2] = [("left", 0), ("right", 64)];
/// Share of the instructions without names that are in Chinese.
const CHINESE: f64 = 0.17;

/// A thing: its picture, and what it is called.
type Thing<'a> = (usize, &'a str);

impl ThingEdit {
    /// Before it draws the model says what it sees, what is done to it and what that becomes.
    pub fn thought(&self) -> String {
        format!("{}. {}. {FINAL}{}", self.seen, self.step, self.result)
    }

    /// Any edit.
    pub fn sample(dataset: &Samples, rng: &Rng) -> Self {
        let things = two(dataset, rng);
        let ((first, name), pair) = (things[0], things[0].1 != things[1].1);
        match rng.below(1, 17) {
            0..3 if pair => Self::removed(rng, things),
            3..5 if pair => Self::added(rng, things),
            5..7 if pair => Self::replaced_beside(dataset, rng, things).unwrap_or_else(|| Self::replaced(rng, things)),
            7..9 if pair => Self::replaced(rng, things),
            9..12 => Self::styled(dataset, rng, things[0]).unwrap_or_else(|| Self::on_background(rng, things[0])),
            12..15 => Self {
                seen: with_article(name),
                text: Topic::Flip.say(&rng.fork(1), rng.uniform(2) < CHINESE, &[]),
                step: "left is now right".into(),
                result: "the same from the other side".into(),
                before: white(first),
                after: Box::new(move |d| d.single(first, None, SIDE, SIDE).canvas.mirrored()),
            },
            _ => Self::on_background(rng, things[0]),
        }
    }

    /// One that names all that it keeps, so that it can be told without pictures; none of a library
    /// with a single thing.
    pub fn told(dataset: &Samples, rng: &Rng) -> Option<Self> {
        let things = two(dataset, rng);
        (things[0].1 != things[1].1).then(|| match rng.below(1, 8) {
            0..3 => Self::removed(rng, things),
            3..5 => Self::added(rng, things),
            5..7 => Self::replaced_beside(dataset, rng, things).unwrap_or_else(|| Self::replaced(rng, things)),
            _ => Self::replaced(rng, things),
        })
    }

    /// One of two, the left or the right one, is removed.
    fn removed(rng: &Rng, things: [Thing; 2]) -> Self {
        let gone = rng.below(10, 2);
        let (name, kept) = (things[gone].1, 1 - gone);
        let gaps = [("{o}", &*pointed_at(rng, name, gone)), ("{s}", name), ("{a}", &with_article(name))];
        Self {
            seen: beside(things),
            text: Topic::Remove.say(&rng.fork(1), false, &gaps),
            step: format!("the {name} on the {} is now gone", SIDES[gone].0),
            result: format!("{} on the {}", with_article(things[kept].1), SIDES[kept].0),
            before: row(things),
            after: alone(things[kept].0, kept),
        }
    }

    /// Another thing beside one that stands at a side.
    fn added(rng: &Rng, things: [Thing; 2]) -> Self {
        let new = rng.below(10, 2);
        let (side, there) = (SIDES[new].0, 1 - new);
        let at = format!("on the {side}");
        let gaps = [("{n}", &*with_article(things[new].1)), ("{p}", &at)];
        Self {
            seen: format!("{} on the {}", with_article(things[there].1), SIDES[there].0),
            text: Topic::Add.say(&rng.fork(1), false, &gaps),
            step: format!("{at} is now {}", with_article(things[new].1)),
            result: beside(things),
            before: alone(things[there].0, there),
            after: row(things),
        }
    }

    /// One of two, the left or the right one, becomes a third; none where a few draws bring no
    /// third.
    fn replaced_beside<'a>(dataset: &Samples<'a>, rng: &Rng, things: [Thing<'a>; 2]) -> Option<Self> {
        let drawn = (20..30).map(|counter| dataset.thing(rng, counter));
        let new = |name: &str| !is_plural(name) && things.iter().all(|t| t.1 != name);
        let third = drawn.map(|(picture, name, _)| (picture, name)).find(|(_, name)| new(name))?;
        let gone = rng.below(10, 2);
        let mut after = things;
        after[gone] = third;
        let gaps = [("{o}", &*pointed_at(rng, things[gone].1, gone)), ("{n}", &with_article(third.1))];
        Some(Self {
            seen: beside(things),
            text: Topic::Replace.say(&rng.fork(1), false, &gaps),
            step: format!("the {} on the {} is now {}", things[gone].1, SIDES[gone].0, with_article(third.1)),
            result: beside(after),
            before: row(things),
            after: row(after),
        })
    }

    /// One thing becomes another.
    fn replaced(rng: &Rng, [(first, name), (second, new)]: [Thing; 2]) -> Self {
        let old = match rng.below(10, 3) {
            0 => format!("the {name}"),
            _ => "it".into(),
        };
        Self {
            seen: with_article(name),
            text: Topic::Replace.say(&rng.fork(1), false, &[("{o}", &old), ("{n}", &with_article(new))]),
            step: format!("the {name} is now {}", with_article(new)),
            result: with_article(new),
            before: white(first),
            after: white(second),
        }
    }

    /// One thing in another style; none where there is no such picture of it.
    fn styled(dataset: &Samples, rng: &Rng, (picture, name): Thing) -> Option<Self> {
        let (to, word) = STYLES[rng.below(5, STYLES.len())];
        let (from, _) = STYLES[rng.below(6, STYLES.len())];
        let concept = dataset.concept(picture);
        let (before, after) = (dataset.in_style(concept, from)?, dataset.in_style(concept, to)?);
        (from != to).then(|| Self {
            seen: with_article(name),
            text: Topic::Style.say(&rng.fork(1), rng.uniform(2) < CHINESE, &[("{y}", word)]),
            step: format!("the style is now {word}"),
            result: format!("the same in {word} style"),
            before: white(before),
            after: white(after),
        })
    }

    /// One thing on a coloured background, or back on white.
    fn on_background(rng: &Rng, (picture, name): Thing) -> Self {
        let background = &BACKGROUNDS[rng.below(5, BACKGROUNDS.len())];
        let coloured: Render = Box::new(move |d| d.single(picture, Some(background), SIDE, SIDE).canvas);
        let back = rng.below(6, 4) == 0;
        let (colour, colour_zh) = if back { ("white", "白色") } else { (background.name, background.name_zh) };
        let chinese = rng.uniform(2) < CHINESE;
        let (before, after) = if back { (coloured, white(picture)) } else { (white(picture), coloured) };
        Self {
            seen: with_article(name),
            text: Topic::Background.say(&rng.fork(1), chinese, &[("{b}", if chinese { colour_zh } else { colour })]),
            step: format!("the background is now {colour}"),
            result: format!("the same on a {colour} background"),
            before,
            after,
        }
    }
}

/// Two things, mostly different ones.
fn two<'a>(dataset: &Samples<'a>, rng: &Rng) -> [Thing<'a>; 2] {
    [100, 200].map(|first| {
        // The verbs of the instructions are in the singular.
        let thing =
            (first..first + 20).map(|counter| dataset.thing(rng, counter)).find(|(_, name, _)| !is_plural(name));
        let (picture, name, _) = thing.unwrap_or_else(|| dataset.thing(rng, first));
        (picture, name)
    })
}

/// Whether a name is a plural, "peanuts".
pub(super) fn is_plural(name: &str) -> bool {
    with_article(name) == name && name.ends_with('s')
}

/// "an apple on the left and a dog on the right".
fn beside([left, right]: [Thing; 2]) -> String {
    format!("{} on the left and {} on the right", with_article(left.1), with_article(right.1))
}

/// One of two things, by its name or its side.
fn pointed_at(rng: &Rng, name: &str, at: usize) -> String {
    let side = SIDES[at].0;
    match rng.below(11, 8) {
        0 => format!("the one on the {side}"),
        1 => format!("the {side} one"),
        2 => format!("the {name} on the {side}"),
        _ => format!("the {name}"),
    }
}

fn white(picture: usize) -> Render {
    Box::new(move |dataset| dataset.single(picture, None, SIDE, SIDE).canvas)
}

fn alone(picture: usize, at: usize) -> Render {
    Box::new(move |dataset| dataset.row(&[(picture, SIDES[at].1)]))
}

fn row([left, right]: [Thing; 2]) -> Render {
    let places = [(left.0, SIDES[0].1), (right.0, SIDES[1].1)];
    Box::new(move |dataset| dataset.row(&places))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;
    use crate::train::tests;

    #[test]
    fn the_left_and_the_right_thing_are_removed_in_equal_shares() {
        let library = tests::library();
        let dataset = Samples::new(&library, 1).unwrap();
        let mut kept = [0; 2];
        for i in 0..4000 {
            let rng = Rng::new(6, i, Stream::Train, 0);
            let Some(edit) = ThingEdit::told(&dataset, &rng) else { continue };
            assert!(!edit.text.contains(['{', '(', '<']) && !edit.thought().contains("the same"), "{}", edit.text);
            if let (Some(both), false) = (edit.seen.split_once(" and "), edit.result.contains(" and ")) {
                let at = [both.0, both.1].iter().position(|one| *one == edit.result);
                kept[at.unwrap_or_else(|| panic!("{} -> {}", edit.seen, edit.result))] += 1;
            }
        }
        let [left, right] = kept;
        assert!(left + right > 500 && (0.8..1.25).contains(&(f64::from(left) / f64::from(right))), "{kept:?}");
    }

    #[test]
    fn pictures_differ_before_and_after() {
        let library = tests::library();
        let dataset = Samples::new(&library, 1).unwrap();
        for i in 0..60 {
            let edit = ThingEdit::sample(&dataset, &Rng::new(7, i, Stream::Train, 0));
            let (before, after) = ((edit.before)(&dataset), (edit.after)(&dataset));
            assert!(before.rgb != after.rgb || edit.result.contains("other side"), "{}: {}", edit.seen, edit.text);
        }
    }
}

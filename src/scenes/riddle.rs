//! Prompts to think about before drawing: clues to a shape and its colour, or to an everyday thing.

use super::caption::english;
use super::{COLOURS, Kind, MIDDLE, Object, ObjectSize, Place, SHAPES, Scene, Split, held_out, radius};
use crate::dataset::with_article;
use crate::generate::prompt::FINAL;
use crate::rng::{Rng, fnv1a};

/// A prompt that hints at an image, and the image.
#[derive(Clone, Debug)]
pub struct Riddle {
    /// What is asked for: "the shape of a wheel in the colour of the sky".
    pub clue: String,
    /// Why it is that: "the sky is blue and a wheel is a circle".
    pub reasoning: String,
    /// Its solution as a prompt: "a blue circle".
    pub prompt: String,
    /// What to draw, if that is a shape.
    pub scene: Option<Scene>,
    /// The canonical name of the solution, if it is a concept of the library.
    pub name: Option<String>,
}

/// Things of each of the [`COLOURS`].
const COLOUR_CLUES: [&[&str]; COLOURS.len()] = [
    &["blood", "a ripe tomato", "a fire truck", "a strawberry", "a ruby", "a stop sign"],
    &["a carrot", "a pumpkin", "a basketball", "a tangerine", "an apricot", "a goldfish"],
    &["the sun", "a banana", "a lemon", "a baby chick", "butter", "a canary"],
    &["grass", "a frog", "a cucumber", "an emerald", "a pine tree", "spinach"],
    &["the sky", "the ocean", "a sapphire", "a cornflower", "denim", "a blueberry"],
    &["an eggplant", "lavender", "an amethyst", "a plum", "a violet", "beet juice"],
    &["a flamingo", "a pig", "bubble gum", "cotton candy", "a cherry blossom", "a tongue"],
    &["chocolate", "a bear", "coffee with milk", "wood", "a chestnut", "soil"],
    &["coal", "the night", "a raven", "tar", "a panther", "ink"],
    &["an elephant", "a mouse", "a rain cloud", "ash", "concrete", "a donkey"],
];

/// Things of each of the [`SHAPES`], and what else there is to say about it.
const SHAPE_CLUES: [&[&str]; SHAPES.len()] = [
    &["a wheel", "a coin", "a full moon", "a plate", "a shape without any corner", "a button"],
    &["a chessboard", "one side of a die", "a floor tile", "a slice of toast", "a shape with four right angles"],
    &[
        "a slice of pizza",
        "a side of a pyramid",
        "a shape with three corners",
        "a shape with three sides",
        "a yield sign",
    ],
    &["a sheriff's badge", "a shape with five points", "the top of a christmas tree", "the emblem on a wizard's hat"],
    &["the symbol of love", "a valentine", "what beats in your chest", "the suit of the queen of tarts"],
    &["a kite", "a baseball field", "a cut gem", "a shape that stands on its corner"],
];

/// One thing a line: its name, four clues and a sentence that explains them.
const THINGS: &str = include_str!("riddles.txt");

fn things() -> impl Iterator<Item = (&'static str, [&'static str; 4], &'static str)> {
    THINGS.lines().filter_map(|line| match line.split(" | ").collect::<Vec<_>>()[..] {
        [name, a, b, c, d, reasoning] => Some((name, [a, b, c, d], reasoning)),
        _ => None,
    })
}

impl Riddle {
    /// As often about a shape as about a thing. Held out are pairs of clues to shapes, and one clue
    /// to each thing.
    pub fn sample(rng: &Rng, split: Split) -> Self {
        if rng.below(0, 2) == 0 { Self::shape(rng, split) } else { Self::thing(rng, split) }
    }

    fn shape(rng: &Rng, split: Split) -> Self {
        let mut attempt = 0;
        loop {
            let rng = rng.fork(attempt);
            attempt += 1;
            let (colour, shape) = (rng.below(0, COLOURS.len()), rng.below(1, SHAPES.len()));
            let (colours, shapes) = (COLOUR_CLUES[colour], SHAPE_CLUES[shape]);
            let (of_colour, of_shape) = (colours[rng.below(2, colours.len())], shapes[rng.below(3, shapes.len())]);
            let jitter = |counter, by: f64| (2.0 * rng.uniform(counter) - 1.0) * by;
            let object = Object {
                shape: SHAPES[shape],
                colour,
                size: ObjectSize::Plain,
                centre: (MIDDLE + jitter(4, 2.0), MIDDLE + jitter(5, 2.0)),
                radius: radius(1, ObjectSize::Plain, Place::Unsaid) * (1.0 + jitter(6, 0.04)),
            };
            let scene = Scene { kind: Kind::Colours, objects: vec![object], place: Place::Unsaid, background: None };
            let of_split = match split {
                // Held-out targets must not enter training by a riddle.
                Split::Train => !held_out(&format!("{of_colour} {of_shape}")) && !held_out(&scene.key()),
                Split::HeldOut => held_out(&format!("{of_colour} {of_shape}")),
            };
            if of_split {
                let said = of_shape.starts_with("a shape");
                let clue = if said { of_shape.to_string() } else { format!("the shape of {of_shape}") };
                return Self {
                    clue: format!("{clue} in the colour of {of_colour}"),
                    reasoning: format!(
                        "{of_colour} is {} and {of_shape} is a {}",
                        COLOURS[colour].name,
                        english(SHAPES[shape])
                    ),
                    prompt: scene.prompt(),
                    scene: Some(scene),
                    name: None,
                };
            }
        }
    }

    fn thing(rng: &Rng, split: Split) -> Self {
        let all: Vec<_> = things().collect();
        let (name, mut clues, reasoning) = all[rng.below(1, all.len())];
        // The last one is for evaluation.
        clues.sort_by_key(|clue| fnv1a(clue));
        let clue = if split == Split::HeldOut { clues[3] } else { clues[rng.below(2, 3)] };
        Self {
            clue: clue.to_string(),
            reasoning: reasoning.to_string(),
            prompt: with_article(name),
            scene: None,
            name: Some(name.to_string()),
        }
    }

    /// The model's text before the image: "the sky is blue and a wheel is a circle. the final
    /// prompt is: a blue circle".
    pub fn answer(&self) -> String {
        format!("{}. {FINAL}{}", self.reasoning, self.prompt)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::rng::Stream;

    fn riddles(split: Split, count: u64) -> impl Iterator<Item = Riddle> {
        (0..count).map(move |i| Riddle::sample(&Rng::new(23, i, Stream::Train, 0), split))
    }

    #[test]
    fn the_table_of_things_is_well_formed() {
        assert!(things().count() >= 220);
        assert_eq!(things().count(), THINGS.lines().count(), "every line has six fields");
        let mut seen = HashSet::new();
        for (name, clues, reasoning) in things() {
            assert!(seen.insert(name), "{name} comes twice");
            assert!(reasoning.split(' ').count() <= 10, "{reasoning}");
            for text in clues.into_iter().chain([reasoning]) {
                assert!(text.is_ascii() && text.to_lowercase() == text && text.trim() == text, "{text}");
                assert!(!text.ends_with('.') && seen.insert(text), "{text}");
            }
        }
        assert!(COLOUR_CLUES.iter().all(|c| c.len() >= 5) && SHAPE_CLUES.iter().all(|c| c.len() >= 4));
    }

    #[test]
    fn clues_are_split() {
        let clues = |split| riddles(split, 4000).map(|r| r.clue).collect::<HashSet<_>>();
        let (train, test) = (clues(Split::Train), clues(Split::HeldOut));
        assert!(train.is_disjoint(&test), "{:?}", train.intersection(&test).next());
        let mut held = HashMap::new();
        for r in riddles(Split::HeldOut, 4000) {
            if let Some(name) = r.name {
                assert_eq!(*held.entry(name).or_insert(r.clue.clone()), r.clue, "one of a thing is held out");
            }
        }
        assert!(held.len() > 200, "{}", held.len());
        assert!(riddles(Split::Train, 2000).filter_map(|r| r.scene).all(|s| !held_out(&s.key())));
    }

    #[test]
    fn a_riddle_comes_to_its_prompt() {
        let mut shapes = 0;
        for r in riddles(Split::Train, 400).chain(riddles(Split::HeldOut, 400)) {
            assert!(r.answer().ends_with(&format!("the final prompt is: {}", r.prompt)));
            assert!(!r.clue.contains(&r.prompt), "{r:?}");
            match (r.scene, r.name) {
                (Some(scene), None) => {
                    shapes += 1;
                    assert_eq!(scene.seen().unwrap().prompt(), r.prompt);
                    let (colour, shape) = (COLOURS[scene.objects[0].colour].name, english(scene.objects[0].shape));
                    assert!(r.reasoning.contains(&format!(" is {colour} and ")), "{}", r.reasoning);
                    assert!(r.reasoning.ends_with(&format!(" is a {shape}")), "{}", r.reasoning);
                }
                (None, Some(name)) => assert!(r.prompt.ends_with(&name), "{name}"),
                other => panic!("{other:?}"),
            }
        }
        assert!((340..460).contains(&shapes), "{shapes} of 800");
    }
}

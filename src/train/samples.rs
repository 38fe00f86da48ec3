//! Training samples: every one a pure function of the seed and its index.

use crate::dataset::{Canvas, Dataset, SIDE, Style};
use crate::error::{Error, Result};
use crate::rng::{Rng, Stream};
use crate::scenes::{BACKGROUNDS, Background, Scene, Split};

/// An image and its captions.
#[derive(Clone, Debug)]
pub struct Sample {
    /// RGB, (height, width, 3).
    pub canvas: Canvas,
    /// In English and Chinese, or as the library has them, the canonical wording first.
    pub captions: Vec<String>,
}

/// Draws samples from the library and from composed scenes.
pub struct Samples<'a> {
    library: &'a Dataset,
    seed: u64,
    /// Pictures of every concept that is not held out: the tokenizer's.
    pictures: Vec<usize>,
    /// Those of them that are drawn as the transformer draws.
    drawn: Vec<usize>,
    /// Such pictures of all everyday concepts: the transformer's. The tokenizer never sees the
    /// held-out ones, so that its reconstructions are measured on unseen concepts; the transformer
    /// learns all, to be of use.
    everyday: Vec<usize>,
    /// Those of them that have a name and are not held out: the dialogues'.
    things: Vec<usize>,
}

const WHITE: [u8; 3] = [255, 255, 255];

impl<'a> Samples<'a> {
    /// A dataset over `library`.
    ///
    /// Errors: usage, if there is nothing to draw that is not held out.
    pub fn new(library: &'a Dataset, seed: u64) -> Result<Self> {
        let concept = |p: usize| &library.concepts[library.pictures[p].concept];
        let is_drawn = |p: usize| library.pictures[p].is_drawn();
        let all = 0..library.pictures.len();
        let pictures: Vec<usize> = all.clone().filter(|&p| !concept(p).held_out).collect();
        let drawn: Vec<usize> = pictures.iter().copied().filter(|&p| is_drawn(p)).collect();
        let everyday: Vec<usize> = all.filter(|&p| concept(p).everyday && is_drawn(p)).collect();
        let is_thing = |&p: &usize| !concept(p).held_out && !concept(p).names.is_empty();
        let things = everyday.iter().copied().filter(is_thing).collect();
        if drawn.is_empty() || everyday.is_empty() {
            return Err(Error::usage("the picture library has nothing to draw that is not held out")
                .hint("add images with other captions: nextflow train data --folder DIR"));
        }
        Ok(Self { library, seed, pictures, drawn, everyday, things })
    }

    /// The draws of one sample, for one purpose.
    pub fn rng(&self, index: u64, purpose: u64) -> Rng {
        Rng::new(self.seed, index, Stream::Train, purpose)
    }

    /// Pictures the transformer learns to draw.
    pub fn everyday(&self) -> &[usize] {
        &self.everyday
    }

    /// Whether there are things to ask about and edit: named ones that are not held out.
    pub fn has_things(&self) -> bool {
        !self.things.is_empty()
    }

    /// A thing that may be asked about or edited in training, of those that [there
    /// are](Self::has_things): its picture, its name and its name in Chinese.
    pub fn thing(&self, rng: &Rng, counter: u64) -> (usize, &'a str, &'a str) {
        let picture = self.things[rng.below(counter, self.things.len())];
        let library: &'a Dataset = self.library;
        let concept = &library.concepts[self.concept(picture)];
        (picture, &concept.names[0], &concept.label_zh)
    }

    /// The concept of a picture, as an index into the library.
    pub fn concept(&self, picture: usize) -> usize {
        self.library.pictures[picture].concept
    }

    /// The picture of a concept in a style.
    pub fn in_style(&self, concept: usize, style: Style) -> Option<usize> {
        self.library.picture(concept, style)
    }

    /// The picture that the transformer learns to draw for a name.
    pub fn named(&self, name: &str) -> Option<usize> {
        let concept = self.library.find(name)?;
        self.everyday.iter().copied().find(|&p| self.concept(p) == concept)
    }

    /// Things of half the size in the middle row of a white square, each with its left edge.
    pub fn row(&self, places: &[(usize, i32)]) -> Canvas {
        let mut canvas = Canvas::new(SIDE, SIDE, WHITE);
        for &(picture, left) in places {
            self.library.compose(&mut canvas, picture, (left, 32), SIDE / 2);
        }
        canvas
    }

    /// A square image for the tokenizer: half of them as the transformer will draw them, else any
    /// picture at any size, place, background and style, or a scene.
    pub fn picture(&self, index: u64) -> Vec<u8> {
        let rng = self.rng(index, 1);
        match rng.below(0, 100) {
            25..75 => {
                let picture = self.drawn[rng.below(1, self.drawn.len())];
                let background = (rng.uniform(2) < 0.25).then(|| &BACKGROUNDS[rng.below(3, BACKGROUNDS.len())]);
                let mut canvas = self.single(picture, background, SIDE, SIDE).canvas;
                if rng.uniform(4) < 0.3 {
                    canvas = canvas.mirrored();
                }
                canvas.rgb
            }
            0..15 => Scene::sample(&self.rng(index, 2), Split::Train).render(SIDE, SIDE),
            15..25 => self.several(&self.pictures, index, SIDE).canvas.rgb,
            _ => {
                let picture = self.pictures[rng.below(1, self.pictures.len())];
                let size = if rng.uniform(2) < 0.5 { SIDE } else { 72 + rng.below(3, 73) };
                let shift = |counter, range: usize| rng.below(counter, range) as i32 - range as i32 / 2;
                let mut canvas = Canvas::new(SIDE, SIDE, self.background(&rng, 10));
                let corner = (SIDE as i32 - size as i32) / 2;
                self.library.compose(&mut canvas, picture, (corner + shift(4, 17), corner + shift(5, 17)), size);
                if rng.uniform(6) < 0.3 {
                    canvas = canvas.mirrored();
                }
                canvas.rgb
            }
        }
    }

    /// Mostly white, else a named pale colour, else any colour.
    fn background(&self, rng: &Rng, counter: u64) -> [u8; 3] {
        match rng.uniform(counter) {
            u if u < 0.6 => WHITE,
            u if u < 0.8 => BACKGROUNDS[rng.below(counter + 1, BACKGROUNDS.len())].rgb,
            _ => [2, 3, 4].map(|i| rng.below(counter + i, 256) as u8),
        }
    }

    /// A picture with a caption, for the semantic encoder: any style, small shifts. Also returns
    /// the concept.
    pub fn captioned(&self, index: u64) -> (Vec<u8>, String, usize) {
        let rng = self.rng(index, 3);
        let picture = self.pictures[rng.below(0, self.pictures.len())];
        let concept = self.concept(picture);
        let captions = self.library.captions(concept);
        let size = 100 + rng.below(1, 41);
        let mut canvas = Canvas::new(SIDE, SIDE, self.background(&rng, 10));
        let shift = |counter| rng.below(counter, 13) as i32 - 6;
        let corner = (SIDE as i32 - size as i32) / 2;
        self.library.compose(&mut canvas, picture, (corner + shift(2), corner + shift(3)), size);
        if rng.uniform(4) < 0.3 {
            canvas = canvas.mirrored();
        }
        // Drawn images are softer than pictures.
        soften(&mut canvas, rng.below(6, 4));
        (canvas.rgb, captions[rng.below(5, captions.len())].clone(), concept)
    }

    /// The background that shows behind a picture: none behind an opaque one.
    fn shown<'b>(&self, picture: usize, background: Option<&'b Background>) -> Option<&'b Background> {
        background.filter(|_| !self.library.is_opaque(picture))
    }

    /// The captions of [`Self::single`].
    pub fn captions(&self, picture: usize, background: Option<&Background>) -> Vec<String> {
        let mut captions = self.library.captions(self.concept(picture));
        if let Some(background) = self.shown(picture, background) {
            for caption in &mut captions {
                *caption = match caption.is_ascii() {
                    true => format!("{caption} on a {} background", background.name),
                    false => format!("{caption}，{}背景", background.name_zh),
                };
            }
        }
        captions
    }

    /// One picture in the middle of a canvas, white or of a named colour, with every wording. An
    /// opaque one has no background to be told of.
    pub fn single(&self, picture: usize, background: Option<&Background>, width: usize, height: usize) -> Sample {
        let background = self.shown(picture, background);
        let captions = self.captions(picture, background);
        let mut canvas = Canvas::new(width, height, background.map_or(WHITE, |b| b.rgb));
        let size = width.min(height);
        let corner = (((width - size) / 2) as i32, ((height - size) / 2) as i32);
        self.library.compose(&mut canvas, picture, corner, size);
        Sample { canvas, captions }
    }

    /// Two things among the given pictures side by side, or, of a kind that has a name and so a
    /// plural, one at a side or two to four, in a square of `side` pixels.
    pub fn several(&self, among: &[usize], index: u64, side: usize) -> Sample {
        let rng = self.rng(index, 5);
        let picture = |counter| among[rng.below(counter, among.len())];
        let (first, second, half) = (picture(0), picture(1), side / 2);
        let mut canvas = Canvas::new(side, side, WHITE);
        // Corners are in quarters of the side.
        let corner = |(x, y): (usize, usize)| ((x * side / 4) as i32, (y * side / 4) as i32);
        let name = self.library.concepts[self.concept(first)].names.first();
        if name.is_some() && (0.45..0.6).contains(&rng.uniform(2)) {
            let (left, side) = [(0, "left"), (2, "right")][rng.below(4, 2)];
            self.library.compose(&mut canvas, first, corner((left, 1)), half);
            let caption = format!("{} on the {side}", self.library.caption(self.concept(first)));
            return Sample { canvas, captions: vec![caption] };
        }
        let Some(name) = name.filter(|_| rng.uniform(2) >= 0.6) else {
            self.library.compose(&mut canvas, first, corner((0, 1)), half);
            self.library.compose(&mut canvas, second, corner((2, 1)), half);
            let [left, right] = [first, second].map(|p| self.library.caption(self.concept(p)));
            let captions = vec![format!("{left} and {right}"), format!("{left} on the left and {right} on the right")];
            return Sample { canvas, captions };
        };
        let (count, places): (&str, &[(usize, usize)]) = match rng.below(3, 3) {
            0 => ("two", &[(0, 1), (2, 1)]),
            1 => ("three", &[(1, 0), (0, 2), (2, 2)]),
            _ => ("four", &[(0, 0), (2, 0), (0, 2), (2, 2)]),
        };
        for &place in places {
            self.library.compose(&mut canvas, first, corner(place), half);
        }
        Sample { canvas, captions: vec![format!("{count} {}", plural(name))] }
    }

    /// A composition of plain shapes that is not held out.
    pub fn scene(&self, index: u64, width: usize, height: usize) -> Sample {
        let scene = Scene::sample(&self.rng(index, 6), Split::Train);
        let rgb = scene.render(width, height);
        let captions = (0..4).map(|i| scene.caption(&self.rng(index, 7 + i))).collect();
        Sample { canvas: Canvas { width, height, rgb }, captions }
    }
}

/// Takes the mean over windows of `2 radius + 1` pixels, along rows and then along columns.
fn soften(canvas: &mut Canvas, radius: usize) {
    let (w, h) = (canvas.width, canvas.height);
    for (lines, length, along, across) in [(h, w, 3, 3 * w), (w, h, 3 * w, 3)] {
        for start in (0..lines).flat_map(|l| (0..3).map(move |c| l * across + c)) {
            let line: Vec<u32> = (0..length).map(|i| u32::from(canvas.rgb[start + i * along])).collect();
            for i in 0..length {
                let window = &line[i.saturating_sub(radius)..(i + radius + 1).min(length)];
                canvas.rgb[start + i * along] = (window.iter().sum::<u32>() / window.len() as u32) as u8;
            }
        }
    }
}

/// The plural of a noun phrase whose head is its last word, or the one before a preposition.
fn plural(name: &str) -> String {
    let words: Vec<&str> = name.split(' ').collect();
    let head = words.iter().position(|w| ["of", "with", "in", "on"].contains(w)).unwrap_or(words.len()).max(1) - 1;
    let plural = |word: &str| match word {
        "ox" => "oxen".to_string(),
        "goose" => "geese".to_string(),
        w if ["bread", "garlic", "moose"].contains(&w) => w.to_string(),
        w if ["tomato", "potato"].contains(&w) => format!("{w}es"),
        w if w.ends_with("man") && w != "human" => format!("{}men", &w[..w.len() - 3]),
        w if w.ends_with("knife") => format!("{}knives", &w[..w.len() - 5]),
        w if w.ends_with("fish") || w.ends_with("sheep") || w.ends_with("deer") => w.to_string(),
        w if w.ends_with("mouse") => format!("{}mice", &w[..w.len() - 5]),
        w if w.ends_with("leaf") || w.ends_with("wolf") || w.ends_with("sheaf") => format!("{}ves", &w[..w.len() - 1]),
        w if w.ends_with('s') && !w.ends_with("ss") && !w.ends_with("us") => w.to_string(),
        w if ["ss", "us", "sh", "ch", "x"].iter().any(|e| w.ends_with(e)) => format!("{w}es"),
        w if w.ends_with('y') && !["ay", "ey", "oy"].iter().any(|e| w.ends_with(e)) => {
            format!("{}ies", &w[..w.len() - 1])
        }
        w => format!("{w}s"),
    };
    let words: Vec<String> =
        words.iter().enumerate().map(|(i, w)| if i == head { plural(w) } else { w.to_string() }).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{BYTES, CaptionedImage, Concept};

    fn library(concepts: Vec<Concept>, style: Option<Style>, alpha: u8) -> Dataset {
        let pictures = (0..concepts.len()).map(|concept| CaptionedImage { concept, style }).collect();
        let rgba = (0..concepts.len() * BYTES).map(|i| if i % 4 == 3 { alpha } else { 40 + (i / BYTES) as u8 });
        Dataset::new(concepts, pictures, rgba.collect()).unwrap()
    }

    /// With captions of its own or, without any, a name.
    fn concept(label: &str, captions: &[&str], held_out: bool) -> Concept {
        let captions: Vec<String> = captions.iter().map(|c| c.to_string()).collect();
        let names = if captions.is_empty() { vec![label.to_string()] } else { Vec::new() };
        Concept { label: label.into(), names, captions, everyday: true, held_out, ..Concept::default() }
    }

    #[test]
    fn captions_of_their_own_are_learnt_as_they_are() {
        let own =
            [["my dog Rex on a sofa", "沙发上的狗"], ["our boat", "notre bateau à nous"], ["my bicycle", "mein Rad"]];
        let concepts = own.iter().enumerate().map(|(i, captions)| concept(captions[0], captions, i == 2)).collect();
        let library = library(concepts, None, 255);
        let dataset = Samples::new(&library, 1).unwrap();
        assert_eq!((dataset.everyday(), dataset.has_things()), (&[0, 1, 2][..], false));
        for (p, captions) in own.iter().enumerate() {
            let sample = dataset.single(p, Some(&BACKGROUNDS[0]), SIDE, SIDE);
            assert_eq!(sample.captions, captions);
            assert!(sample.canvas.rgb == library.over(p, WHITE));
        }
        for i in 0..200 {
            assert_eq!(dataset.picture(i).len(), SIDE * SIDE * 3);
            let (_, caption, concept) = dataset.captioned(i);
            assert!(own[..2][concept].contains(&caption.as_str()), "{caption}");
            let Sample { captions, .. } = dataset.several(dataset.everyday(), i, SIDE);
            let [both, sides] = &captions[..] else { panic!("{captions:?}") };
            let [left, right] = both.split(" and ").collect::<Vec<_>>()[..] else { panic!("{both}") };
            assert!([left, right].iter().all(|c| own.iter().any(|own| own[0] == *c)), "{both}");
            assert_eq!(*sides, format!("{left} on the left and {right} on the right"));
        }
    }

    #[test]
    fn named_things_keep_their_articles_plurals_and_backgrounds() {
        let library = library(vec![concept("owl", &[], false), concept("bus", &[], true)], Some(Style::ThreeD), 200);
        let dataset = Samples::new(&library, 1).unwrap();
        let rng = dataset.rng(0, 1);
        assert!(dataset.has_things() && (0..20).all(|i| dataset.thing(&rng, i) == (0, "owl", "")));
        let sample = dataset.single(0, Some(&BACKGROUNDS[0]), SIDE, SIDE);
        assert_eq!(sample.captions[0], format!("an owl on a {} background", BACKGROUNDS[0].name));
        let said: Vec<String> = (0..200).flat_map(|i| dataset.several(&[0, 1], i, SIDE).captions).collect();
        for caption in [
            "an owl and a bus",
            "a bus on the left and an owl on the right",
            "three buses",
            "two owls",
            "an owl on the left",
        ] {
            assert!(said.iter().any(|c| c == caption), "{caption} in {said:?}");
        }
    }

    #[test]
    fn a_library_without_anything_to_learn_is_refused() {
        let faces = Concept { everyday: false, ..concept("grinning face", &[], false) };
        for library in [
            library(vec![], None, 255),
            library(vec![concept("my bicycle", &["my bicycle"], true)], None, 255),
            library(vec![concept("owl", &[], false)], Some(Style::Flat), 255),
            library(vec![faces], Some(Style::ThreeD), 255),
        ] {
            let error = Samples::new(&library, 1).err().unwrap();
            assert_eq!(error.exit_code(), 2);
            assert!(error.hint.unwrap().contains("--folder"));
        }
    }

    #[test]
    fn plurals_read_well() {
        let cases = [
            ("red apple", "red apples"),
            ("glass of milk", "glasses of milk"),
            ("cherry", "cherries"),
            ("tropical fish", "tropical fish"),
            ("bus", "buses"),
            ("grapes", "grapes"),
            ("monkey", "monkeys"),
            ("tomato", "tomatoes"),
            ("kitchen knife", "kitchen knives"),
            ("snowman", "snowmen"),
            ("sheaf of rice", "sheaves of rice"),
        ];
        for (one, many) in cases {
            assert_eq!(plural(one), many);
        }
    }
}

//! Training samples: every one a pure function of the seed and its index.

use crate::library::{Canvas, Library, SIDE, Style, with_article};
use crate::rng::{Rng, Stream};
use crate::scenes::{BACKGROUNDS, Background, Scene, Split};

/// An image and what it shows.
#[derive(Clone, Debug)]
pub struct Sample {
    /// RGB, (height, width, 3).
    pub canvas: Canvas,
    /// In English and Chinese, the canonical wording first.
    pub captions: Vec<String>,
}

/// Draws samples from the library and from composed scenes.
pub struct Sampler<'a> {
    library: &'a Library,
    seed: u64,
    /// Pictures of every concept that is not held out: the tokenizer's.
    pictures: Vec<usize>,
    /// Those of them in the transformer's hand.
    drawn: Vec<usize>,
    /// Pictures of all everyday concepts in one hand: the transformer's. The tokenizer never sees the held-out ones, so
    /// that its reconstructions are measured on strangers, but a model that cannot draw a car serves nobody.
    everyday: Vec<usize>,
    /// Those of them that are not held out: the dialogues'.
    things: Vec<usize>,
}

const WHITE: [u8; 3] = [255, 255, 255];

impl<'a> Sampler<'a> {
    /// A sampler over `library`; the transformer draws in `style`.
    pub fn new(library: &'a Library, seed: u64, style: Style) -> Self {
        let concept = |p: usize| &library.concepts[library.pictures[p].concept];
        let pictures: Vec<usize> = (0..library.pictures.len()).filter(|&p| !concept(p).held_out).collect();
        let drawn = pictures.iter().copied().filter(|&p| library.pictures[p].style == style).collect();
        let chosen = |p: &usize| concept(*p).everyday && library.pictures[*p].style == style;
        let everyday: Vec<usize> = (0..library.pictures.len()).filter(chosen).collect();
        let things = everyday.iter().copied().filter(|&p| !concept(p).held_out).collect();
        Self { library, seed, pictures, drawn, everyday, things }
    }

    /// The draws of one sample, for one purpose.
    pub fn rng(&self, index: u64, purpose: u64) -> Rng {
        Rng::new(self.seed, index, Stream::Train, purpose)
    }

    /// Pictures the transformer learns to draw.
    pub fn everyday(&self) -> &[usize] {
        &self.everyday
    }

    /// A thing that may be asked about or edited in training: its picture, its name and its name in Chinese.
    pub fn thing(&self, rng: &Rng, counter: u64) -> (usize, &str, &str) {
        let picture = self.things[rng.below(counter, self.things.len())];
        let concept = &self.library.concepts[self.concept(picture)];
        (picture, &concept.names[0], &concept.label_zh)
    }

    /// What a picture shows, as an index of the library's concepts.
    pub fn concept(&self, picture: usize) -> usize {
        self.library.pictures[picture].concept
    }

    /// The picture of a concept in a hand.
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

    /// A square image for the tokenizer: half of them as the transformer will draw them, else any picture at any size,
    /// place, background and hand, or a scene.
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
            15..25 => self.several(&self.pictures, index).canvas.rgb,
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

    /// A picture with a caption, for the semantic encoder: any hand, small shifts. Also gives the concept.
    pub fn captioned(&self, index: u64) -> (Vec<u8>, String, usize) {
        let rng = self.rng(index, 3);
        let picture = self.pictures[rng.below(0, self.pictures.len())];
        let concept = self.library.pictures[picture].concept;
        let captions = self.library.captions(concept);
        let size = 100 + rng.below(1, 41);
        let mut canvas = Canvas::new(SIDE, SIDE, self.background(&rng, 10));
        let shift = |counter| rng.below(counter, 13) as i32 - 6;
        let corner = (SIDE as i32 - size as i32) / 2;
        self.library.compose(&mut canvas, picture, (corner + shift(2), corner + shift(3)), size);
        if rng.uniform(4) < 0.3 {
            canvas = canvas.mirrored();
        }
        // What a model draws is softer than a picture.
        soften(&mut canvas, rng.below(6, 4));
        (canvas.rgb, captions[rng.below(5, captions.len())].clone(), concept)
    }

    /// One picture in the middle of a canvas, white or of a named colour, with every wording.
    pub fn single(&self, picture: usize, background: Option<&Background>, width: usize, height: usize) -> Sample {
        let mut captions = self.library.captions(self.library.pictures[picture].concept);
        if let Some(background) = background {
            for caption in &mut captions {
                *caption = match caption.is_ascii() {
                    true => format!("{caption} on a {} background", background.name),
                    false => format!("{caption}，{}背景", background.name_zh),
                };
            }
        }
        let mut canvas = Canvas::new(width, height, background.map_or(WHITE, |b| b.rgb));
        let size = width.min(height);
        let corner = (((width - size) / 2) as i32, ((height - size) / 2) as i32);
        self.library.compose(&mut canvas, picture, corner, size);
        Sample { canvas, captions }
    }

    /// Two things among the given pictures side by side, or two to four of one kind.
    pub fn several(&self, among: &[usize], index: u64) -> Sample {
        let rng = self.rng(index, 5);
        let picture = |counter| among[rng.below(counter, among.len())];
        let name = |picture: usize| &self.library.concepts[self.library.pictures[picture].concept].names[0];
        let (first, second) = (picture(0), picture(1));
        let mut canvas = Canvas::new(SIDE, SIDE, WHITE);
        if rng.uniform(2) < 0.6 {
            self.library.compose(&mut canvas, first, (0, 32), 64);
            self.library.compose(&mut canvas, second, (64, 32), 64);
            let captions = vec![
                format!("{} and {}", with_article(name(first)), with_article(name(second))),
                format!("{} on the left and {} on the right", with_article(name(first)), with_article(name(second))),
            ];
            return Sample { canvas, captions };
        }
        let (count, places): (&str, &[(i32, i32)]) = match rng.below(3, 3) {
            0 => ("two", &[(0, 32), (64, 32)]),
            1 => ("three", &[(32, 0), (0, 64), (64, 64)]),
            _ => ("four", &[(0, 0), (64, 0), (0, 64), (64, 64)]),
        };
        for &place in places {
            self.library.compose(&mut canvas, first, place, 64);
        }
        Sample { canvas, captions: vec![format!("{count} {}", plural(name(first)))] }
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
    use super::plural;

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

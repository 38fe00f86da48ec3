//! Dialogues for supervised training: edits, questions, drawing on request, reasoning, stories and
//! small talk. Every one is a pure function of the seed and its index.

use super::samples::Samples;
use super::thing_edits::{ThingEdit, is_plural};
use crate::chat::template::{Part, Role};
use crate::dataset::{Canvas, SIDE, with_article};
use crate::generate::prompt;
use crate::rng::Rng;
use crate::scenes::{
    BACKGROUNDS, EDIT_KINDS, Edit, QUESTION_KINDS, Question, QuestionKind, Riddle, Scene, Smalltalk, Split, Topic,
    smalltalk,
};

/// Text and images, in turns.
pub type Turns = Vec<(Role, Vec<Part<Canvas>>)>;

/// How many images a dialogue has, which decides how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// One image at most.
    Short,
    /// Two or three.
    Long,
    /// None: a reply ends where its image would begin.
    Words,
    /// One that is looked at, and much to say about it: a reply ends where its image would begin.
    Look,
}

impl Length {
    /// Whether a reply ends where its image would begin, which costs a fraction of an image.
    pub fn ends_at_images(self) -> bool {
        matches!(self, Self::Words | Self::Look)
    }
}

fn user(images: Vec<Canvas>, text: &str) -> (Role, Vec<Part<Canvas>>) {
    (Role::User, images.into_iter().map(Part::Image).chain([Part::Text(text.into())]).collect())
}

fn model(text: &str, image: Option<Canvas>) -> (Role, Vec<Part<Canvas>>) {
    let text = Some(text).filter(|t| !t.is_empty()).map(|t| Part::Text(t.into()));
    (Role::Assistant, text.into_iter().chain(image.map(Part::Image)).collect())
}

/// Where a reply ends, in the place of the image that would begin there.
fn left_out() -> Canvas {
    Canvas { width: 0, height: 0, rgb: Vec::new() }
}

fn picture(scene: &Scene) -> Canvas {
    Canvas { width: SIDE, height: SIDE, rgb: scene.render(SIDE, SIDE) }
}

/// A dialogue that is not held out.
pub fn dialogue(dataset: &Samples, index: u64, length: Length) -> Turns {
    let rng = dataset.rng(index, 40 + length as u64);
    let of = |purpose: u64| dataset.rng(index, 50 + 10 * purpose + length as u64);
    match (length, rng.below(0, 100)) {
        (Length::Short, 0..26) => drawing(dataset, &of(0)),
        (Length::Short, 26..46) => questions(&of(1), FEW),
        (Length::Short, 46..68) => thing_question(dataset, &of(2)),
        (Length::Short, 68..94) => thinking(dataset, &of(3)),
        (Length::Short, _) => talk(&of(4)),
        (Length::Words, 0..7) => thinking(dataset, &of(10)),
        (Length::Words, 7..57) => told_edit(&of(11)),
        (Length::Words, 57..67) => {
            let rng = of(13);
            ThingEdit::told(dataset, &rng).map_or_else(|| told_edit(&of(11)), |edit| told_thing_edit(&edit, &rng))
        }
        (Length::Words, 67..97) => told_questions(&of(12)),
        (Length::Words, _) => talk(&of(4)),
        (Length::Look, 0..50) => questions(&of(1), MANY),
        (Length::Look, 50..90) => edit(&of(5), rng.below(1, 3)),
        (Length::Look, _) => thing_question(dataset, &of(2)),
        (Length::Long, 0..8) => copy(dataset, &of(9)),
        (Length::Long, 8..64) => edit(&of(5), 0),
        (Length::Long, 64..86) => thing_edit(dataset, &of(6)),
        (Length::Long, 86..97) => several_turns(&of(7), index),
        (Length::Long, _) => story(&of(8)),
    }
}

/// "draw a cat": an image and nothing else.
fn drawing(dataset: &Samples, rng: &Rng) -> Turns {
    let (caption, canvas) = match rng.below(0, 3) {
        0 => {
            let scene = Scene::sample(&rng.fork(1), Split::Train);
            (scene.caption(&rng.fork(2)), picture(&scene))
        }
        _ => {
            let pictures = dataset.everyday();
            let sample = dataset.single(pictures[rng.below(1, pictures.len())], None, SIDE, SIDE);
            (sample.captions[rng.below(2, sample.captions.len().min(2))].clone(), sample.canvas)
        }
    };
    let forms = ["draw {}", "please draw {}", "can you draw {}?", "{}", "{}", "show me {}"];
    let chinese = ["画{}", "请画{}", "{}"];
    let form = if caption.is_ascii() { forms[rng.below(3, forms.len())] } else { chinese[rng.below(3, chinese.len())] };
    let request = if caption.starts_with("draw ") { caption } else { form.replace("{}", &caption) };
    vec![user(vec![], &request), model("", Some(canvas))]
}

/// Questions about a composition are so many at most, beside images that are drawn and where they
/// are all there is.
const FEW: usize = 4;
const MANY: usize = 12;

/// Questions about a composition, `count` at most, each answered before the next.
fn questions(rng: &Rng, count: usize) -> Turns {
    let Question { scene, text, answer, .. } = Question::sample(&rng.fork(1), Split::Train);
    let mut turns = vec![user(vec![picture(&scene)], &text), model(&answer, None)];
    turns.extend(more_questions(rng, &scene, count - 1));
    turns
}

/// Questions about a composition that has been shown, `count` at most.
fn more_questions(rng: &Rng, scene: &Scene, count: usize) -> Turns {
    let ask = |step: usize| {
        let rng = rng.fork(2 + step as u64);
        Question::on(&rng.fork(0), scene, QuestionKind::sample(&rng), Split::Train)
    };
    let turns = |q: Question| [user(vec![], &q.text), model(&q.answer, None)];
    (0..count).filter_map(ask).flat_map(turns).collect()
}

/// A question about an everyday thing that is not held out, or about one of two.
fn thing_question(dataset: &Samples, rng: &Rng) -> Turns {
    let (picture, name, name_zh) = dataset.thing(rng, 0);
    let phrase = with_article(name);
    // Another thing, where it is asked for in vain or stands beside.
    let (other, other_phrase) = (dataset.thing(rng, 6).0, with_article(dataset.thing(rng, 6).1));
    let words = rng.fork(1);
    if rng.uniform(7) < 0.25 && other_phrase != phrase && ![&phrase, &other_phrase].iter().any(|p| is_plural(p)) {
        let canvas = dataset.row(&[(picture, 0), (other, 64)]);
        let third = dataset.thing(rng, 8).1;
        let third = if is_plural(third) { phrase.clone() } else { with_article(third) };
        let (text, answer) = match rng.below(9, 4) {
            0 => (Topic::WhatAt.say(&words, false, &[("{p}", "on the left")]), phrase),
            1 => (Topic::WhatAt.say(&words, false, &[("{p}", "on the right")]), other_phrase),
            n => {
                let asked = if n == 2 { [&phrase, &other_phrase][rng.below(10, 2)] } else { &third };
                let answer = if [&phrase, &other_phrase].contains(&asked) { "yes" } else { "no" };
                (Topic::Presence.say(&words, false, &[("{n}", asked)]), answer.to_string())
            }
        };
        return vec![user(vec![canvas], &text), model(&answer, None)];
    }
    let background = (rng.uniform(2) < 0.3).then(|| &BACKGROUNDS[rng.below(3, BACKGROUNDS.len())]);
    let canvas = dataset.single(picture, background, SIDE, SIDE).canvas;
    let is_it = |phrase: &str| match rng.below(11, 2) {
        _ if is_plural(phrase) => format!("are {} {phrase}?", ["these", "those"][rng.below(12, 2)]),
        0 => format!("is {} {phrase}?", ["this", "it"][rng.below(12, 2)]),
        _ => Topic::Presence.say(&words, false, &[("{n}", phrase)]),
    };
    let (text, answer) = match rng.below(4, 12) {
        0..6 => (Topic::What.say(&words, false, &[]), phrase),
        6 if !name_zh.is_empty() => (Topic::What.say(&words, true, &[]), name_zh.to_string()),
        7 | 8 => (is_it(&phrase), "yes".into()),
        9 | 10 => (is_it(&other_phrase), if other_phrase == phrase { "yes" } else { "no" }.into()),
        _ => {
            let colour = background.map_or("white", |b| b.name);
            (Topic::Colour.say(&words, false, &[("{o}", "the background")]), colour.into())
        }
    };
    vec![user(vec![canvas], &text), model(&answer, None)]
}

/// Reasoning first, then the image (the paper's chain of thought).
fn thinking(dataset: &Samples, rng: &Rng) -> Turns {
    if rng.uniform(0) < 0.15 {
        // What needs no reasoning.
        let scene = Scene::sample(&rng.fork(1), Split::Train);
        let answer = format!("{}{}", prompt::FINAL, scene.prompt());
        return vec![
            user(vec![], &format!("{}{}", prompt::THINK, scene.prompt())),
            model(&answer, Some(picture(&scene))),
        ];
    }
    let riddle = Riddle::sample(&rng.fork(2), Split::Train);
    let canvas = match (&riddle.scene, &riddle.name) {
        (Some(scene), _) => Some(picture(scene)),
        (None, Some(name)) => dataset.named(name).map(|p| dataset.single(p, None, SIDE, SIDE).canvas),
        (None, None) => None,
    };
    vec![user(vec![], &format!("{}{}", prompt::THINK, riddle.clue)), model(&riddle.answer(), canvas)]
}

fn talk(rng: &Rng) -> Turns {
    let all: Vec<Smalltalk> = smalltalk().collect();
    let Smalltalk { questions, answer } = &all[rng.below(0, all.len())];
    vec![user(vec![], questions[rng.below(1, questions.len())]), model(answer, None)]
}

/// An instruction as `nextflow edit` puts it, or as a conversation does.
fn announced(instruction: &str, rng: &Rng) -> String {
    let mark = if rng.below(30, 2) == 0 { prompt::EDIT } else { "" };
    format!("{mark}{instruction}")
}

fn instruction(edit: &Edit, rng: &Rng) -> String {
    announced(&edit.instruction(rng, Split::Train).text, rng)
}

/// A composition and what an instruction makes of it, after `questions` questions about it at most.
fn edit(rng: &Rng, questions: usize) -> Turns {
    let edit = Edit::sample(&rng.fork(1), Split::Train);
    let text = instruction(&edit, &rng.fork(2));
    let mut turns = more_questions(&rng.fork(3), &edit.source, questions);
    turns.extend([user(vec![], &text), model(&edit.thought(), Some(picture(&edit.target)))]);
    turns[0].1.insert(0, Part::Image(picture(&edit.source)));
    turns
}

/// An edit of a composition that is told, not shown: what the words of an instruction make of those
/// of a picture.
fn told_edit(rng: &Rng) -> Turns {
    let edit = Edit::sample(&rng.fork(1), Split::Train);
    let text = instruction(&edit, &rng.fork(2));
    let seen = edit.source.seen().unwrap_or_else(|| edit.source.clone());
    vec![user(vec![], &format!("{}. {text}", seen.prompt())), model(&edit.thought(), Some(left_out()))]
}

/// The same of everyday things.
fn told_thing_edit(edit: &ThingEdit, rng: &Rng) -> Turns {
    vec![
        user(vec![], &format!("{}. {}", edit.seen, announced(&edit.text, rng))),
        model(&edit.thought(), Some(left_out())),
    ]
}

/// Questions about a composition that is told, not shown; half of the first ones about presence,
/// where one word has to be looked for among others.
fn told_questions(rng: &Rng) -> Turns {
    let kind = if rng.below(0, 2) == 0 { QuestionKind::Presence } else { QuestionKind::sample(&rng.fork(1)) };
    let Question { scene, text, answer, .. } = Question::of_kind(&rng.fork(1), kind, Split::Train, Split::Train);
    let seen = scene.seen().unwrap_or_else(|| scene.clone());
    let mut turns = vec![user(vec![], &format!("{}. {text}", seen.prompt())), model(&answer, None)];
    turns.extend(more_questions(rng, &scene, FEW - 1));
    turns
}

/// Wordings that ask for the same image again.
pub const COPY: [&str; 6] =
    ["copy it", "draw it again", "show the same picture", "keep it as it is", "do not change anything", "照着再画一张"];

/// An image, and the same again: where to look for what is to be kept, which every edit needs.
fn copy(dataset: &Samples, rng: &Rng) -> Turns {
    let canvas = match rng.below(0, 2) {
        0 => picture(&Scene::sample(&rng.fork(1), Split::Train)),
        _ => {
            let background = (rng.uniform(1) < 0.3).then(|| &BACKGROUNDS[rng.below(2, BACKGROUNDS.len())]);
            dataset.single(dataset.thing(rng, 3).0, background, SIDE, SIDE).canvas
        }
    };
    vec![user(vec![canvas.clone()], COPY[rng.below(4, COPY.len())]), model("", Some(canvas))]
}

/// An everyday thing or two that are not held out, and what an instruction makes of them.
fn thing_edit(dataset: &Samples, rng: &Rng) -> Turns {
    let edit = ThingEdit::sample(dataset, rng);
    vec![
        user(vec![(edit.before)(dataset)], &announced(&edit.text, rng)),
        model(&edit.thought(), Some((edit.after)(dataset))),
    ]
}

/// Draw and edit, draw and ask, or look, edit and ask.
fn several_turns(rng: &Rng, index: u64) -> Turns {
    let edit = Edit::sample(&rng.fork(1), Split::Train);
    let text = instruction(&edit, &rng.fork(2));
    let asked = |scene: &Scene| {
        let kinds = QUESTION_KINDS.len();
        (0..kinds)
            .find_map(|i| Question::on(&rng.fork(3), scene, QUESTION_KINDS[(i + index as usize) % kinds], Split::Train))
    };
    let mut turns = match rng.below(0, 2) {
        0 => vec![
            user(vec![], &edit.source.caption(&rng.fork(4))),
            model("", Some(picture(&edit.source))),
            user(vec![], &text),
        ],
        _ => match asked(&edit.source) {
            Some(q) => vec![user(vec![picture(&edit.source)], &q.text), model(&q.answer, None), user(vec![], &text)],
            None => vec![user(vec![picture(&edit.source)], &text)],
        },
    };
    turns.push(model(&edit.thought(), Some(picture(&edit.target))));
    if let Some(q) = asked(&edit.target).filter(|_| rng.below(5, 2) == 0) {
        turns.extend([user(vec![], &q.text), model(&q.answer, None)]);
    }
    turns
}

/// Two or three images with a sentence before each.
fn story(rng: &Rng) -> Turns {
    let first = Edit::sample(&rng.fork(1), Split::Train);
    let mut parts = vec![
        Part::Text(format!("first there is {}.", first.source.prompt())),
        Part::Image(picture(&first.source)),
        Part::Text(format!("then: {}.", first.canonical())),
        Part::Image(picture(&first.target)),
    ];
    let kinds = EDIT_KINDS.len();
    let next = (rng.below(0, 3) == 0).then(|| {
        (0..kinds).find_map(|i| {
            let kind = EDIT_KINDS[(i + rng.below(2, kinds)) % kinds];
            Edit::on(&rng.fork(3 + i as u64), &first.target, kind, Split::Train)
        })
    });
    let count = match next.flatten() {
        Some(next) => {
            parts.extend([Part::Text(format!("then: {}.", next.canonical())), Part::Image(picture(&next.target))]);
            "three"
        }
        None => "two",
    };
    vec![
        user(vec![], &format!("tell a story in {count} pictures about {}", first.source.prompt())),
        (Role::Assistant, parts),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn a_composition_is_shown_once_and_talked_about_in_turn() {
        for i in 0..100 {
            let rng = Rng::new(5, i, Stream::Train, 0);
            for (turns, images) in [(questions(&rng, MANY), 1), (edit(&rng, 0), 2), (edit(&rng, FEW), 2)] {
                let roles: Vec<Role> = turns.iter().map(|(role, _)| *role).collect();
                assert!(roles.chunks(2).all(|pair| pair == [Role::User, Role::Assistant]), "{roles:?}");
                assert!(turns.len() <= 2 * MANY);
                let parts: Vec<&Part<Canvas>> = turns.iter().flat_map(|(_, parts)| parts).collect();
                assert!(parts[0].image().is_some());
                assert_eq!(parts.iter().filter(|part| part.image().is_some()).count(), images);
                // A model that is to draw says first what.
                if images == 2 {
                    let [.., thought, last] = parts[..] else { panic!("{turns:?}") };
                    assert!(thought.text().is_some_and(|t| t.contains(prompt::FINAL)) && last.image().is_some());
                }
            }
        }
    }
}

use std::collections::HashSet;

use image::RgbImage;

use super::*;
use crate::rng::Stream;
use crate::scenes::detector::{Detection, Found, detect};

fn rng(i: u64) -> Rng {
    Rng::new(22, i, Stream::Train, 0)
}

fn questions(kind: QuestionKind, split: Split, count: u64) -> impl Iterator<Item = Question> {
    (0..count).map(move |i| Question::of_kind(&rng(i), kind, split, split))
}

/// The English ones with what the detector sees in their pictures.
fn seen(kind: QuestionKind, count: u64) -> impl Iterator<Item = (Question, Detection)> {
    questions(kind, Split::HeldOut, count).filter(|q| q.text.is_ascii()).map(|q| {
        let found = detect(&RgbImage::from_raw(128, 128, q.scene.render(128, 128)).unwrap());
        (q, found)
    })
}

fn called(found: &Found) -> String {
    format!("{} {}", COLOURS[found.colour].name, found.shape.map_or("", english))
}

#[test]
fn scenes_and_wordings_are_split() {
    for kind in QUESTION_KINDS {
        let train: Vec<Question> = questions(kind, Split::Train, 300).collect();
        let test: Vec<Question> = questions(kind, Split::HeldOut, 300).collect();
        assert!(train.iter().all(|q| !held_out(&q.scene.key())) && test.iter().all(|q| held_out(&q.scene.key())));
        let texts = |questions: &[Question]| questions.iter().map(|q| q.text.clone()).collect::<HashSet<_>>();
        assert!(texts(&train).is_disjoint(&texts(&test)), "{kind:?}");
        let chinese = train.iter().filter(|q| !q.text.is_ascii()).count();
        assert!((30..75).contains(&chinese), "{chinese} of 300");
        for q in train.iter().chain(&test) {
            assert_eq!(q.text.is_ascii(), q.answer.is_ascii(), "{} {}", q.text, q.answer);
            assert!(!q.text.contains(['{', '}']) && q.answer.to_lowercase() == q.answer && !q.answer.ends_with('.'));
        }
        if kind == QuestionKind::Presence {
            let yes = train.iter().filter(|q| q.answer == "yes" || q.answer == "有").count();
            assert!((120..180).contains(&yes), "{yes} of 300");
        }
    }
}

#[test]
fn no_held_out_wording_is_trained() {
    let all = [
        ("what", &wording::WHAT),
        ("what at", &wording::WHAT_AT),
        ("what beside", &wording::WHAT_BESIDE),
        ("shape", &wording::SHAPE),
        ("colour", &wording::COLOUR),
        ("count", &wording::COUNT),
        ("where", &wording::WHERE),
        ("presence", &wording::PRESENCE),
        ("caption", &wording::CAPTION),
    ];
    all.iter().for_each(|(name, wordings)| wordings.check(name));
}

/// No answer can be guessed from the question: what is not there is as often near as far from what
/// is.
#[test]
fn presence_is_balanced() {
    let mut misses = [0; 3];
    let mut yes = 0;
    for q in questions(QuestionKind::Presence, Split::Train, 3000).filter(|q| q.text.is_ascii()) {
        let shape = SHAPES.into_iter().find(|&s| q.text.contains(english(s))).unwrap();
        let colour = (0..COLOURS.len()).find(|&c| q.text.contains(COLOURS[c].name));
        let there = |f: &dyn Fn(&Object) -> bool| q.scene.objects.iter().any(f);
        let found = there(&|o| o.shape == shape && colour.is_none_or(|c| c == o.colour));
        assert_eq!(q.answer, if found { "yes" } else { "no" }, "{}", q.text);
        yes += u32::from(found);
        if let (false, Some(colour)) = (found, colour) {
            let near = (there(&|o| o.shape == shape), there(&|o| o.colour == colour));
            misses[if near.0 {
                0
            } else if near.1 {
                1
            } else {
                2
            }] += 1;
        }
    }
    assert!((1150..1350).contains(&yes), "{yes}");
    assert!(misses.iter().all(|&n| n > 150), "{misses:?}");
}

#[test]
fn counts_and_presences_are_what_the_detector_finds() {
    let word = |n: usize| ["none", "one", "two", "three", "four"][n];
    for (q, found) in seen(QuestionKind::Count, 150) {
        let counted = |o: &&Found| {
            let named = |names: &[&str], own: &str| {
                let name = names.iter().find(|n| q.text.contains(**n));
                name.is_none_or(|n| *n == own)
            };
            named(&COLOURS.map(|c| c.name), COLOURS[o.colour].name)
                && named(&SHAPES.map(english), o.shape.map_or("", english))
        };
        assert_eq!(q.answer, word(found.objects.iter().filter(counted).count()), "{} {found:?}", q.text);
    }
    for (q, found) in seen(QuestionKind::Presence, 150) {
        let there = found.objects.iter().any(|o| {
            let full = q.text.contains(&called(o));
            let bare = q.text.contains(&format!("a {}", o.shape.map_or("", english)));
            full || bare
        });
        assert_eq!(q.answer, if there { "yes" } else { "no" }, "{} {found:?}", q.text);
    }
}

#[test]
fn places_and_colours_are_what_the_detector_finds() {
    for (q, found) in seen(QuestionKind::Where, 150) {
        let named = SHAPES.iter().any(|s| q.text.contains(english(*s)));
        let asked = |o: &&Found| q.text.contains(o.shape.map_or("", english)) || !named;
        let mut about: Vec<&Found> = found.objects.iter().filter(asked).collect();
        about.retain(|o| about_colour(&q.text).is_none_or(|c| c == COLOURS[o.colour].name));
        let [about] = about[..] else { panic!("{} {found:?}", q.text) };
        let mut others = found.objects.iter().filter(|o| *o != about).map(|o| o.centre);
        let from = others.next_back().unwrap_or((64.0, 64.0));
        let (dx, dy) = (about.centre.0 - from.0, about.centre.1 - from.1);
        let right = match q.answer.as_str() {
            "on the left" => dx < -10.0,
            "on the right" => dx > 10.0,
            "at the top" => dy < -10.0,
            "at the bottom" => dy > 10.0,
            answer => answer == "in the middle" && dx.hypot(dy) < 8.0,
        };
        assert!(right, "{} {} {found:?}", q.text, q.answer);
    }
    for (q, found) in seen(QuestionKind::Colour, 150).filter(|(q, _)| !q.text.contains("background")) {
        let right = |o: &Found| q.text.contains(o.shape.map_or("", english)) && COLOURS[o.colour].name == q.answer;
        assert!(found.objects.iter().any(right), "{} {} {found:?}", q.text, q.answer);
    }
}

/// The colour that a text names.
fn about_colour(text: &str) -> Option<&'static str> {
    COLOURS.iter().map(|c| c.name).find(|c| text.contains(&format!(" {c} ")))
}

#[test]
fn what_is_there_is_named_in_full() {
    for (q, found) in seen(QuestionKind::What, 150) {
        let answer = q.answer.trim_start_matches("an ").trim_start_matches("a ");
        assert!(found.objects.iter().any(|o| called(o).ends_with(answer)), "{} {} {found:?}", q.text, q.answer);
        assert!(!q.text.contains(answer), "{} {}", q.text, q.answer);
    }
}

#[test]
fn a_caption_depends_on_the_picture_alone() {
    for kind in KINDS {
        for i in 0..200 {
            let scene = Scene::of_kind(&rng(i), kind, Split::Train);
            let mut turned = scene.clone();
            turned.objects.reverse();
            turned.place = Place::Unsaid;
            let caption = scene.seen().unwrap().prompt();
            assert_eq!(turned.seen().unwrap().prompt(), caption);
            if scene.place == Place::Unsaid && scene.objects.len() == 1 && kind != Kind::Counting {
                assert_eq!(caption, scene.prompt());
            }
        }
    }
}

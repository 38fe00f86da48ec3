use image::RgbImage;

use super::*;
use crate::rng::Stream;
use crate::scenes::detector::detect;
use crate::scenes::judge::judge;
use crate::scenes::{BACKGROUNDS, COLOURS};

fn rng(i: u64) -> Rng {
    Rng::new(21, i, Stream::Train, 0)
}

fn edits(kind: EditKind, split: Split, count: u64) -> impl Iterator<Item = Edit> {
    (0..count).map(move |i| Edit::of_kind(&rng(i), kind, split))
}

fn image(scene: &Scene) -> RgbImage {
    RgbImage::from_raw(128, 128, scene.render(128, 128)).unwrap()
}

#[test]
fn training_edits_touch_no_held_out_composition_and_the_others_end_at_one() {
    for kind in EDIT_KINDS {
        let mut held = std::collections::HashSet::new();
        for (train, test) in edits(kind, Split::Train, 300).zip(edits(kind, Split::HeldOut, 300)) {
            assert_eq!((train.kind, test.kind), (kind, kind));
            assert!(!held_out(&train.source.key()) && !held_out(&train.target.key()), "{train:?}");
            assert!(held_out(&test.target.key()), "{test:?}");
            held.insert(test.target.key());
        }
        assert!(held.len() >= 5, "{kind:?}: {}", held.len());
    }
}

#[test]
fn nothing_changes_but_what_is_asked_for() {
    for kind in EDIT_KINDS {
        for edit in edits(kind, Split::Train, 60).chain(edits(kind, Split::HeldOut, 20)) {
            let (before, after) = (edit.source.render(128, 128), edit.target.render(128, 128));
            let boxes = edit.changed();
            assert!(before != after && !boxes.is_empty(), "{edit:?}");
            for p in (0..128 * 128).filter(|p| before[3 * p..3 * p + 3] != after[3 * p..3 * p + 3]) {
                let (x, y) = ((p % 128) as f64, (p / 128) as f64);
                let within = |&[l, t, r, b]: &[f64; 4]| l <= x && x < r && t <= y && y < b;
                assert!(boxes.iter().any(within), "({x}, {y}) {edit:?}");
            }
        }
    }
}

#[test]
fn targets_are_judged_right_and_copies_of_the_source_wrong() {
    for kind in EDIT_KINDS {
        let (mut right, mut copied, count) = (0, 0, 100);
        for edit in edits(kind, Split::HeldOut, count / 2).chain(edits(kind, Split::Train, count / 2)) {
            let found = detect(&image(&edit.target));
            if judge(&edit.target, &found) {
                right += 1;
            } else {
                eprintln!("{:?} -> {:?}", edit.target, found.objects);
            }
            copied += u64::from(judge(&edit.target, &detect(&image(&edit.source))));
        }
        eprintln!("{kind:?}: {right} targets, {copied} sources of {count}");
        assert!(100 * right >= 98 * count, "{kind:?}: {right} of {count}");
        // The judge asks for no size that is not told, no white background, and not how far an
        // object is from the middle.
        if !matches!(kind, EditKind::Move | EditKind::Resize | EditKind::Background) {
            assert_eq!(copied, 0, "{kind:?}");
        }
    }
}

/// What a scene is of, and what it is drawn as, are drawn apart: one must not tell the other.
#[test]
fn kinds_of_scenes_tell_no_colours() {
    for kind in [EditKind::Recolour, EditKind::Remove, EditKind::Flip] {
        let mut seen = std::collections::HashMap::new();
        for edit in edits(kind, Split::Train, 1500) {
            let first = &edit.source.objects[0];
            seen.entry(edit.source.kind).or_insert_with(|| [0; COLOURS.len()])[first.colour] += 1;
        }
        for (scene, colours) in seen {
            let (all, most) = (colours.iter().sum::<u32>(), colours.into_iter().max().unwrap());
            assert!(all < 60 || 4 * most < all, "{kind:?} of {scene:?}: {colours:?}");
        }
    }
}

#[test]
fn instructions_name_what_is_there() {
    for kind in EDIT_KINDS {
        for (i, edit) in edits(kind, Split::Train, 200).enumerate() {
            let canonical = edit.canonical();
            for text in [&canonical, &edit.instruction(&rng(i as u64), Split::Train).text] {
                assert!(!text.contains(['{', '}']) && text.to_lowercase() == *text, "{text}");
            }
            // Every colour that the canonical wording says is one of the source or target.
            let (source, target) = (&edit.source, &edit.target);
            let colours = || source.objects.iter().chain(&target.objects).map(|o| COLOURS[o.colour].name);
            let background = [source, target].map(|s| s.background.map_or("white", |b| BACKGROUNDS[b].name));
            let words = canonical.replace(background[1], "");
            for colour in COLOURS.iter().filter(|c| words.split([' ', ',']).any(|w| w == c.name)) {
                assert!(colours().any(|c| c == colour.name), "{canonical}: {edit:?}");
            }
        }
    }
}

#[test]
fn wordings_are_split() {
    for kind in EDIT_KINDS {
        let said = |split| -> std::collections::HashSet<String> {
            let edit = Edit::of_kind(&rng(1), kind, Split::Train);
            (0..400).map(|i| edit.instruction(&rng(i), split).text).collect()
        };
        let (train, test) = (said(Split::Train), said(Split::HeldOut));
        let edit = Edit::of_kind(&rng(1), kind, Split::Train);
        assert!(train.is_disjoint(&test), "{kind:?}: {:?}", train.intersection(&test).next());
        assert!(!test.contains(&edit.canonical()), "{}", edit.canonical());
        assert!(train.len() >= 100 && test.len() >= 7, "{kind:?}: {} {}", train.len(), test.len());
        let chinese = (0..600).filter(|&i| !edit.instruction(&rng(i), Split::Train).text.is_ascii()).count();
        assert!((60..140).contains(&chinese), "{chinese} of 600");
    }
}

#[test]
fn no_held_out_wording_is_trained() {
    let all = [
        ("add", &words::ADD),
        ("add beside", &words::ADD_BESIDE),
        ("add anywhere", &words::ADD_ANYWHERE),
        ("remove", &words::REMOVE),
        ("replace", &words::REPLACE),
        ("recolour", &words::RECOLOUR),
        ("move", &words::MOVE),
        ("resize", &words::RESIZE),
        ("flip", &words::FLIP),
        ("background", &words::BACKGROUND),
        ("style", &words::STYLE),
        ("combination", &words::COMBINATION),
    ];
    all.iter().for_each(|(name, wordings)| wordings.check(name));
}

/// A model must not get away with keeping the object that it names first.
#[test]
fn either_object_is_edited_equally_often() {
    for kind in [EditKind::Remove, EditKind::Replace, EditKind::Recolour, EditKind::Resize] {
        let mut count = [0.0; 2];
        for edit in edits(kind, Split::Train, 2000).filter(|e| e.source.objects.len() == 2) {
            let seen = edit.source.seen().unwrap();
            let gone = |o: &Object| !edit.target.objects.iter().any(|t| t.same(o));
            count[seen.objects.iter().position(gone).unwrap()] += 1.0;
        }
        assert!(count[0] > 300.0 && (0.8..1.25).contains(&(count[0] / count[1])), "{kind:?}: {count:?}");
    }
}

#[test]
fn a_dialogue_goes_on_from_where_an_edit_ended() {
    for kind in EDIT_KINDS {
        let begun = edits(EditKind::Recolour, Split::Train, 60).map(|e| e.target);
        let next: Vec<Edit> = begun.filter_map(|s| Edit::on(&rng(3), &s, kind, Split::Train)).collect();
        assert!(next.len() >= 5, "{kind:?}: {}", next.len());
    }
    let one = Edit::of_kind(&rng(0), EditKind::Remove, Split::Train).target;
    assert!(Edit::on(&rng(0), &one, EditKind::Remove, Split::Train).is_none());
}

#[test]
fn a_thought_tells_what_is_seen_and_what_it_becomes() {
    for kind in EDIT_KINDS {
        for edit in edits(kind, Split::Train, 100) {
            let thought = edit.thought();
            let (before, after) = thought.split_once(". the final prompt is: ").unwrap();
            let (before, steps) = before.split_once(". ").unwrap();
            assert_ne!(before, after, "{edit:?}");
            assert_eq!(steps.split(". ").count(), edit.changes.len(), "{steps}");
            assert!(steps.split(". ").all(|step| step.contains(" is now ")), "{steps}");
            // As if one knew the pictures alone: what an object was meant to be called does not
            // show in them.
            let told = |scene: &Scene| Scene::of_objects(scene.objects.clone(), scene.background).unwrap();
            for (words, scene) in [(before, &edit.source), (after, &edit.target)] {
                let objects = &told(scene).objects;
                assert!(objects.iter().all(|o| words.contains(COLOURS[o.colour].name)), "{words}: {edit:?}");
            }
        }
    }
}

/// However an instruction points at an object, the step names it in full and says where it is.
#[test]
fn a_step_names_its_object_and_its_place() {
    for kind in [EditKind::Remove, EditKind::Replace, EditKind::Recolour, EditKind::Resize] {
        for edit in edits(kind, Split::Train, 200).filter(|edit| edit.source.objects.len() == 2) {
            let thought = edit.thought();
            let step = thought.split(". ").nth(1).unwrap();
            let kept = |o: &&Object| edit.target.objects.iter().any(|t| t.same(o));
            let gone = edit.source.objects.iter().find(|o| !kept(o)).unwrap();
            let stays = edit.source.objects.iter().find(kept).unwrap();
            let name = format!("the {} {:?} ", COLOURS[gone.colour].name, gone.shape).to_lowercase();
            let (dx, dy) = (gone.centre.0 - stays.centre.0, gone.centre.1 - stays.centre.1);
            let place = match dx.abs() > dy.abs() {
                true => ["on the left", "on the right"][usize::from(dx > 0.0)],
                false => ["at the top", "at the bottom"][usize::from(dy > 0.0)],
            };
            assert!(step.starts_with(&format!("{name}{place} is now ")), "{step}: {edit:?}");
        }
    }
}

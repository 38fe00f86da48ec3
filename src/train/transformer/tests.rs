//! What sequences are made of: which words and codes are learnt, and how often captions are left
//! out.

use super::*;
use crate::train::pool::PoolSizes;
use crate::train::sequence::Target;
use crate::train::tests;

/// A part of the training with a pool of a few images, and its text tokenizer.
fn with_lesson(test: impl FnOnce(&Lesson, &Text) -> Result<()>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (run, library, text) = (tests::run(&folder)?, tests::library(), tests::text()?);
    let (tokenizer, _) = run.load(&[], |w| ImageTokenizer::load(w, &run.recipe.tokenizer))?;
    let dataset = Samples::new(&library, 1)?;
    let sizes = PoolSizes { things: 2, backgrounds: 0, scenes: 4, several: 0, oblong: 0 };
    let (scales, quantizer) = (run.recipe.scales, tokenizer.quantizer());
    let pool = Pool::build(&dataset, &tokenizer, &text, sizes, scales)?;
    let (tokenizer, pool) = (&tokenizer, &pool);
    test(
        &Lesson { run: &run, part: "full", tokenizer, quantizer, pool, scales, dialogues: None, words_alone: false },
        &text,
    )
}

#[test]
fn one_image_in_ten_is_learnt_without_its_caption() -> Result<()> {
    with_lesson(|lesson, _| {
        let (count, boi) = (1000, lesson.run.recipe.backbone.boi());
        let sequences = lesson.captioned(lesson.pool.shelf(0), count, 0)?;
        let silent = sequences.iter().filter(|s| s.words[0] == (0, boi)).count();
        assert!((60..=140).contains(&silent), "{silent} of {count}");
        Ok(())
    })
}

#[test]
fn only_what_the_model_says_and_draws_is_learnt() -> Result<()> {
    with_lesson(|lesson, text| {
        let config = &lesson.run.recipe.backbone;
        let grids = schedule::nearest(1.0).prefix(lesson.scales);
        let image = |seed| {
            let rng = Rng::new(seed, 0, Stream::Train, 0);
            Part::Image((0..(64 * config.code_dim) as u64).map(|i| rng.normal(i) as f32).collect::<Vec<f32>>())
        };
        let said = |text: &str| Part::Text(text.to_string());
        let turns = [
            (Role::User, vec![image(1), said("what is it?")]),
            (Role::Assistant, vec![said("a plum")]),
            (Role::User, vec![said("draw a coin")]),
            (Role::Assistant, vec![said("a coin"), image(2)]),
        ];
        let template = Template::of(text, ImageMarks::NONE)?;
        // One that is not left without words.
        let index = (0..).find(|&i| lesson.rng(i, 3 << 32).uniform(0) >= CAPTION_DROP).unwrap_or_default();
        let (end, boi, eoi) = (template.end, config.boi(), config.eoi());
        let mark = |id: &u32| [end, boi, eoi].contains(id);
        for (short, marks) in [(false, vec![end, boi, end]), (true, vec![end, boi])] {
            let sequence = lesson.dialogue(text, &template, index, &turns, short)?;
            let targets = &sequence.text_targets;
            let ids: Vec<u32> = targets.iter().map(|t| t.id).collect();
            let words = ids.split(mark).filter(|words| !words.is_empty());
            let words = words.map(|ids| Ok(text.decode(ids)?.trim().to_string())).collect::<Result<Vec<_>>>()?;
            assert_eq!(words, ["a plum", "a coin"]);
            assert_eq!(ids.iter().filter(|id| mark(id)).copied().collect::<Vec<_>>(), marks);
            // Each is the next token; after the last one of a short dialogue there is none.
            let next = |t: &Target| sequence.words.contains(&(t.at + 1, t.id));
            assert!(targets[..targets.len() - usize::from(short)].iter().all(next));
            // Both images are read, and the codes of the second one are learnt, from its <boi> on.
            let of = |id: u32| sequence.words.iter().filter(|w| w.1 == id).map(|w| w.0).collect::<Vec<usize>>();
            let (opened, codes) = (of(boi), &sequence.code_targets);
            assert_eq!((opened.len(), of(eoi).len()), if short { (1, 1) } else { (2, 2) });
            assert_eq!(codes.len(), if short { 0 } else { schedule::codes(grids) });
            assert_eq!(codes.first().map(|t| t.at), opened.get(1).copied());
        }
        Ok(())
    })
}

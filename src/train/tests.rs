//! Parts of the training that end and go on.

use std::collections::{BTreeMap, HashMap};

use candle_core::{Device, Tensor};

use super::Hyperparameters;
use super::pool::{Pool, PoolSizes};
use super::recipe::Recipe;
use super::run::Run;
use super::samples::Samples;
use super::tokenizer::Stage;
use super::transformer::Lesson;
use crate::checkpoint::Weights;
use crate::dataset::{BYTES, CaptionedImage, Concept, Dataset, SIDE};
use crate::error::Result;
use crate::text::Text;
use crate::tokenizer::ImageTokenizer;

/// Warm-up beyond the last step: then the learning rate of a step is the same whatever the number
/// of steps.
const WARMUP: usize = 100;

fn plan(steps: usize) -> Hyperparameters {
    Hyperparameters { lr: 0.05, warmup: WARMUP, steps, clip: 1.0, weight_decay: 0.05, beta2: 0.98 }
}

/// Two discs.
pub(super) fn library() -> Dataset {
    let concept = |name: &str, zh: &str| Concept {
        label: name.into(),
        names: vec![name.into()],
        label_zh: zh.into(),
        everyday: true,
        ..Concept::default()
    };
    let disc = |colour: [u8; 3]| {
        (0..BYTES / 4).flat_map(move |i| {
            let (x, y) = (i % SIDE, i / SIDE);
            let inside = x.abs_diff(64).pow(2) + y.abs_diff(64).pow(2) < 48 * 48;
            [colour[0], colour[1], colour[2], if inside { 255 } else { 0 }]
        })
    };
    let picture = |concept| CaptionedImage { concept, style: None };
    let rgba = disc([200, 30, 40]).chain(disc([30, 40, 200])).collect();
    Dataset::new(vec![concept("plum", "李子"), concept("coin", "硬币")], vec![picture(0), picture(1)], rgba).unwrap()
}

/// Nano's recipe, as small as may be.
fn recipe() -> Recipe {
    let mut recipe = Recipe::nano();
    let (semantic, codebook) = (&mut recipe.tokenizer.semantic, &mut recipe.tokenizer.codebook);
    (semantic.hidden_size, semantic.intermediate_size, semantic.num_hidden_layers) = (16, 24, 1);
    (semantic.num_attention_heads, codebook.size) = (2, 32);
    for cnn in [&mut recipe.tokenizer.encoder, &mut recipe.tokenizer.decoder, &mut recipe.decoder_final] {
        (cnn.ch, cnn.z_channels, cnn.groups) = (8, 8, 4);
    }
    let backbone = &mut recipe.backbone;
    (backbone.hidden_size, backbone.intermediate_size, backbone.num_hidden_layers) = (64, 48, 1);
    (backbone.num_attention_heads, backbone.num_key_value_heads, backbone.codebook_size) = (2, 1, 32);
    recipe
}

/// A run in a folder of its own.
pub(super) fn run(folder: &tempfile::TempDir) -> Result<Run> {
    std::fs::write(folder.path().join("recipe.json"), serde_json::to_vec(&recipe()).unwrap())?;
    Run::open(folder.path(), Device::Cpu)
}

pub(super) fn text() -> Result<Text> {
    Text::from_bytes(include_bytes!("../../assets/nano/tokenizer.json"))
}

/// All parts in order, every one first for some steps and then for the rest.
fn train(run: &Run, stops: &[usize]) -> Result<()> {
    let (library, text) = (library(), text()?);
    let dataset = |part: &str| Samples::new(&library, run.seed(part));
    for &steps in stops {
        super::semantic::train(run, &dataset("semantic")?, &text, 4, &plan(steps))?;
    }
    for stage in [Stage::Pixel, Stage::Joint] {
        for &steps in stops {
            super::tokenizer::train(run, &dataset(&stage.name())?, stage, 2, &plan(steps))?;
        }
    }
    for part in ["one", "two", "words"] {
        for &steps in stops {
            transformer(run, part, &dataset(part)?, &text, steps)?;
        }
    }
    for &steps in stops {
        super::tokenizer::train(run, &dataset("decoder")?, Stage::Decoder, 2, &plan(steps))?;
    }
    Ok(())
}

fn transformer(run: &Run, part: &str, dataset: &Samples, text: &Text, steps: usize) -> Result<()> {
    let file = run.file("image_tokenizer.safetensors");
    let (tokenizer, _) = run.load(&[&file], |w| ImageTokenizer::load(w, &run.recipe.tokenizer))?;
    let sizes = PoolSizes { things: 2, backgrounds: 1, scenes: 4, several: 2, oblong: 2 };
    let pool = Pool::build(dataset, &tokenizer, text, sizes, run.recipe.scales)?;
    let dialogues = matches!(part, "two" | "words").then_some((dataset, text));
    let (quantizer, scales) = (tokenizer.quantizer(), run.recipe.scales);
    let lesson = Lesson {
        run,
        part,
        tokenizer: &tokenizer,
        quantizer,
        pool: &pool,
        scales,
        dialogues,
        words_alone: part == "words",
    };
    super::transformer::train(&lesson, 4, &plan(steps))
}

const WEIGHTS: [&str; 3] = ["semantic.safetensors", "image_tokenizer.safetensors", "model.safetensors"];

fn weights(run: &Run) -> Result<BTreeMap<String, Tensor>> {
    let all = WEIGHTS.map(|name| candle_core::safetensors::load(run.file(name), &Device::Cpu));
    let all: Vec<HashMap<String, Tensor>> = all.into_iter().collect::<candle_core::Result<_>>()?;
    Ok(all.into_iter().flatten().collect())
}

#[test]
fn what_was_interrupted_ends_as_what_was_not() -> Result<()> {
    let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
    let [whole, resumed] = [run(&folders[0])?, run(&folders[1])?];
    train(&whole, &[4])?;
    train(&resumed, &[2, 4])?;
    let (want, got) = (weights(&whole)?, weights(&resumed)?);
    assert_eq!(want.keys().collect::<Vec<_>>(), got.keys().collect::<Vec<_>>());
    let start = Weights::trainable(whole.recipe.seed, &Device::Cpu);
    ImageTokenizer::load(&start, &whole.recipe.tokenizer)?;
    let start = start.vars();
    let mut moved = 0;
    for (key, want) in &want {
        let apart = |other: &Tensor| (want - other)?.abs()?.max_all()?.to_scalar::<f32>();
        assert!(apart(&got[key])? < 1e-4, "{key} is {} apart", apart(&got[key])?);
        moved += usize::from(start.get(key).is_some_and(|start| apart(start).is_ok_and(|apart| apart > 1e-3)));
    }
    assert!(moved > 20, "no more than {moved} tensors were trained");
    Ok(())
}

#[test]
fn what_is_done_is_not_done_again_and_what_others_stand_on_stays() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let run = run(&folder)?;
    let bytes = || WEIGHTS.map(|name| std::fs::read(run.file(name)).unwrap());
    train(&run, &[1])?;
    let before = bytes();
    train(&run, &[1])?;
    assert!(before == bytes());
    let (library, more) = (library(), plan(2));
    let error = super::tokenizer::train(&run, &Samples::new(&library, 1)?, Stage::Joint, 2, &more);
    let error = error.unwrap_err();
    assert!(error.message.contains("tokenizer-decoder.state"), "{}", error.message);
    assert!(before == bytes());
    // Another recipe is not another start.
    let mut other = recipe();
    other.decoder_final.ch = 16;
    std::fs::write(run.file("recipe.json"), serde_json::to_vec(&other).unwrap())?;
    let run = Run::open(folder.path(), Device::Cpu)?;
    let decoder = super::tokenizer::train(&run, &Samples::new(&library, 1)?, Stage::Decoder, 2, &more);
    let error = decoder.unwrap_err();
    let told =
        ["decoder.conv_blocks.0.", ": found (16", ", expected (32"].iter().all(|part| error.message.contains(part));
    assert!(told && error.hint.is_some(), "{}", error.message);
    assert!(before == bytes());
    Ok(())
}

#[test]
fn a_part_that_another_has_gone_on_from_is_over() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (run, library, text) = (run(&folder)?, library(), text()?);
    let train = |part: &str, steps| transformer(&run, part, &Samples::new(&library, run.seed(part))?, &text, steps);
    let (file, read) = (run.file("model.safetensors"), || std::fs::read(run.file("model.safetensors")));
    train("first", 1)?;
    train("second", 1)?;
    let before = read()?;
    let error = train("first", 2).unwrap_err();
    assert!(error.message.contains("second") && error.hint.is_some(), "{}", error.message);
    train("first", 1)?;
    assert!(before == read()?);
    // Weights that do not tell whose they are can be any part's.
    crate::checkpoint::save(&file, crate::checkpoint::load(&file)?, None)?;
    train("second", 2)?;
    assert!(before != read()?);
    assert_eq!(run.last_part("model.safetensors")?.as_deref(), Some("second"));
    Ok(())
}

#[test]
fn parts_draw_samples_of_their_own() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let run = run(&folder)?;
    let library = library();
    let [one, two] = ["talk", "talk2"].map(|part| Samples::new(&library, run.seed(part)));
    let (one, two) = (one?, two?);
    assert!((0..8).all(|i| one.picture(i) == one.picture(i)));
    assert!((0..8).any(|i| one.picture(i) != two.picture(i)));
    assert!((0..8).any(|i| one.scene(i, SIDE, SIDE).canvas != two.scene(i, SIDE, SIDE).canvas));
    Ok(())
}

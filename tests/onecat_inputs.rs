//! What OneCAT is given, against the reference's own numbers: positions, schedules, sizes, pixels,
//! codes and prompts, with the data of tests/data/onecat.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use nextflow::generate::ratios::{self, LEVELS};
use nextflow::onecat::prompt::{Marks, Piece, Row};
use nextflow::onecat::{OneCatConfig, patches, rope};
use nextflow::ops;
use nextflow::text::Text;
use nextflow::tokenizer::{BitConfig, BitQuantizer};
use nextflow::vision::Patches;
use serde_json::Value;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/onecat").join(name)
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path(name), &Device::Cpu).unwrap()
}

fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path(name)).unwrap()).unwrap()
}

#[track_caller]
fn close(name: &str, got: &Tensor, want: &Tensor, most: f32) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    let off = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    assert!(off < most, "{name}: off by {off}");
}

/// Frequencies, exact or rounded to bf16, and the axis of every pair.
#[test]
fn rotations_equal_the_reference() {
    let golden = tensors("rope_tables.safetensors");
    let config = OneCatConfig::onecat_3b();
    let positions: Vec<Vec<i64>> = golden["positions"].to_vec2().unwrap();
    let places: Vec<rope::Position> =
        positions[0].iter().zip(&positions[1]).map(|(row, column)| [*row as usize, *column as usize]).collect();
    let half = config.transformer.head_dim() / 2;
    for (rounded, of, frequencies) in [(false, "f32", "inv_freq"), (true, "bf16_frequencies", "inv_freq_bf16")] {
        let mine = Tensor::new(rope::frequencies(&config, rounded), &Device::Cpu).unwrap();
        close(frequencies, &mine, &golden[frequencies], 1e-7);
        let angles = rope::angles(&config, rounded, std::slice::from_ref(&places), &Device::Cpu).unwrap();
        for (name, mine) in [("cos", &angles.cos), ("sin", &angles.sin)] {
            let want = &golden[&format!("{name}_{of}")];
            for part in 0..2 {
                let want = want.narrow(1, part * half, half).unwrap().contiguous().unwrap();
                close(&format!("{name}_{of}"), &mine.squeeze(0).unwrap(), &want, 2e-4);
            }
        }
        if !rounded {
            for name in ["q", "k"] {
                let heads = |key: String| golden[&key].transpose(0, 1).unwrap().contiguous().unwrap();
                let x = heads(name.into()).unsqueeze(0).unwrap();
                let turned = ops::rope(&x, &angles.cos, &angles.sin).unwrap().squeeze(0).unwrap();
                close(name, &turned, &heads(format!("{name}_rotated")), 2e-4);
            }
        }
    }
}

/// Names as "30/35": where 30 lines stand among 35.
#[test]
fn coordinates_equal_the_reference() {
    let golden: BTreeMap<String, Vec<usize>> = serde_json::from_value(json("positions.json")).unwrap();
    assert!(golden.len() > 100);
    for (name, want) in golden {
        let (count, most) = name.split_once('/').unwrap();
        let (count, most): (usize, usize) = (count.parse().unwrap(), most.parse().unwrap());
        let mine: Vec<usize> = (0..count).map(|i| rope::coordinate(i, count, most)).collect();
        assert_eq!(mine, want, "{name}");
    }
    let grid: Vec<rope::Position> = rope::grid(7, (2, 3), (4, 9)).collect();
    assert_eq!(grid, [[7, 7], [7, 10], [7, 13], [9, 7], [9, 10], [9, 13]]);
}

#[test]
fn schedules_equal_the_reference() {
    let golden = json("schedules.json");
    let golden = golden.as_object().unwrap();
    assert_eq!(golden.len(), ratios::table().len());
    for (ratio, levels) in golden {
        let table = ratios::nearest(ratio.parse().unwrap());
        for (level, count) in ["0.06M", "0.25M", "0.60M", "1M"].into_iter().zip(LEVELS) {
            let want: Vec<(usize, usize)> = serde_json::from_value(levels[level]["scales"].clone()).unwrap();
            assert_eq!(table.prefix(count), want, "{ratio} {level}");
            let (h, w) = want[want.len() - 1];
            let pixels: (usize, usize) = serde_json::from_value(levels[level]["pixel"].clone()).unwrap();
            assert_eq!(pixels, (16 * h, 16 * w), "{ratio} {level}");
        }
    }
}

#[test]
fn sizes_equal_the_reference() {
    let (golden, config) = (json("sizes.json"), OneCatConfig::onecat_3b());
    let pair = |value: &Value| -> (u32, u32) { serde_json::from_value(value.clone()).unwrap() };
    for case in golden["edit"].as_array().unwrap() {
        let size = pair(&case["image"]);
        // The scripts call the levels of 512 and of 1024 pixels so.
        let scales = if case["stage"] == 2 { LEVELS[1] } else { LEVELS[3] };
        assert_eq!(patches::edit_crop(size), pair(&case["cropped"]), "{case}");
        let (h, w) = patches::edit_grid(&config, size, scales).unwrap();
        let resized = pair(&case["resized_hw"]);
        assert_eq!((28 * h as u32, 28 * w as u32), resized, "{case}");
        assert_eq!(h * w, case["ref_tokens"].as_u64().unwrap() as usize, "{case}");
        let ratio = ratios::nearest(f64::from(size.1) / f64::from(size.0));
        assert_eq!(ratio.h_over_w, case["template"].as_f64().unwrap(), "{case}");
    }
    for case in golden["understanding"].as_array().unwrap() {
        let (h, w) = patches::understanding_grid(&config, &patches::processor(), pair(&case["image"])).unwrap();
        assert_eq!((28 * h as u32, 28 * w as u32), pair(&case["resized_hw"]), "{case}");
        assert_eq!(h * w, case["image_tokens"].as_u64().unwrap() as usize);
        assert_eq!(h * w + config.thumbnail_tokens(), case["with_thumbnail"].as_u64().unwrap() as usize);
    }
    for narrow in [(2010, 10), (10, 2010), (0, 5)] {
        let error = patches::understanding_grid(&config, &patches::processor(), narrow).unwrap_err();
        assert!(error.exit_code() == 2 && error.hint.is_some());
        assert!(patches::edit_grid(&config, narrow, 13).is_err());
    }
}

/// Patches of `p` pixels as an image (3, H, W).
fn pixels(patches: &Patches, p: usize) -> Tensor {
    let (h, w) = patches.tokens;
    let values = Tensor::from_slice(&patches.values, &[h, w, 2, 2, 3, p, p][..], &Device::Cpu).unwrap();
    values.permute(vec![4, 0, 2, 5, 1, 3, 6]).unwrap().reshape((3, 2 * h * p, 2 * w * p)).unwrap()
}

fn every(x: &Tensor, n: usize) -> Tensor {
    let few = |length: usize| Tensor::from_iter((0..length as u32).step_by(n), &Device::Cpu).unwrap();
    let (_, h, w) = x.dims3().unwrap();
    x.index_select(&few(h), 1).unwrap().index_select(&few(w), 2).unwrap()
}

fn picture(golden: &HashMap<String, Tensor>, name: &str) -> RgbImage {
    let bytes = &golden[&format!("{name}.image_u8")];
    let (h, w, _) = bytes.dims3().unwrap();
    RgbImage::from_raw(w as u32, h as u32, bytes.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
}

#[test]
fn pixels_equal_the_reference() {
    let (golden, config) = (tensors("preprocess.safetensors"), OneCatConfig::onecat_3b());
    for name in ["wide", "tall"] {
        let image = picture(&golden, name);
        let parts = patches::understanding(&config, &patches::processor(), &image).unwrap();
        let [whole, thumbnail] = parts.each_ref().map(|part| pixels(part, config.patch_size));
        let at = |part: &str| &golden[&format!("{name}.{part}")];
        close(name, &every(&whole, 13), at("understanding_every13"), 1e-5);
        let corner = whole.narrow(1, 0, 28).unwrap().narrow(2, 0, 28).unwrap().contiguous().unwrap();
        close(name, &corner, at("understanding_corner"), 1e-5);
        close(name, &every(&thumbnail, 9), at("thumbnail_every9"), 1e-5);
        let reference = patches::reference(&config, &image, LEVELS[1]).unwrap();
        close(name, &every(&pixels(&reference, config.patch_size), 13), at("edit512_every13"), 1e-5);
        // As many pixels as for 512, where fewer are drawn.
        assert_eq!(patches::reference(&config, &image, LEVELS[0]).unwrap().tokens, reference.tokens);
    }
    let down = &golden["down.to_56x84"];
    let (_, h, w) = down.dims3().unwrap();
    let patches = patches::processor().cut(&picture(&golden, "down"), (h / 28, w / 28), (14, 2));
    close("down", &pixels(&patches, 14), down, 1e-5);
}

/// Names as `positions_4x4_to_4x6`, and `..._every7` for every seventh row of the result.
#[test]
fn position_grids_equal_the_reference() {
    let golden = tensors("preprocess.safetensors");
    let mut seen = 0;
    for (key, want) in &golden {
        let Some((table, to)) = key.strip_prefix("positions_").and_then(|rest| rest.split_once("_to_")) else {
            continue;
        };
        let (size, few) = to.split_once('_').map_or((to, false), |(size, _)| (size, true));
        let (h, w) = size.split_once('x').unwrap();
        let table = &golden[&format!("positions_{table}")];
        let mine = patches::resized_positions(table, (h.parse().unwrap(), w.parse().unwrap())).unwrap();
        let mine = match few {
            true => {
                let rows = Tensor::from_iter((0..mine.dims()[0] as u32).step_by(7), &Device::Cpu).unwrap();
                mine.index_select(&rows, 0).unwrap()
            }
            false => mine,
        };
        close(key, &mine, want, 1e-5);
        seen += 1;
    }
    assert!(seen >= 7, "{seen}");
    // Patches of a token are neighbours, in rows.
    let (x, want) = (&golden["unshuffle_in"], &golden["unshuffle_out"]);
    let (h, w, c) = x.dims3().unwrap();
    let mine = x.reshape(&[h / 2, 2, w / 2, 2, c][..]).unwrap().permute((0, 2, 1, 3, 4)).unwrap();
    close("unshuffle", &mine.reshape(want.shape()).unwrap(), want, 1e-7);
}

#[test]
fn sums_of_codes_equal_the_reference() {
    let golden = tensors("preprocess.safetensors");
    let flat = |x: &Tensor| x.flatten_from(1).unwrap().t().unwrap().contiguous().unwrap().unsqueeze(0).unwrap();
    let (bits, up, back) = (&golden["codes.bits"], &golden["codes.up_7x10"], &golden["codes.up_7x10_to_5x6"]);
    let (h, w, dim) = bits.dims3().unwrap();
    let quantizer = BitQuantizer::new(BitConfig { dim, patch: 1 }, &Device::Cpu).unwrap();
    let codes = bits.reshape((1, h * w, dim)).unwrap();
    let values = quantizer.add(None, &codes, (h, w), (h, w)).unwrap();
    close("values", &values, &flat(&golden["codes.values"]), 1e-6);
    let sum = quantizer.add(None, &codes, (h, w), (7, 10)).unwrap();
    close("up", &sum, &flat(up), 1e-6);
    let twice = quantizer.add(Some(&sum), &codes, (h, w), (7, 10)).unwrap();
    close("twice", &twice, &(flat(up) * 2.0).unwrap(), 1e-6);
    close("back", &quantizer.shrink(&sum, (7, 10), (5, 6)).unwrap(), &flat(back), 1e-6);
}

/// The vocabulary is cut to the words of these prompts; the ids of the model's own marks are made
/// up.
#[test]
fn prompts_equal_the_reference() {
    let golden = json("prompts.json");
    let bytes = std::fs::read(path("tokenizer.json")).unwrap();
    let text = Text::from_bytes(&bytes).unwrap();
    let config = OneCatConfig::onecat_3b();
    assert_eq!(golden["system_message"], config.system);
    let marks = Marks::of(&text, config.transformer.vocab_size).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let ids = golden["ids"][name].as_array().unwrap();
        ids.iter()
            .map(|id| id.as_u64().map_or_else(|| text.control(id.as_str().unwrap()).unwrap(), |id| id as u32))
            .collect()
    };
    let prompt = |row: Row| marks.prompt(&text, &config.system, &row).unwrap();
    assert_eq!(prompt(Row::Draw(String::new())), [Piece::Tokens(ids("t2i_uncond"))]);
    assert_eq!(prompt(Row::Nothing), [Piece::Tokens(ids("edit_none"))]);
    // The strings themselves, with control tokens by name.
    let spelt = |pieces: Vec<Piece>| -> String {
        let names: HashMap<u32, &str> = text.controls().map(|(name, id)| (id, name)).collect();
        let word = |id: &u32| names.get(id).map_or_else(|| text.decode(&[*id]).unwrap(), |name| name.to_string());
        let piece = |piece: &Piece| match piece {
            Piece::Tokens(ids) => ids.iter().map(word).collect::<String>(),
            Piece::Picture => "<REEF_GEN_CONTEXT>".into(),
        };
        pieces.iter().map(piece).collect()
    };
    let reference = "<ref_gen><REEF_GEN_CONTEXT></ref_gen>";
    for (row, place) in [
        (Row::Draw("a red apple".into()), ["t2i", "cond"]),
        (Row::Draw(String::new()), ["t2i", "uncond"]),
        (Row::Edit("make it blue".into()), ["edit", "image_text"]),
        (Row::Draw("make it blue".into()), ["edit", "text"]),
        (Row::Nothing, ["edit", "none"]),
    ] {
        let words = if place[0] == "t2i" { "a red apple" } else { "make it blue" };
        let want = golden[place[0]][place[1]].as_str().unwrap();
        let want = want.replace("{prompt}", words).replace("{ref}", reference);
        assert_eq!(spelt(prompt(row)), want, "{place:?}");
    }
    // Words of control tokens that a user types are words.
    let typed = prompt(Row::Draw("<|im_end|><img_gen>".into()));
    let [Piece::Tokens(typed)] = &typed[..] else { panic!("{typed:?}") };
    let count = |mark: &str| typed.iter().filter(|&&id| Some(id) == text.control(mark)).count();
    assert_eq!((count("<|im_end|>"), count("<img_gen>")), (2, 1));
}

/// A mark without a row, and one that is not there.
#[test]
fn marks_are_found_by_name_and_checked() {
    let mut file = json("tokenizer.json");
    let read = |file: &Value| Text::from_bytes(file.to_string().as_bytes()).unwrap();
    let rows = OneCatConfig::onecat_3b().transformer.vocab_size;
    let error = Marks::of(&read(&file), 151_670).unwrap_err();
    assert!(error.exit_code() == 3 && error.message.contains("151670 words"), "{error}");
    // Elsewhere in the table, but by the same name.
    for token in file["added_tokens"].as_array_mut().unwrap() {
        let id = token["id"].as_u64().unwrap();
        token["id"] = (if id >= 151_665 { id - 15 } else { id }).into();
    }
    Marks::of(&read(&file), 151_665).unwrap();
    for mark in ["<img_gen>", "<ref_gen>", "</ref_gen>", "<img>", "</img>", "<|im_start|>"] {
        let mut without = file.clone();
        without["added_tokens"].as_array_mut().unwrap().retain(|token| token["content"] != mark);
        let error = Marks::of(&read(&without), rows).unwrap_err();
        assert!(error.exit_code() == 3 && error.message.contains(mark) && error.hint.is_some(), "{error}");
    }
}

/// Unused by the others: what the sampler keeps of two values is tested beside it.
#[test]
fn everything_of_the_preprocessing_is_compared() {
    let known = ["bit_filter.", "codes.", "down.", "positions_", "tall.", "wide.", "unshuffle_"];
    for key in tensors("preprocess.safetensors").keys() {
        assert!(known.iter().any(|known| key.starts_with(known)), "{key}");
    }
    assert_eq!(tensors("preprocess.safetensors")["bit_filter.keep"].dtype(), DType::U8);
}
